"""mode=live: real models generate through the store; every variant gives the same, and is shown."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from specgate.errors import BudgetError, CheckpointError, ConfigError, SpecgateError, StoreError
from specgate.moe.hosts import load_host
from specgate.moe.offload_plan import OffloadPlan
from specgate.report import live_models
from specgate.report.live import Live, live
from specgate.report.live_models import opened, read_prompts, save_wide
from specgate.report.live_page import tables_of
from specgate.report.live_rows import check
from specgate.report.live_run import Watched, generate
from specgate.report.live_settings import PLAIN, WAYS, Budget, LiveSettings, budgets
from specgate.report.modes import run_mode
from specgate.report.publish import publish
from specgate.report.record import Run, read_record, write_json
from specgate.report.replay_shape import ModelShape
from specgate.report.results import make
from specgate.runtime import native
from specgate.traces.datamodule import RoutingDataModule
from tests.report.replays import save_predictor, shape
from tests.test_configs import CONF

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
CPU = torch.device("cpu")
NAMES = list(PLAIN)


def quick(model: Path | str, **changes: Any) -> LiveSettings:
    """Settings that take seconds."""
    values: dict[str, Any] = {
        "model": str(model),
        "residency": [0.5],
        "domains": ["bible_kjv"],
        "prompts": 1,
        "prompt_tokens": 12,
        "new_tokens": 5,
        "warmup_tokens": 1,
        "repeats": 1,
        "device": "cpu",
    }
    return LiveSettings(**(values | changes))


@pytest.fixture(scope="module")
def record(
    tiny_olmoe: Path, tiny_traces: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of all variants, through benchmark.py's own table of modes; the predictor was never trained."""
    folder = tmp_path_factory.mktemp("live")
    data = RoutingDataModule(tiny_traces["olmoe_decode"], phase="decode", use_hidden=False)
    checkpoint = save_predictor(data, folder / "predictor.ckpt")
    settings: Any = OmegaConf.load(CONF / "benchmark.yaml")
    settings.paths = {"run": str(folder)}
    settings.shape = OmegaConf.load(CONF / "shape" / "tiny.yaml")
    settings.live.update(vars(quick(tiny_olmoe, residency=[0.25, 1.0], checkpoints=[str(checkpoint)])))
    found = run_mode("live", settings, {}, None, Console(quiet=True))
    Run("benchmark.py").write(folder, **found)
    return read_record(folder) | {"folder": folder}


def plan_of(path: Path) -> OffloadPlan:
    """Of the model without a budget."""
    found: OffloadPlan = live_models.make_offload(
        str(path), quick(path), CPU, "float32", None, replace(WAYS["offload"], host=False)
    ).plan
    return found


# ---------------------------------------------------------------------- what is measured


def test_every_variant_gives_the_resident_models_tokens(record: dict[str, Any]) -> None:
    found = [(row["variant"], row["residency"]) for row in record["rows"]]
    assert found == [
        ("resident", 1.0),
        ("on_demand", 0.0),
        ("offload", 0.25),
        ("offload", 1.0),
        ("offload_predictor", 0.25),
        ("offload_file", 0.25),
        ("accelerate_cpu", 1.0),
        ("accelerate_disk", 1.0),
    ]
    for row in record["rows"]:
        assert row["tokens_equal"], row["variant"]
        assert row["logits_equal"] or row["variant"].startswith("accelerate")
        assert row["tokens"] == 4, "those after the first"
        assert row["ms_first"] > 0
        assert row["prefill_tokens_per_second"] == pytest.approx(12 / (row["ms_first"] * 1e-3))
        assert row["against_resident"] > 0
        assert row["host_peak"] > 0


