"""Every entry point on a CUDA device, with traces held in its memory: train, compare, cost, calibrate, doubt.

What it computes is tested on the CPU; this says that nothing is left on the wrong device.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

import benchmark
from benchmarks.zoo import LEARNED
from tests.test_configs import CONF, composed

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]
QUICK = [
    *("logger=none", "callbacks.progress=null", "trainer.max_epochs=1", "+trainer.limit_train_batches=2"),
    *("data.window=32", "data.batch_size=8", "data.cache=auto", "threads=1"),
]


def train(model: str, traces: Path, out: Path, *more: str, data: str = "olmoe_ref_prefill") -> Path:
    """One run of train.py; the folder of its checkpoint and metrics.json."""
    import train as entry

    device = "gpu" if torch.cuda.is_available() else "cpu"
    overrides = [
        f"model={model}",
        f"data={data}",
        f"data.traces={traces}",
        f"trainer={device}",
        *QUICK,
        *more,
    ]
    cfg = composed(CONF, "train", overrides, out)
    entry.train(cfg, Console(quiet=True))
    assert (out / "predictor.ckpt").is_file()
    return out


@pytest.fixture(scope="module")
def runs(tiny_traces: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of one predictor."""
    folder = tmp_path_factory.mktemp("runs")
    trace = tiny_traces["olmoe"]
    return [train("router_residual", trace, folder / str(seed), f"seed={seed}") for seed in range(3)]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("model", LEARNED)
def test_predictors_train(model: str, phase: str, tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    name = "olmoe" if phase == "prefill" else "olmoe_decode"
    run = train(model, tiny_traces[name], tmp_path, data=f"olmoe_ref_{phase}")
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert {row["split"] for row in rows} == {"validation", "test"}


@pytest.mark.parametrize("calibration", ["vector", "isotonic"])
def test_calibrators_fit(calibration: str, tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    train("mlp", tiny_traces["olmoe"], tmp_path, f"calibration={calibration}", "calibration.conformal=true")


def test_shadow_and_encoder(tiny_traces: dict[str, Path], tiny_switch: Path, tmp_path: Path) -> None:
    more = [f"model.host={tiny_switch}", "model.bits=16"]
    train("shadow", tiny_traces["switch"], tmp_path, *more, data="switch_ref_encoder")


def test_ensemble(runs: list[Path], tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    checkpoints = f"model.checkpoints=[{','.join(map(str, runs))}]"
    train("ensemble", tiny_traces["olmoe"], tmp_path, checkpoints, "model.combine=stacking")


@pytest.mark.parametrize("mode", ["accuracy", "cost", "quantize", "calibration", "uncertainty"])
def test_benchmark(
    mode: str,
    runs: list[Path],
    tiny_traces: dict[str, Path],
    tiny_olmoe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    GlobalHydra.instance().clear()
    arguments = [
        *("--config-path", str(CONF), f"mode={mode}", f"checkpoints=[{','.join(map(str, runs))}]"),
        *("data=olmoe_ref_prefill", f"data.traces={tiny_traces['olmoe']}", "data.window=32"),
        *("data.cache=auto", f"hydra.run.dir={tmp_path}", "cost.repeats=3", "cost.batch_sizes=[1,2]"),
        *("cost.context=16", "quantize.context=16", "calibrate.drift.stream=200", "calibrate.drift.block=16"),
        "+cost.hosts.olmoe={model_type: olmoe, hidden_size: 32, num_experts: 8, num_experts_per_tok: 2}",
    ]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    benchmark.main()
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["mode"] == mode
    if torch.cuda.is_available() and mode == "cost":
        assert all(any(device != "cpu" for device in row["us"]) for row in record["rows"])
