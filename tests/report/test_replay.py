"""mode=replay: every variant computes what a model computes, moves what its policy says, and is shown."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from specgate.calibration.load import load_predictor
from specgate.errors import BudgetError, CheckpointError, ConfigError, SpecgateError, StoreError
from specgate.report.modes import run_mode
from specgate.report.publish import publish
from specgate.report.record import Run, read_record, write_json
from specgate.report.replay import Replay, replay
from specgate.report.replay_body import Body, SlotExperts
from specgate.report.replay_run import Runner
from specgate.report.replay_settings import VARIANTS, ReplaySettings
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_steps import BodyGraphs, Captured, OneByOne, Steps
from specgate.report.replay_store import RandomBlocks, Stores
from specgate.report.replay_trace import Document, load_documents, make_plans
from specgate.report.results import make
from specgate.runtime import codecs, native
from specgate.runtime.store import StoreSettings
from specgate.traces.datamodule import RoutingDataModule
from tests.report.replays import GPT_OSS, E, K, L, data_of, quick, save_predictor, shape, write_decode_trace
from tests.test_configs import CONF

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decode_trace(tmp_path_factory.mktemp("replay") / "trace")


@pytest.fixture(scope="module")
def checkpoint(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictor(data_of(trace), tmp_path_factory.mktemp("replay") / "predictor.ckpt")


@pytest.fixture(scope="module")
def record(trace: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all variants, through benchmark.py's own table of modes."""
    folder = tmp_path_factory.mktemp("run")
    settings: Any = OmegaConf.load(CONF / "benchmark.yaml")
    settings.paths = {"run": str(folder)}
    settings.shape = OmegaConf.load(CONF / "shape" / "tiny.yaml")
    settings.checkpoints = [str(checkpoint)]
    few = vars(quick(variants=list(VARIANTS), repeats=2)) | {"checkpoints": [str(checkpoint)], "lookahead": 2}
    settings.replay.update(few)
    found = run_mode("replay", settings, {"tiny": data_of(trace)}, None, Console(quiet=True))
    Run("benchmark.py").write(folder, **found)
    return read_record(folder) | {"folder": folder}


# ---------------------------------------------------------------------- what is computed and moved


def by_hand(body: Body, blocks: RandomBlocks, document: Document, family: str) -> Tensor:
    """The residual stream after a document, one expert at a time in plain torch."""

    def unit(x: Tensor) -> Tensor:
        return x * (x.pow(2).mean() + torch.finfo(x.dtype).eps).rsqrt()

    hidden = body._start_1D[0]
    scratch = torch.empty(blocks.layout.block_bytes, dtype=torch.uint8)
    for t, token in enumerate(document.experts_TLK):
        for layer, chosen in enumerate(token):
            hidden = unit(hidden + (body.dense_LMD[layer] @ hidden)[: len(hidden)])
            total = torch.zeros_like(hidden)
            for k, e in enumerate(chosen):
                w = codecs.decode_block(blocks.layout, blocks.write(layer * E + e, scratch))
                if family == "gpt_oss":
                    both = hidden @ w["gate_up_proj"] + w["gate_up_proj_bias"]
                    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                    out = ((up + 1) * gate * (1.702 * gate).sigmoid()) @ w["down_proj"] + w["down_proj_bias"]
                else:
                    gate, up = (w["gate_up_proj"] @ hidden).chunk(2)
                    out = w["down_proj"] @ (F.silu(gate) * up)
                total = total + out * document.weights_TLK[t, layer, k]
            hidden = unit(hidden + total)
    return hidden


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_all_variants_compute_what_the_model_computes(
    family: str, device: str, trace: Path, checkpoint: Path
) -> None:
    made = shape() if family == "olmoe" else ModelShape("oss", GPT_OSS, "float32")
    place, blocks = torch.device(device), RandomBlocks(made)
    (document,) = load_documents(data_of(trace), "test", 1, 4, load_predictor(checkpoint))
    make_plans([document], 2, {"forecast": 0.2})
    body = Body(made, place, head=False)
    graphs = BodyGraphs(body, L, K, L * len(document))
    digests, hidden = set(), {}
    with Stores(blocks, place) as stores:
        for (name, kind), captured in product(VARIANTS.items(), (False, True)):
            slots = {"event": K, "all": L * E}.get(kind.slots, 5)
            with stores.open(slots, StoreSettings(eviction=kind.eviction, poison=True)) as store:
                if kind.eviction == "belady":
                    store.set_future(document.events())
                kernels = SlotExperts(made, {n: store.arena(n) for n in made.pieces})
                everything, ahead = kind.slots == "all", kind.eviction != "lru"  # the values are the same
                body.restart()
                steps: Steps = OneByOne(body, kernels, ahead)
                if captured:
                    steps = Captured(graphs, kernels, everything)
                Runner(steps, store, made.torch_dtype, kind.foresight, everything).run(document)
                digests.add(body.digest())
                hidden[name] = body.hidden_1D[0].cpu()
                del kernels, steps
    assert len(digests) == 1
    on_cpu = Body(made, place, head=False)
    on_cpu.dense_LMD, on_cpu._start_1D = [m.cpu() for m in body.dense_LMD], body._start_1D.cpu()
    torch.testing.assert_close(hidden["lru"], by_hand(on_cpu, blocks, document, family), rtol=2e-3, atol=2e-3)


