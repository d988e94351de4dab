"""benchmarks.store_paths: it measures what it says, and its record becomes a section of docs/RESULTS.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.store_paths import MIB, main, measure_copies, measure_hits
from specgate.report.record import read_record
from specgate.report.results import make
from specgate.runtime import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_counted_and_compared(device: str) -> None:
    (row,) = measure_copies([MIB // 4], 4 * MIB, 2, torch.device(device))
    assert row["experts"] == 16
    for name in ("bare", "demanded", "forecast"):
        assert 0 < row[f"{name}_slowest"] <= row[f"{name}_gb_per_s"]
    assert row["demanded_share"] == pytest.approx(row["demanded_gb_per_s"] / row["bare_gb_per_s"])


@pytest.mark.parametrize("device", DEVICES)
def test_hits_cost_less_natively(device: str) -> None:
    rows = measure_hits([1, 4], 200, torch.device(device))
    assert [row["experts"] for row in rows] == [1, 4]
    for row in rows:
        assert 0 < row["core_acquire_ns"] < row["python_acquire_ns"]
        assert row["python_prefetch_ns"] > 0


def test_record_becomes_a_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    main(["--mib", "0.25", "--total", "4", "--rounds", "2", "--calls", "50", "--model", "--device", "cpu",
          "--out", str(out)])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[-1] == str(out / "metrics.json")
    assert "Copy engine against bare copies" in printed
    record = read_record(out)
    assert record["command"].startswith("python -m benchmarks.store_paths --mib 0.25")
    page = make(tmp_path / "docs" / "RESULTS.md", [str(out)]).read_text()
    assert "## store_paths" in page
    assert f"| {record['store_paths']['hits'][0]['core_acquire_ns']:,.0f} |" in page
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == page


@pytest.mark.gpu
def test_speed_on_a_gpu() -> None:
    """The floors; the figures that count are in docs/RESULTS.md."""
    device = torch.device("cuda")
    rows = {row["mib"]: row for row in measure_copies([MIB, 4 * MIB, 16 * MIB], 512 * MIB, 9, device)}
    assert rows[1.0]["demanded_share"] >= 0.90
    assert min(rows[4.0]["demanded_share"], rows[16.0]["demanded_share"]) >= 0.95
    assert max(row["core_acquire_ns"] for row in measure_hits([1, 4, 8], 2000, device)) <= 2000
