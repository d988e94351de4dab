"""Every experiment and predictor of conf/ runs through train.py on a tiny trace of the real recorder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tests.test_configs import CONF, composed

MODELS = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
#: What makes any run quick, whatever its experiment says.
QUICK = [
    "trainer=debug",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "logger=none",
    "data.window=32",
    "data.batch_size=8",
    "data.num_workers=0",
    "threads=1",
]


def train(cfg: DictConfig) -> tuple[float | None, dict[str, Any]]:
    """train.py's own function on a composed configuration; its return value and its metrics.json."""
    import train as entry

    result = entry.train(cfg, Console(quiet=True))
    return result, json.loads((Path(cfg.paths.run) / "metrics.json").read_text())


def tiny(cfg: DictConfig, traces: dict[str, Path]) -> str:
    """The tiny trace that has the stack and phase that a configuration asks for."""
    suffix = "_decode" if cfg.data.phase == "decode" else ""
    host = "switch" if cfg.data.stack == "encoder" or "switch" in str(cfg.data.traces) else "olmoe"
    return f"data.traces={traces[host + suffix]}"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("model", MODELS)
def test_smoke_two_steps_of_every_predictor(
    model: str, phase: str, tiny_traces: dict[str, Path], tiny_olmoe: Path, tmp_path: Path
) -> None:
    trace = tiny_traces["olmoe" if phase == "prefill" else "olmoe_decode"]
    data = [
        "data=olmoe_ref_prefill" if phase == "prefill" else "data=olmoe_ref_decode",
        f"data.traces={trace}",
    ]
    if model == "shadow":
        data.append(f"model.host={tiny_olmoe}")
    if model == "ensemble":
        for name in ("popularity", "markov"):
            train(composed(CONF, "train", [f"model={name}", *data, *QUICK], tmp_path / name))
        data.append(f"model.checkpoints=[{tmp_path / 'popularity'},{tmp_path / 'markov'}]")
    cfg = composed(CONF, "train", [f"model={model}", *data, *QUICK], tmp_path)
    recall, metrics = train(cfg)
    assert recall is not None
    assert 0 < recall <= 1
    rows = [row for row in metrics["rows"] if row["split"] == "test"]
    assert {row["predictor"] for row in rows} == {model}
    kinds = {"within", "entry"} | ({"wrapped"} if phase == "decode" else set())
    assert {row["kind"] for row in rows} == kinds
    assert {row["horizon"] for row in rows if row["kind"] == "within"} == {1, 2, 3}
    from specgate import load_predictor

    assert load_predictor(Path(metrics["checkpoint"])).name == model


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_run(experiment: str, tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    plain = composed(CONF, "train", [f"experiment={experiment}"], tmp_path)
    overrides = [f"experiment={experiment}", *QUICK, tiny(plain, tiny_traces)]
    cfg = composed(CONF, "train", overrides, tmp_path)
    _, metrics = train(cfg)
    assert metrics["rows"]
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert text.startswith(("#", "# @package _global_"))
    assert len([line for line in text.splitlines() if line.startswith("#")]) >= 2, "says what it claims"


def test_there_is_an_experiment_for_the_demo() -> None:
    assert "demo" in EXPERIMENTS


def test_debug_runs_one_batch_and_keeps_nothing(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    overrides = ["debug=default", f"data.traces={tiny_traces['olmoe']}", "data.window=32"]
    cfg = composed(CONF, "train", overrides, tmp_path)
    assert OmegaConf.select(cfg, "trainer.fast_dev_run")
    _, metrics = train(cfg)
    assert {row["split"] for row in metrics["rows"]} == {"validation"}
    assert list(tmp_path.rglob("best.ckpt")) == []
