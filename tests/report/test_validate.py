"""The simulator against a replay: it decides as the store does, and what is said of the times adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from specgate.errors import ConfigError
from specgate.policy.hardware import save
from specgate.policy.operations import operations_of
from specgate.policy.roofline import RUNTIMES
from specgate.report import validate as command
from specgate.report.modes import run_mode
from specgate.report.record import Run, read_record, write_json
from specgate.report.replay_body import Body, SlotExperts
from specgate.report.replay_settings import VARIANTS, ReplaySettings
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_steps import BodyGraphs, Captured
from specgate.report.results import make
from specgate.report.validate import main, order_kept, summary_of, validate
from specgate.report.validate_costs import (
    ADD_OPERATIONS,
    ATTEND_OPERATIONS,
    FINISH_OPERATIONS,
    expert_operations,
    runtime_of,
    sizes_of_replay,
)
from specgate.runtime import native
from tests.policy.machines import machine
from tests.report.replays import CONFIG, GPT_OSS, E, L, data_of, quick, save_predictor, write_decode_trace
from tests.test_configs import CONF

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
SHARES = [0.125, 0.25, 0.5, 0.75, 1.0]
#: Decisions of these do not hang on what time it is.
TIMELESS = ("on_demand", "lru", "lfu", "static", "belady")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A replay of every variant at five residencies, its script, and a profile of a machine."""
    base = tmp_path_factory.mktemp("validate")
    data = data_of(write_decode_trace(base / "trace"))
    checkpoint = save_predictor(data, base / "predictor.ckpt")
    settings: Any = OmegaConf.load(CONF / "benchmark.yaml")
    settings.paths = {"run": str(base / "run")}
    settings.shape = OmegaConf.load(CONF / "shape" / "tiny.yaml")
    settings.checkpoints = [str(checkpoint)]
    more = {"variants": list(VARIANTS), "residency": SHARES, "documents": 2, "repeats": 1, "lookahead": 2}
    few = vars(quick(**more)) | {"checkpoints": [str(checkpoint)], "script": str(base / "tiny.safetensors")}
    settings.replay.update(few)
    found = run_mode("replay", settings, {"tiny": data}, None, Console(quiet=True))
    Run("benchmark.py", settings).write(base / "run", **found)
    save(machine(operation_us=5, readback_us=2, upload_us=3, ahead=False), base / "local.yaml")
    return base


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    hardware = machine(operation_us=5, readback_us=2, upload_us=3, ahead=False)
    return validate([read_record(folder / "run")], folder / "tiny.safetensors", hardware)


def test_the_simulator_decides_as_the_store_did(record: dict[str, Any]) -> None:
    """Hits and bytes are counted by the store's own ledger, and by the simulator's."""
    rows = [row for row in record["rows"] if row["variant"] in TIMELESS]
    assert {row["residency"] for row in rows} == {0.0, *SHARES}
    for row in rows:
        where = (row["variant"], row["residency"])
        assert row["profile_hit_rate"] == pytest.approx(row["measured_hit_rate"], abs=1e-12), where
        assert row["profile_demand_bytes"] == pytest.approx(row["measured_demand_bytes"]), where
    hits = {(row["variant"], row["residency"]): row["measured_hit_rate"] for row in rows}
    assert 0 < hits["lru", 0.25] < hits["lru", 0.5] < 1, "or equal numbers would say nothing"
    assert hits["lru", 0.25] != hits["lfu", 0.25] != hits["static", 0.25]
    for row in record["rows"]:
        if row["variant"] == "lfru":  # decayed by events in the store, by steps in the simulator
            assert row["profile_hit_rate"] == pytest.approx(row["measured_hit_rate"], abs=0.05)


def test_forecasts_are_those_that_were_asked_for(record: dict[str, Any]) -> None:
    """What the oracle fetches ahead covers all that is missing, in both."""
    for row in record["rows"]:
        if row["variant"] in ("oracle", "forecast", "lru_forecast") and row["residency"] < 0.75:
            assert row["measured_prefetch_bytes"] > 0
            assert row["profile_prefetch_bytes"] > 0


def test_rows_with_everything_on_the_device_have_no_copies(record: dict[str, Any]) -> None:
    full = [row for row in record["rows"] if row["all_hits"]]
    assert {row["variant"] for row in full} == set(VARIANTS) - {"on_demand", "resident"}
    for row in full:
        assert row["measured_hit_rate"] == row["profile_hit_rate"] == 1
        assert row["by_rows"] == pytest.approx(row["measured"]), "made from itself"


def test_every_row_is_predicted_or_listed(record: dict[str, Any], folder: Path) -> None:
    measured = {(row["variant"], row["residency"]) for row in read_record(folder / "run")["rows"]}
    predicted = {(row["variant"], row["residency"]) for row in record["rows"]}
    left = {(row["variant"], row["residency"]) for row in record["skipped"]}
    assert predicted | left == measured
    assert not predicted & left
    assert left == {("resident", 1.0)}
    assert "launches ahead of the device" in record["skipped"][0]["reason"]