def lru_hits(events: list[tuple[int, list[int]]], slots: int, skip: int) -> int:
    """Hits of a least-recently-used cache after ``skip`` events; what a call needs itself does not go."""
    held: list[tuple[int, int]] = []  # the one used longest ago first; those of one call by number
    hits = 0
    for i, (layer, experts) in enumerate(events):
        wanted = [(layer, e) for e in sorted(experts)]
        missing = [one for one in wanted if one not in held]
        hits += len(wanted) - len(missing) if i >= skip else 0
        others = [one for one in held if one not in wanted]
        held = others[max(0, len(others) + len(wanted) - slots) :] + wanted
    return hits


def test_bytes_and_hits_are_those_of_the_policy(record: dict[str, Any], trace: Path) -> None:
    rows = {(row["variant"], row["residency"]): row for row in record["rows"]}
    tokens, block = 6, shape().layout().block_bytes
    assert rows["on_demand", 0.0]["hit_rate"] == 0
    assert rows["on_demand", 0.0]["demand_bytes"] == L * K * block, "every expert of every token"
    documents = load_documents(data_of(trace), "test", 2, tokens)
    events = [event for document in documents for event in document.events()]
    hits = lru_hits(events, 8, skip=tokens * L)
    row = rows["lru", 0.25]
    assert row["hit_rate"] == pytest.approx(hits / (tokens * L * K))
    assert row["demand_bytes"] == pytest.approx((1 - row["hit_rate"]) * L * K * block)
    assert rows["belady", 0.25]["hit_rate"] >= row["hit_rate"]
    assert rows["lru", 1.0]["hit_rate"] == 1.0, "everything was loaded before"
    assert rows["resident", 1.0]["hit_rate"] is None, "the store is not asked"
    oracle = rows["oracle", 0.25]
    assert oracle["prefetch_bytes"] > 0
    assert oracle["wasted_bytes"] == 0
    assert oracle["demand_bytes"] <= rows["belady", 0.25]["demand_bytes"]
    wrong = rows["lru_forecast", 0.25]
    assert wrong["prefetch_bytes"] > 0
    assert wrong["wasted_bytes"] > 0, "an untrained predictor wastes"


