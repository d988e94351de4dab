"""Records of benchmarks.file_tier become a section of docs/RESULTS.md, every number in its own column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specgate.report.file_tier_page import file_tier_section, is_file_tier, table_of
from specgate.report.record import write_json
from specgate.report.results import make, markdown, slim
from tests.report.support import record as scores

SLOW: dict[str, Any] = {
    "block_mib": 1, "threads": 2, "gb_per_s": 1.2504, "slowest": 1.1004, "fastest": 1.3004,
    "share_of_best_plain": 0.6252,
}  # fmt: skip
BEST: dict[str, Any] = {
    "block_mib": 16, "threads": 4, "gb_per_s": 2.0004, "slowest": 1.9004, "fastest": 2.1004,
    "share_of_best_plain": 1.0,
}  # fmt: skip
RING: dict[str, Any] = {
    "backend": "io_uring", "request_mib": 32, "checksum": False, "gb_per_s": 2.2004, "slowest": 1.7004,
    "fastest": 2.3004, "share_of_best_plain": 1.1012,
}  # fmt: skip
CHECKED: dict[str, Any] = {
    "backend": "pread", "request_mib": 64, "checksum": True, "gb_per_s": 1.5004, "slowest": 1.4004,
    "fastest": 1.6004, "share_of_best_plain": 0.7502,
}  # fmt: skip


def record(**changed: Any) -> dict[str, Any]:
    kept = {key: value for key, value in scores().items() if key not in ("rows", "traces", "load", "mode")}
    found = {
        "file_bytes": 268435456,
        "direct": True,
        "rounds": 13,
        "requests": 7,
        "best_plain": dict(BEST),
        "plain": [SLOW, BEST],
        "reader": [RING, CHECKED],
    }
    return kept | {
        "entry": "file_tier.py",
        "config": {"folder": "/secret/place"},
        "file_tier": found | changed,
    }


def test_columns_show_their_values() -> None:
    table = table_of(record())
    assert table.columns == [
        "what reads", "MiB per read", "threads or requests", "GB/s", "slowest", "fastest",
        "% of the best plain loop",
    ]  # fmt: skip
    assert table.rows == [
        ["pread loop", "1", "2", "1.250", "1.100", "1.300", "62.5"],
        ["pread loop", "16", "4", "2.000", "1.900", "2.100", "100.0"],
        ["file reader, io_uring", "32", "7", "2.200", "1.700", "2.300", "110.1"],
        ["file reader, pread, checksum", "64", "7", "1.500", "1.400", "1.600", "75.0"],
    ]
    assert table.strong == {1}
    assert table.sections == {0, 2}


def test_notes_say_how_it_was_read() -> None:
    table = table_of(record())
    assert "past the page cache" in table.title
    for words in ("0.27 GB read once per round", "13 interleaved rounds", "all read with O_DIRECT"):
        assert words in table.notes[0]
    assert "(16 MiB x 4 threads, 2.000 GB/s) is the one of 2" in table.notes[1]
    assert "7 requests under way" in table.notes[2]
    cached = table_of(record(direct=False))
    assert "through the page cache" in cached.title
    assert "O_DIRECT is refused here" in cached.notes[0]


def test_a_stored_record_makes_the_same_section(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "docs" / "RESULTS.md"
    write_json(run / "metrics.json", record())
    page = make(out, [str(run)], "disk").read_text()
    assert "## disk" in page
    assert "2 cores of Test CPU" in page
    assert "\n".join(file_tier_section(record())) in page
    assert "| file reader, io_uring | 32 | 7 | 2.200 | 1.700 | 2.300 | 110.1 |" in page
    assert make(out).read_text() == page
    kept = slim(record())
    assert "/secret/place" not in json.dumps(kept)
    assert markdown({"x": kept}) == markdown({"x": record()})


def test_other_and_broken_records() -> None:
    assert is_file_tier(record())
    assert not is_file_tier(scores())
    without = {key: value for key, value in record()["file_tier"].items() if key != "rounds"}
    with pytest.raises(KeyError, match="rounds"):
        file_tier_section({**record(), "file_tier": without})