def test_rows_with_forecasts_have_their_hand_over_and_no_others_do(record: dict[str, Any]) -> None:
    assert record["handover"] == "read", "the replay ran here"
    for row in record["rows"]:
        ahead = VARIANTS[row["variant"]].foresight is not None
        assert (row["handover"] is not None) == ahead
        assert not ahead or 0 < row["handover"]["us"] < 1e4


def test_a_slow_hand_over_and_slower_launches_leave_rows_without_forecasts_as_they_are(folder: Path) -> None:
    run, script = read_record(folder / "run"), folder / "tiny.safetensors"
    run["rows"] = [r for r in run["rows"] if r["residency"] in (0.25, 1.0) and r["variant"] != "resident"]
    own = {"operation_us": 5, "readback_us": 2, "upload_us": 3, "send_us": 1}
    usual = validate([run], script, machine(**own), 0.0)
    slow = validate([run], script, machine(**own, launch_slowdown=0.5), 400.0)
    assert (slow["handover"], slow["profile"]["launch_slowdown"]) == ("given", 0.5)
    for before, after in zip(usual["rows"], slow["rows"], strict=True):
        where = (before["variant"], before["residency"])
        if before["handover"] is None:
            assert after["by_profile"] == before["by_profile"], where
        else:
            assert after["by_profile"] < 0.9 * before["by_profile"], where


def test_the_summary_leaves_out_what_it_was_made_from(record: dict[str, Any]) -> None:
    rows = record["rows"]
    full = sum(row["all_hits"] for row in rows)
    assert record["summary"]["profile"]["rows"] == len(rows)
    assert record["summary"]["rows"]["rows"] == len(rows) - full
    worst = max(abs(row["by_profile"] / row["measured"] - 1) for row in rows)
    assert record["summary"]["profile"]["worst"] == pytest.approx(worst)


def row(
    variant: str, residency: float, measured: float, predicted: float | None, **more: Any
) -> dict[str, Any]:
    ratio = None if predicted is None else predicted / measured
    values = {"variant": variant, "residency": residency, "measured": measured, "all_hits": False, "run": 0}
    values |= {"measured_low": measured - 0.1, "measured_high": measured + 0.1}
    return values | {"by_profile": predicted, "ratio_profile": ratio} | more


def test_a_summary_by_hand() -> None:
    rows = [row("lru", 0.25, 10, 10.5), row("lfru", 0.25, 20, 17), row("oracle", 0.5, 40, 43.6)]
    found = summary_of(rows, "profile")
    assert found is not None
    assert (found["rows"], found["within"], found["worst_row"]) == (3, 2, "lfru at 25 %")
    assert found["worst"] == pytest.approx(0.15)
    assert found["mean"] == pytest.approx((0.05 + 0.15 + 0.09) / 3)
    assert found["order"] == 1, "one pair at one budget, in order"
    assert summary_of([row("lru", 0.25, 10, None)], "profile") is None


def test_orders_count_only_what_was_measured_apart() -> None:
    close = [row("lru", 0.25, 10, 9), row("lfru", 0.25, 10.1, 8)]
    assert order_kept(close, "profile") is None
    wrong = [row("lru", 0.25, 10, 9), row("lfru", 0.25, 11, 8), row("oracle", 0.25, 12, 10)]
    assert order_kept(wrong, "profile") == pytest.approx(2 / 3)


def test_a_script_of_another_trace_is_refused(folder: Path) -> None:
    other = read_record(folder / "run")
    other["traces"][0]["sha256"] = ["0" * 64]
    with pytest.raises(ConfigError, match="of another trace than the run"):
        validate([other], folder / "tiny.safetensors", machine())


def test_runs_that_differ_are_refused(folder: Path) -> None:
    one, other = read_record(folder / "run"), read_record(folder / "run")
    other["config"]["replay"]["tokens"] = 5
    with pytest.raises(ConfigError, match=r"replay\.tokens of 5 and 6; validate them one by one"):
        validate([one, other], folder / "tiny.safetensors", machine())
    del other["config"]["replay"]
    with pytest.raises(ConfigError, match="does not say how it was replayed"):
        validate([other], folder / "tiny.safetensors", machine())
    with pytest.raises(ConfigError, match="no replay; give runs of"):
        validate([other | {"mode": "live"}], folder / "tiny.safetensors", machine())


# ---------------------------------------------------------------------- operations


def body_of(config: dict[str, Any], **more: Any) -> tuple[ModelShape, Body]:
    shape = ModelShape("tiny", config, "float32")
    return shape, Body(shape, torch.device("cpu"), **more)


