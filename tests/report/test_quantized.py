"""mode=quantize: every precision of a checkpoint on the same documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from specgate import training
from specgate.calibration.fit import TemperatureFitter
from specgate.errors import ConfigError
from specgate.predictors.quantize import pack
from specgate.report.modes import run_mode
from specgate.report.publish import publish
from specgate.report.quantized import QuantizeSettings
from specgate.report.quantized_page import quantized_table
from specgate.report.record import Run, read_record, write_json
from specgate.report.results import make
from specgate.traces.datamodule import RoutingDataModule
from tests.test_configs import CONF


@pytest.fixture(scope="module")
def record(tiny_traces: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of float32 weights and of packed ones, through benchmark.py's own table of modes."""
    folder = tmp_path_factory.mktemp("quantized")
    data = RoutingDataModule(tiny_traces["olmoe"], phase="prefill", batch_size=16, verify=False)
    cfg = OmegaConf.create({"_target_": "specgate.predictors.router_residual.RouterResidual", "width": 64})
    predictor = training.build_predictor(cfg, data, 2).eval()
    training.save_predictor(predictor, folder / "float" / "predictor.ckpt")
    pack(predictor, 4)
    training.save_predictor(predictor, folder / "aware" / "predictor.ckpt")
    settings: Any = OmegaConf.load(CONF / "benchmark.yaml")
    settings.quantize.update(
        {
            "checkpoints": [str(folder / "float"), str(folder / "aware")],
            "context": 20,
            "repeats": 3,
            "match": "shape",
        }
    )
    settings.quantize.device = "cpu"
    found = run_mode("quantize", settings, {"tiny": data}, TemperatureFitter(), Console(quiet=True))
    Run("benchmark.py").write(folder, **found)
    return read_record(folder)


def test_a_row_per_precision(record: dict[str, Any]) -> None:
    rows = {(row["precision"], row["training"]): row for row in record["rows"]}
    assert set(rows) == {
        ("float32", "float"),
        ("int8", "post-training"),
        ("int4", "post-training"),
        ("int4", "aware"),
    }
    full, eight, four = rows["float32", "float"], rows["int8", "post-training"], rows["int4", "post-training"]
    assert full["bytes"] > 2 * eight["bytes"] > 2 * four["bytes"]
    assert full["parameters"] == eight["parameters"] == four["parameters"]
    for horizon in (1, 2):
        key = f"recall_n{horizon}"
        assert abs(eight[key] - full[key]) < 0.01, "int8 rounds little"
        assert four[key] == pytest.approx(rows["int4", "aware"][key]), (
            "the same weights, packed here or there"
        )
    assert all(row["us_cpu_1"] > 0 and row["split"] == "test" for row in rows.values())
    assert full["ece_n1"] != eight["ece_n1"], "the calibration is fitted for the rounded weights"


def test_page_states_what_is_lost(record: dict[str, Any], tmp_path: Path) -> None:
    page = publish(record, tmp_path, Console(quiet=True))
    assert "post-training" in page.read_text()
    table = quantized_table(record["rows"], "tiny")
    lost = {row[1] + row[2]: row[table.columns.index("points lost")] for row in table.rows}
    rows = {row["precision"] + row["training"]: row for row in record["rows"]}
    full = (rows["float32float"]["recall_n1"] + rows["float32float"]["recall_n2"]) / 2
    four = (rows["int4aware"]["recall_n1"] + rows["int4aware"]["recall_n2"]) / 2
    assert lost["float32"] == "–"
    assert lost["int4aware"] == f"{100 * (full - four):.2f}"


def test_the_results_page_shows_it_beside_other_runs(record: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "metrics.json", record)
    page = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "run")]).read_text()
    table = quantized_table(record["rows"], "tiny")
    assert "## benchmark-quantize-tiny" in page
    assert table.to_markdown() in page
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == page, "from what was stored alone"


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs trained predictors"):
        QuantizeSettings()
    with pytest.raises(ConfigError, match="split='train'"):
        QuantizeSettings(checkpoints=["x"], split="train")