def test_bytes_are_by_kind(record: dict[str, Any]) -> None:
    rows = {(row["variant"], row["residency"]): row for row in record["rows"]}
    least, quarter = rows["on_demand", 0.0], rows["offload", 0.25]
    assert (least["slots"], quarter["slots"]) == (2, 8)
    assert least["demand_bytes"] > quarter["demand_bytes"] > 0
    assert quarter["read_bytes"] == 0, "all experts lie in host memory"
    assert rows["offload_file", 0.25]["read_bytes"] > 0
    assert rows["offload_file", 0.25]["host_bytes"] < quarter["host_bytes"]
    assert rows["offload_predictor", 0.25]["prefetch_bytes"] > 0
    for name in ("resident", "accelerate_cpu", "accelerate_disk"):
        assert rows[name, 1.0]["demand_bytes"] is None, "no store"
    assert rows["offload", 1.0]["hit_rate"] is None, "resident: the store is not asked"
    assert quarter["stall_share"] > 0
    assert rows["resident", 1.0]["stall_share"] == 0


def test_policies_are_ranked_in_one_run(
    tiny_olmoe: Path, tiny_traces: dict[str, Path], tmp_path: Path
) -> None:
    data = RoutingDataModule(tiny_traces["olmoe_decode"], phase="decode", use_hidden=False)
    checkpoint = save_predictor(data, tmp_path / "predictor.ckpt")
    policies = [name for name in WAYS if ":" in name]
    settings = quick(
        tiny_olmoe,
        variants=["resident", *policies],
        checkpoints=[str(checkpoint)],
        residency=[0.25, 1.0],
        new_tokens=40,
        prompt_tokens=4,
    )
    found = live(settings, shape(), tmp_path)
    rows = {(row["variant"], row["residency"]): row for row in found["rows"]}
    assert set(rows) == {
        ("resident", 1.0),
        ("offload:lru", 1.0),
        *((name, 0.25) for name in policies),
    }
    assert all(row["logits_equal"] for row in rows.values()), "a policy changes no value"
    for name in policies:
        row = rows[name, 0.25]
        assert row["slots"] == 8
        assert row["demand_bytes"] > 0
        assert row["against_lru"] > 0
        foresees = WAYS[name].predicts or WAYS[name].routers
        assert (row["prefetch_bytes"] > 0) or not foresees or WAYS[name].eviction == "priced", name
        assert foresees or row["prefetch_bytes"] == 0, name
    assert rows["offload:lru", 0.25]["against_lru"] == 1.0
    assert rows["resident", 1.0]["against_lru"] is None
    (ranking,) = [table for table in tables_of(found) if table.title.startswith("Policies by speed")]
    speeds = [rows[row[1], 0.25]["tokens_per_second"] for row in ranking.rows]
    assert len(speeds) == len(policies)
    assert speeds == sorted(speeds, reverse=True)


def test_generation_is_what_transformers_generates(tiny_olmoe: Path) -> None:
    settings = quick(tiny_olmoe)
    _, prompt = read_prompts(str(tiny_olmoe), settings)
    assert prompt.ids_1T.shape == (1, 12)
    model: Any = load_host(str(tiny_olmoe), device="cpu").model
    found = generate(model, prompt, 5, CPU, forced=False)
    ids = prompt.ids_1T
    steps = []
    for _ in range(5):  # without a cache, one token after the other
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, 1] = -torch.inf  # the end of the text is put off
        steps.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[steps[-1]]])], dim=1)
    assert found.tokens == steps
    assert len(found.each) == 4
    assert found.window[1] - found.window[0] == pytest.approx(1e9 * sum(found.each), rel=1e-6)
    other = generate(model, prompt, 5, CPU, forced=True)
    assert other.tokens == prompt.next_T, "the document goes on"
    assert generate(model, prompt, 5, CPU, forced=True).digest == other.digest
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 1e-3
    assert generate(model, prompt, 5, CPU, forced=True).digest != other.digest


def test_switch_generates_too(tiny_switch: Path, tmp_path: Path) -> None:
    settings = quick(tiny_switch, variants=["resident", "on_demand", "offload", "accelerate_cpu"])
    rows = live(settings, shape(), tmp_path)["rows"]
    assert [row["slots"] for row in rows] == [24, 1, 12, 0]
    assert all(row["tokens_equal"] for row in rows)
    assert all(row["logits_equal"] for row in rows[:3])