@pytest.mark.parametrize("config", [CONFIG, GPT_OSS], ids=["olmoe", "gpt_oss"])
def test_operations_of_the_replay_are_those_that_are_counted(config: dict[str, Any]) -> None:
    shape, body = body_of(config)
    arenas = {name: torch.zeros(4, *size) for name, size in shape.pieces.items()}
    experts = SlotExperts(shape, arenas)
    slots_1K, weights_1K = torch.tensor([[0, 3]]), torch.ones(1, 2)
    with torch.inference_mode():
        assert operations_of(lambda: body.attend(0)) == ATTEND_OPERATIONS
        assert operations_of(lambda: body.add(body.hidden_1D)) == ADD_OPERATIONS
        assert operations_of(body.finish) == FINISH_OPERATIONS
        mine = operations_of(lambda: experts(body.hidden_1D, slots_1K, weights_1K))
    assert expert_operations(shape, "batched_mm") == mine


@pytest.mark.parametrize("config", [CONFIG, GPT_OSS], ids=["olmoe", "gpt_oss"])
def test_operations_of_graphs_are_those_that_are_counted(config: dict[str, Any]) -> None:
    shape, body = body_of(config)
    arenas = {name: torch.zeros(4, *size) for name, size in shape.pieces.items()}
    runtime = runtime_of(shape, ReplaySettings(), graphs=True)
    graphs = BodyGraphs(body, shape.layers, shape.top_k, shape.layers)
    captured = Captured(graphs, SlotExperts(shape, arenas))
    with torch.inference_mode():
        assert operations_of(lambda: captured.attend(0, 0)) == runtime.dense_launches
        assert operations_of(lambda: captured.experts(0, 0)) == runtime.expert_launches
    assert runtime.graphs


def test_the_runtime_of_gpt_oss_is_the_known_one() -> None:
    shape, _ = body_of(GPT_OSS)
    assert runtime_of(shape, ReplaySettings()) == RUNTIMES["replay"]
    bare = runtime_of(shape, ReplaySettings(dense=False, head=False))
    assert (bare.dense_launches, bare.step_launches) == (ADD_OPERATIONS, FINISH_OPERATIONS - 1)
    _, body = body_of(GPT_OSS, dense=False, head=False)
    with torch.inference_mode():
        assert operations_of(lambda: body.attend(0)) == 0
        assert operations_of(body.finish) == FINISH_OPERATIONS - 1


def test_the_dense_part_is_as_large_as_the_replay_s() -> None:
    shape, body = body_of(GPT_OSS)
    sizes = sizes_of_replay(shape, ReplaySettings())
    dense = [matrix.numel() for matrix in body.dense_LMD]
    assert list(sizes.stretch_parameters) == dense
    assert body.head_VD is not None
    assert sizes.step_parameters == body.head_VD.numel()
    assert (sizes.layers, sizes.experts) == (L, E)


# ---------------------------------------------------------------------- the command


def test_the_command_shows_and_stores_everything(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "run"), "--script", str(folder / "tiny.safetensors")]
    words += ["--hardware", str(folder / "local.yaml"), "--out", str(tmp_path / "out")]
    assert main([*words, "--handover-us", "12.5"]) == 0
    shown = capsys.readouterr().out
    assert "launches 0.0% longer beside copies" in " ".join(shown.split())
    assert "takes the host 12.5 us (given)" in " ".join(shown.split())
    assert shown.strip().splitlines()[-1] == str(tmp_path / "out" / "metrics.json")
    assert "resident (100 %) is not simulated" in " ".join(shown.split())
    assert (tmp_path / "out" / "plots" / "validate-tiny.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "report.html").is_file()
    found = read_record(tmp_path / "out")
    assert found["command"].startswith("python -m specgate.report.validate")
    assert "readings" not in found["profile"]
    page = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "out")]).read_text()
    assert "images/validate-tiny.png" in page
    assert (tmp_path / "docs" / "images" / "validate-tiny.png").is_file()
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == page
    for one in found["rows"]:
        assert f"| {one['ratio_profile']:.3f} |" in page


def test_a_run_without_an_all_hits_row_is_predicted_by_the_profile_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_record(folder / "run")
    run["rows"] = [one for one in run["rows"] if one["residency"] != 1.0]
    write_json(tmp_path / "part" / "metrics.json", run)
    words = [str(tmp_path / "part"), "--script", str(folder / "tiny.safetensors")]
    words += ["--hardware", str(folder / "local.yaml"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "no row asked the store with everything" in " ".join(capsys.readouterr().out.split())
    found = read_record(tmp_path / "out")
    assert found["summary"]["rows"] is None
    assert all(one["by_rows"] is None for one in found["rows"])


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "run"), "--script", str(folder / "tiny.safetensors")]
    assert main([*words, "--hardware", str(tmp_path / "none.yaml"), "--out", str(tmp_path)]) == 1
    assert "was never measured" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), "--script", "x", "--hardware", str(folder / "local.yaml")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert command.WITHIN == 0.1
