"""benchmark.py mode=calibration on small traces: all is measured, shown and kept; errors are sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specgate.errors import CheckpointError, ConfigError
from specgate.predictors.registry import predictor_class
from specgate.report.calibration import CalibrationSettings, examine, same_host
from specgate.report.modes import MODES
from specgate.report.record import read_record
from specgate.report.results import markdown, slim
from specgate.traces.datamodule import RoutingDataModule
from tests.test_benchmark import call
from tests.traces.helpers import header_for, stack_info, write_trace

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SETTINGS: dict[str, Any] = {
    "cells": {"temperature": 5000, "vector": 2000, "isotonic": 5000},
    "budget_experts": [2, 4],
    "resamples": 50,
    "drift": {"half": 16, "block": 8, "stream": 64, "splits": 4, "streams": 5},
}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small trace and of other text of the same host, under the names that conf/data knows."""
    folder = tmp_path_factory.mktemp("data") / "traces"
    stack = {"decoder": stack_info(L=4, E=8, K=2, D=4)}
    header = header_for(stack, documents=60)
    for name in ("olmoe_ref", "olmoe_ref_shift"):
        write_trace(folder / name, stack, shards=[[12] * 60, [9] * 60], header=header)
    return folder


@pytest.fixture(scope="module")
def checkpoint(traces: Path) -> Path:
    torch.manual_seed(0)
    data = RoutingDataModule(traces / "olmoe_ref", window=8)
    predictor = predictor_class("mlp")(**vars(data.spec), lookahead=3)
    with torch.no_grad():  # a new one is undecided everywhere; this one is sure of itself and wrong
        for parameter in predictor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    path = traces.parent / "train" / "predictor.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": predictor.state_dict(), "hyper_parameters": dict(predictor.hparams)}, path)
    return path


def test_mode_calibration_measures_publishes_and_is_kept(
    monkeypatch: pytest.MonkeyPatch, traces: Path, checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("specgate.report.canvas.DPI", 40)
    arguments = [
        f"+calibrate.drift.{k}={v}" for k, v in SETTINGS["drift"].items() if k in ("splits", "streams")
    ]
    arguments += [f"calibrate.drift.{k}={SETTINGS['drift'][k]}" for k in ("half", "block", "stream")]
    arguments += [
        "calibrate.cells={temperature: 5000, vector: 2000, isotonic: 5000}",
        "calibrate.resamples=50",
    ]
    arguments += ["calibrate.budget_experts=[2,4]", "data.window=8"]
    call(
        monkeypatch,
        traces,
        tmp_path,
        "mode=calibration",
        "data=olmoe_ref_prefill",
        "shift=[olmoe_ref_shift]",
        f"checkpoints=[{checkpoint}]",
        *arguments,
    )
    record = read_record(tmp_path)
    assert {row["calibrator"] for row in record["rows"]} == {"none", "temperature", "vector", "isotonic"}
    assert {(row["kind"], row["horizon"]) for row in record["rows"]} == {
        (kind, h) for kind in ("within", "entry") for h in (1, 2, 3)
    }
    # an untrained predictor is dishonest, and every calibrator mends most of that
    error = {
        name: sum(row["ece"] for row in record["rows"] if row["calibrator"] == name)
        for name in ("none", "temperature", "vector", "isotonic")
    }
    assert max(error["temperature"], error["vector"], error["isotonic"]) < 0.5 * error["none"]
    events = {(row["kind"], row["horizon"]): row["n"] for row in record["rows"]}
    for row in record["conformal"]:
        assert row["n"] == events[row["kind"], row["horizon"]]
        assert row["low"] <= row["coverage"] <= row["high"]
        assert abs(row["gap"]) < 0.25
    assert all(row["largest"] <= row["budget"] for row in record["budget"])
    assert {entry["kind"] for entry in record["decay"] if "fit" in entry} == {"within", "entry"}
    (shift,) = record["shift"]
    (drift,) = record["drift"]
    assert shift["shift"] == "olmoe_ref_shift"
    seen = sum(found["monitor"]["tokens"] for found in shift["domains"])
    assert seen == 60 * 12 + 60 * 9  # every document of the other text, not only those of its test split
    assert {"rate", "streams"} <= set(drift["false_alarms"])
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "conformal prefetch sets of mlp" in page
    kept = json.loads(json.dumps(slim(record)))
    assert "reliability" not in json.dumps(kept)
    assert markdown({"x": kept}) == markdown({"x": record})
    assert "what the drift monitor says" in markdown({"x": kept})


def test_wrong_settings_and_foreign_text_are_refused(traces: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert "calibration" in MODES
    with pytest.raises(ConfigError, match="name them with checkpoints="):
        CalibrationSettings()
    with pytest.raises(ConfigError, match="calibrator 'magic' is unknown"):
        CalibrationSettings(checkpoints=["x"], calibrators=["magic"])
    with pytest.raises(ConfigError, match="main=vector is not among"):
        CalibrationSettings(checkpoints=["x"], calibrators=["none"], main="vector")
    with pytest.raises(ConfigError, match="cells says nothing of vector"):
        CalibrationSettings(checkpoints=["x"], cells={"temperature": 1, "isotonic": 1})
    data = RoutingDataModule(traces / "olmoe_ref", window=8)
    stack = {"decoder": stack_info(L=4, E=8, K=2, D=4)}
    header = header_for(stack, documents=20)
    header = replace(header, model_id="another/model")
    write_trace(tmp_path / "other", stack, shards=[[12] * 20], header=header)
    other = RoutingDataModule(tmp_path / "other", window=8, everything=True)
    assert same_host(data, data)
    assert not same_host(data, other)
    settings = CalibrationSettings(
        checkpoints=[str(checkpoint)], calibrators=["none"], main="none", **SETTINGS
    )
    with pytest.raises(CheckpointError, match="shift=other comes from another host"):
        examine(settings, {"mine": data}, {"other": other})
