"""metrics.json: complete, atomic, readable; a damaged one is refused in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from specgate.errors import SpecgateError
from specgate.report import record
from specgate.report.record import Run, describe_hardware, read_record, write_json


def test_a_run_is_written_and_read_back(tmp_path: Path) -> None:
    config = OmegaConf.create({"a": 1, "b": "${a}", "c": "${nowhere:x}"})
    path = Run("benchmark.py", config).write(
        tmp_path / "new", rows=[{"x": 1.5, "y": None}, {"x": 2}], note="ü"
    )
    again = read_record(tmp_path / "new")
    assert path == tmp_path / "new" / "metrics.json"
    assert again["rows"] == [{"x": 1.5, "y": None}, {"x": 2}]
    assert again["note"] == "ü"
    assert again["schema_version"] == 1
    assert again["config"]["a"] == 1
    assert again["wall_seconds"] >= 0
    assert again["hardware"]["cores"] >= 1
    assert again["hardware"]["cpu"]
    assert {"python", "torch", "specgate", "lightning"} <= set(again["versions"])
    assert again["command"] == "python benchmark.py"
    assert again["git"] is None or len(again["git"]["commit"]) == 40
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["metrics.json"]


def test_every_row_stands_on_its_own_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"rows": [{"a": i} for i in range(5)], "b": [1, 2]})
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert sum('{"a":' in line for line in lines) == 5
    assert json.loads("\n".join(lines)) == {"rows": [{"a": i} for i in range(5)], "b": [1, 2]}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    write_json(file, {"old": True})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(file, {"new": float("nan")})

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_json(file, {"new": True})
    assert json.loads(file.read_text()) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_bad_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecgateError, match="does not exist"):
        read_record(tmp_path)
    file = tmp_path / "metrics.json"
    for text, message in (
        ('{"schema_version": 1, "rows": [', "not valid JSON"),
        ("[1]", "schema_version None"),
        ('{"schema_version": 99}', "schema_version 99"),
    ):
        file.write_text(text)
        with pytest.raises(SpecgateError, match=message):
            read_record(file)


def test_command_line_is_the_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmark.py", "mode=accuracy", "data=[a, b]"])
    assert record.command_line("benchmark.py") == "python benchmark.py mode=accuracy 'data=[a, b]'"
    assert record.command_line("train.py") == "python train.py"


def test_git_state_outside_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "__file__", str(tmp_path / "specgate" / "report" / "record.py"))
    (tmp_path / "specgate" / "report").mkdir(parents=True)
    assert record.git_state() is None


def test_hardware_in_words() -> None:
    assert describe_hardware({"cpu": "X", "cores": 2, "gpus": []}) == "2 cores of X"
    assert describe_hardware({"cpu": "X", "cores": 16, "gpus": ["H100"]}) == "H100, 16 cores of X"