def test_waiting_is_watched_and_left_alone(tiny_olmoe: Path, tmp_path: Path) -> None:
    settings = quick(tiny_olmoe)
    warmup, prompt = read_prompts(str(tiny_olmoe), settings)
    budget = Budget("on_demand", 0.0, 2, plan_of(tiny_olmoe).budget_for(2))
    with opened(budget, str(tiny_olmoe), settings, CPU, "float32", tmp_path) as model:
        generate(model, warmup, 2, CPU, False)
        store = model.specgate.store
        before = store.stats()["acquires"]
        with Watched(model, CPU) as watch:
            found = generate(model, prompt, 5, CPU, False)
        assert "acquire" not in vars(store), "nothing is left of it"
        assert len(watch.waits) == store.stats()["acquires"] - before
        assert all(begin <= end for begin, end in watch.waits)
        inside = [span for span in watch.waits if span[0] >= found.window[0] and span[1] <= found.window[1]]
        assert len(inside) == 4 * 4, "a call for each of the four layers of each further token"


@pytest.mark.gpu
def test_on_a_gpu(tiny_olmoe: Path, tmp_path: Path) -> None:
    settings = quick(tiny_olmoe, device="cuda", variants=[n for n in NAMES if n != "offload_predictor"])
    rows = live(settings, shape(), tmp_path)["rows"]
    assert all(row["tokens_equal"] for row in rows)
    assert all(row["device_peak"] > 0 for row in rows)


# ---------------------------------------------------------------------- models of random weights


def test_wide_model_has_the_shape_and_reads_the_text(tmp_path: Path) -> None:
    made = shape(vocab_size=8192)
    folder = save_wide(made, tmp_path / "wide", CPU, seed=0)
    host = load_host(str(folder), device="cpu")
    experts: Tensor = host.model.model.layers[0].mlp.experts.gate_up_proj  # type: ignore[union-attr,assignment]
    assert tuple(experts.shape) == (8, *made.pieces["gate_up_proj"])
    again = save_wide(made, tmp_path / "again", CPU, seed=0)
    other = save_wide(made, tmp_path / "other", CPU, seed=1)
    weights = [(f / "model.safetensors").read_bytes() for f in (folder, again, other)]
    assert weights[0] == weights[1] != weights[2]
    settings = quick("wide", new_tokens=8)
    prompts = read_prompts(str(folder), settings)
    assert len({p.name for p in prompts}) == 2
    assert all(p.ids_1T.shape == (1, 12) and len(p.next_T) == 8 for p in prompts)
    with pytest.raises(ConfigError, match=r"64 token ids and the text needs 8192; set shape\.config"):
        save_wide(shape(), tmp_path / "small", CPU, seed=0)


def test_wide_model_is_forced_along_the_text(tmp_path: Path) -> None:
    made = ModelShape("tiny", dict(shape().config) | {"vocab_size": 8192}, "float32")
    found = live(quick("wide", variants=["resident", "offload"]), made, tmp_path)
    assert found["model"] == "tiny"
    assert found["live"]["forced"]
    assert found["live"]["random_weights"]
    assert all(row["logits_equal"] for row in found["rows"])


# ---------------------------------------------------------------------- what is shown


