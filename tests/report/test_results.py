"""docs/RESULTS.md: made from stored records alone, the same bytes every time, and up to date in the
repository.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specgate.errors import SpecgateError
from specgate.report.record import write_json
from specgate.report.results import main, make, markdown, slim
from specgate.report.style import scored_rows
from tests.report.support import record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs" / "run"
    write_json(folder / "metrics.json", record())
    return folder


def test_results_are_stored_and_regenerated_identically(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "RESULTS.md"
    make(out, [str(run)])
    first = out.read_text()
    (stored,) = (tmp_path / "docs" / "results").iterdir()
    assert stored.name == "benchmark-accuracy-alpha-beta-decoder-prefill.json"
    out.unlink()
    (run / "metrics.json").unlink()
    make(out)
    assert out.read_text() == first
    for words in ("python benchmark.py mode=accuracy", "2 cores of Test CPU", "ab" * 8, "| mlp", "oracle"):
        assert words in first.replace("**", "")
    assert "router_lookahead was left out of alpha: the trace has no hidden states" in first


def test_stored_records_are_slim_and_keep_no_paths() -> None:
    kept = slim(record())
    text = json.dumps(kept)
    assert "/secret/place" not in text
    assert "thresholds" not in text
    assert len(text) < 0.5 * len(json.dumps(record()))
    assert markdown({"x": kept}) == markdown({"x": record()})


def test_sections_are_named_and_sorted(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "docs" / "RESULTS.md"
    make(out, [str(run)], "zulu")
    make(out, [str(run)], "bravo")
    text = out.read_text()
    assert text.index("## bravo") < text.index("## zulu")
    assert "validation split" in markdown({"x": {**record(), "split": "validation"}})


def test_wrong_runs_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "docs" / "RESULTS.md"
    with pytest.raises(SpecgateError, match="one run at a time"):
        make(out, [str(run), str(run)], "name")
    write_json(run / "metrics.json", {**record(), "rows": []})
    assert main([str(run), "--out", str(out)]) == 1
    assert "measured no accuracy" in capsys.readouterr().err
    assert not out.exists()
    assert main(["--out", str(out)]) == 0
    assert "Nothing is stored yet" in out.read_text()


def test_results_in_the_repository_are_up_to_date(root: Path) -> None:
    page, folder = root / "docs" / "RESULTS.md", root / "docs" / "results"
    if not folder.is_dir():
        pytest.skip("no results are stored yet")
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert page.read_text() == markdown(records)


def test_validation_rows_of_a_training_run_are_left_out() -> None:
    both = [{**row, "split": split} for split in ("validation", "test") for row in record()["rows"]]
    assert markdown({"x": slim({**record(), "rows": both})}) == markdown({"x": slim(record())})
    only = [{**row, "split": "validation"} for row in record()["rows"]]
    assert len(scored_rows({"rows": only})) == len(only)