def test_rows_are_complete(record: dict[str, Any]) -> None:
    assert len(record["rows"]) == 2 + 2 * 9, "nine variants know two budgets, two none"
    for row in record["rows"]:
        assert row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
        assert row["ms_p50"] <= row["ms_p95"]
        assert row["tokens"] == 12
        parts = row["compute_share"] + row["stall_share"] + row["other_share"]
        assert parts == pytest.approx(1.0, abs=0.02)
        assert row["copies_hidden"] is None or 0 <= row["copies_hidden"] <= 1
        assert row["against_on_demand"] > 0
        assert row["joules_per_token"] is None, "a CPU has no counter"
        assert row["host_peak"] > row["host_bytes"] > 0
    assert record["replay"]["energy"] is False
    assert record["replay"]["predictor"] == "mlp"
    assert not (record["folder"] / "partial.json").exists(), "everything is in metrics.json"


# ---------------------------------------------------------------------- what is shown


def test_everything_is_shown(record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specgate.report.canvas.DPI", 40)
    console = Console(record=True, width=132, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    page = publish(record, tmp_path, console)
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {
        f"tiny-{k}.png" for k in ("speed", "time", "timeline")
    }
    printed = console.export_text()
    for words in (
        "on_demand",
        "lru_forecast",
        "Bytes per token",
        "ui.perfetto.dev",
        "against the resident model",
    ):
        assert words in printed
    assert "scaling fitted" not in page.read_text()
    for shown in record["timelines"]:
        events = json.loads((record["folder"] / shown["file"]).read_text())["traceEvents"]
        spans = [event for event in events if event["ph"] == "X"]
        assert spans
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
        assert set(shown["timeline"]) <= {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    lanes = {shown["variant"]: set(shown["timeline"]) for shown in record["timelines"]}
    assert lanes["resident"] == {"dense", "experts"}
    assert "copy, demand" in lanes["on_demand"]


def test_results_page_is_made_from_what_is_stored(record: dict[str, Any], tmp_path: Path) -> None:
    kept = {key: value for key, value in record.items() if key != "folder"}
    write_json(tmp_path / "run" / "metrics.json", kept)
    page = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "run")]).read_text()
    assert "## benchmark-replay-tiny" in page
    assert "| lru_forecast | 25 |" in page
    stored = (tmp_path / "docs" / "results" / "benchmark-replay-tiny.json").read_text()
    assert "timeline" not in json.loads(stored)
    assert str(record["folder"]) not in stored
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == page


# ---------------------------------------------------------------------- other tiers, interruptions, mistakes


@pytest.mark.parametrize("host", [0.0, 0.5])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_file_tier_gives_the_same_values(codec: str, host: float, trace: Path, tmp_path: Path) -> None:
    settings = quick(variants=["lru", "resident"], residency=[0.25], codec=codec)
    digests = set()
    for changes in ({}, {"tier": "file", "host": host}):
        run = Replay(replace(settings, **changes), shape(), "t", data_of(trace), tmp_path)
        rows = run.run()["rows"]
        with Stores(RandomBlocks(shape(), codec), CPU, run.settings.tier, tmp_path, host) as stores:
            body = Body(shape(), CPU)
            digests |= {run.measure(entry, stores, body, False)["digest"] for entry in run.entries}
        assert (rows[0]["read_bytes"] > 0) == bool(changes)
    assert len(digests) == 1
    assert not list(tmp_path.glob("*.experts*")), "the packed file is gone"