def test_everything_is_shown(record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specgate.report.canvas.DPI", 40)
    console = Console(record=True, width=132, file=open(os.devnull, "w"))  # noqa: SIM115
    page = publish(record, tmp_path, console)
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    printed = console.export_text()
    for words in (
        "offload_predictor",
        "Prompts and values",
        "same logits",
        "accelerate's disk offload",
        "perfetto",
    ):
        assert words in printed
    assert "bit for bit" in page.read_text()
    shown = {t["variant"] for t in record["timelines"]}
    assert {"on_demand", "offload", "offload_predictor", "offload_file"} <= shown
    for one in record["timelines"]:
        assert json.loads((record["folder"] / one["file"]).read_text())["traceEvents"]


def test_results_page_is_made_from_what_is_stored(record: dict[str, Any], tmp_path: Path) -> None:
    kept = {key: value for key, value in record.items() if key != "folder"}
    write_json(tmp_path / "run" / "metrics.json", kept)
    page = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "run")]).read_text()
    name = f"benchmark-live-{record['model']}"
    assert f"## {name}" in page
    assert "| offload_predictor | 25 |" in page
    assert "timelines" not in json.loads((tmp_path / "docs" / "results" / f"{name}.json").read_text())
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == page


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"variants": ["offload", "magic"]}, ConfigError, "names magic; choose among resident, on_demand"),
        ({"variants": []}, ConfigError, "each variant once, and some"),
        ({"variants": ["offload_predictor"]}, ConfigError, "need a predictor; name its run in checkpoints"),
        (
            {"residency": [0.03]},
            BudgetError,
            "residency=0.03 holds 1 of the 32 .* needs 2; the least is 0.0625",
        ),
        ({"residency": [0]}, ConfigError, "no shares"),
        ({"checkpoints": ["/nowhere.ckpt"]}, CheckpointError, "/nowhere.ckpt does not exist"),
        ({"text": "loud"}, ConfigError, "text=loud; choose one of auto, own, forced"),
        ({"dtype": "int8"}, ConfigError, "dtype=int8; choose one of auto"),
        ({"new_tokens": 1}, ConfigError, "new_tokens=1 is too small; write 2 or more"),
        ({"domains": ["mars"]}, SpecgateError, "Unknown text domain 'mars'"),
        ({"prompt_tokens": 10**6}, ConfigError, "0 test documents of the bundled text have 1000005 tokens"),
        ({"eviction": "magic"}, SpecgateError, "eviction=.?magic"),
        ({"model": "nobody/nowhere/else"}, CheckpointError, "does not exist; give a model directory"),
        ({"packed": "/nowhere.experts"}, StoreError, "/nowhere.experts cannot be opened"),
    ],
)
def test_mistakes_are_one_sentence(
    change: dict[str, Any], error: type[SpecgateError], message: str, tiny_olmoe: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        live(quick(**({"model": tiny_olmoe} | change)), shape(), tmp_path)
    assert "\n" not in str(caught.value)


def test_offloaded_models_must_agree() -> None:
    resident, offloaded = Budget("resident", 1.0), Budget("offload", 0.5, 16, 1.0)
    wrong = {"tokens_equal": True, "logits_equal": False}
    with pytest.raises(StoreError, match=r"offload@0.5 gave other logits than resident@1"):
        check(offloaded, resident, wrong, "none")
    check(offloaded, resident, wrong, "int8")
    check(Budget("accelerate_cpu", 1.0), resident, wrong, "none")
    check(offloaded, resident, {"tokens_equal": True, "logits_equal": True}, "none")


def test_interruption_keeps_what_is_done(
    tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quick(tiny_olmoe, variants=["resident", "offload"])
    plain, calls = Live.measure, []

    def measure(self: Live, budget: Budget, watched: bool) -> dict[str, Any]:
        calls.append(budget.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, budget, watched)

    monkeypatch.setattr(Live, "measure", measure)
    with pytest.raises(SystemExit):
        live(settings, shape(), tmp_path / "first")
    assert len(json.loads((tmp_path / "first" / "partial.json").read_text())["measured"]) == 2
    found = live(replace(settings, resume=str(tmp_path / "first")), shape(), tmp_path / "second")
    assert calls[3:] == calls[2:3] + calls[4:]
    assert len(calls) == 5
    assert found["live"]["resumed"] == 2


def test_budgets_name_the_least(tiny_olmoe: Path) -> None:
    plan = plan_of(tiny_olmoe)
    found = budgets(quick(tiny_olmoe, residency=[0.25, 1.0]), plan, None, "m")
    assert [(b.name, b.slots) for b in found if b.gb is not None] == [
        ("on_demand", 2),
        ("offload", 8),
        ("offload", 32),
        ("offload_file", 8),
    ]
    for budget in found:
        if budget.gb is not None:
            assert (budget.gb * 1e9 - plan.fixed) // plan.slot >= budget.slots