def test_interrupted_run_goes_on(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(variants=["on_demand", "lru"])
    plain, calls = Replay.measure, []

    def measure(self: Replay, *args: Any) -> dict[str, Any]:
        calls.append(args[0].key)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args)

    monkeypatch.setattr(Replay, "measure", measure)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.raises(SystemExit) as stop:
        replay(settings, shape(), {"t": data_of(trace)}, tmp_path / "first", console)
    assert stop.value.code == 130
    assert (
        f"3 of 6 measurements are kept; repeat the command with replay.resume={tmp_path}"
        in console.export_text()
    )
    del calls[:]
    monkeypatch.setattr(Replay, "measure", plain)
    with pytest.raises(ConfigError, match="measured with other settings"):
        replay(
            replace(settings, tokens=5, resume=str(tmp_path / "first")),
            shape(),
            {"t": data_of(trace)},
            tmp_path,
        )
    with pytest.raises(ConfigError, match=r"holds no partial\.json"):
        replay(replace(settings, resume=str(tmp_path)), shape(), {"t": data_of(trace)}, tmp_path)
    again = replace(settings, resume=str(tmp_path / "first"))
    found = replay(again, shape(), {"t": data_of(trace)}, tmp_path / "second")
    assert found["replay"]["resumed"] == 3
    assert len(found["rows"]) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"variants": ["lru", "magic"]},
            ConfigError,
            "replay.variants names magic; choose among on_demand, lru",
        ),
        ({"variants": ["lru", "lru"]}, ConfigError, "each variant once"),
        ({"variants": ["lru:0.5"]}, ConfigError, "names lru:0.5, and lru has no threshold"),
        ({"variants": ["forecast:2"]}, ConfigError, "names forecast:2; after the colon comes a probability"),
        ({"variants": ["forecast"]}, ConfigError, "need a predictor; name its run in checkpoints"),
        (
            {"residency": [0.03]},
            BudgetError,
            r"residency=0.03 holds 1 of the 32 .* needs 2; the least is 0.0625",
        ),
        ({"residency": [1.5]}, ConfigError, "no shares"),
        ({"residency": []}, ConfigError, "no shares"),
        ({"checkpoints": ["a", "b"]}, ConfigError, "names 2 predictors; name one"),
        ({"checkpoints": ["/nowhere.ckpt"]}, CheckpointError, "/nowhere.ckpt does not exist"),
        ({"threshold": 2.0}, ConfigError, "threshold=2.0 is no probability"),
        ({"codec": "int3"}, ConfigError, "codec=int3 is unknown"),
        ({"tier": "tape"}, ConfigError, "tier=tape; choose memory or file"),
        ({"host": 2.0}, ConfigError, "host=2.0 is no share"),
        ({"kernels": "eager"}, ConfigError, "kernels=eager; choose batched_mm or grouped_mm"),
        ({"tokens": 0}, ConfigError, "tokens=0 is too small; write 1 or more"),
        ({"split": "all"}, ConfigError, "split=all is unknown"),
        ({"documents": 50}, ConfigError, "and 51 are asked for; choose fewer"),
        ({"device": "cuda:99" if torch.cuda.is_available() else "cuda"}, SpecgateError, "."),
    ],
)
def test_mistakes_are_one_sentence(
    change: dict[str, Any], error: type[SpecgateError], message: str, trace: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        replay(quick(**change), shape(), {"t": data_of(trace)}, tmp_path)
    assert "\n" not in str(caught.value)


def test_one_trace_at_a_time(trace: Path, tmp_path: Path) -> None:
    both = {"a": data_of(trace), "b": data_of(trace)}
    with pytest.raises(ConfigError, match="data= names a, b; name one"):
        replay(quick(), shape(), both, tmp_path)
    missing = RoutingDataModule(tmp_path / "nowhere", phase="decode")
    with pytest.raises(SpecgateError, match="There is no trace at"):
        replay(quick(), shape(), {"a": missing}, tmp_path)


def test_other_values_are_an_error(record: dict[str, Any]) -> None:
    from specgate.report.replay_rows import check_values

    check_values({(0, "lru@1"): {"digest": "a"}, (0, "resident@1"): {"digest": "a"}})
    with pytest.raises(StoreError, match="other values with resident@1 than with lru@1"):
        check_values({(0, "lru@1"): {"digest": "a"}, (0, "resident@1"): {"digest": "b"}})


def test_grouped_kernels_know_their_limit() -> None:
    with pytest.raises(ConfigError, match="takes 1023 slots at most and there are 1024"):
        SlotExperts(shape(), {"down_proj": torch.empty(1024, 1)}, "grouped_mm")
    assert ReplaySettings().kernels == "batched_mm"
