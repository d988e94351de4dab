"""Sections about collecting and the recorder's cost: from their records alone, every number as recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specgate.report.record import write_json
from specgate.report.results import make
from specgate.report.running import slim_running
from tests.report.support import record


def collection() -> dict[str, Any]:
    stack = {
        "sequences": 1234,
        "tokens": 157952,
        "entropy_min": 0.9531,
        "drop_rate": 0.021,
        "popularity_recall": 0.163,
        "chance": 0.125,
        "verdict": "says",
        "layers": [{"layer": 0}],
    }
    base = {
        k: record()[k] for k in ("schema_version", "started", "wall_seconds", "git", "hardware", "versions")
    }
    return base | {
        "entry": "collect.py",
        "command": "python collect.py moe=alpha",
        "model": "alpha",
        "trace": "data/traces/alpha",
        "seconds": 61.2,
        "tokens": 157952,
        "tokens_per_second": 2568.3,
        "threads": 1,
        "routing_control": {"agreement": 1.0, "decisions": 947712},
        "stacks": {"encoder": stack, "decoder": stack | {"drop_rate": None}},
        "picture": "/secret/place/expert_load.png",
    }


def overhead() -> dict[str, Any]:
    row = {"wall_ms": 100.0, "cpu_ms": 90.0, "wall_ratio": 1.0, "cpu_ratio": 1.0}
    result = {
        "model": "alpha",
        "batch": 8,
        "length": 128,
        "rounds": 40,
        "variants": {"bare": row, "recorder": row | {"wall_ratio": 1.021}},
    }
    base = {k: v for k, v in collection().items() if k not in ("stacks", "model")}
    return base | {"entry": "recorder_overhead.py", "overhead": [result]}


@pytest.mark.parametrize(
    ("made", "name", "words"),
    [
        (
            collection(),
            "collect-alpha",
            ["1,234", "0.953", "2.1%", "61 s", "2,568 tokens/s", "100.00% of 947,712"],
        ),
        (overhead(), "recorder_overhead", ["1.021", "40 interleaved rounds of 8 x 128 tokens"]),
    ],
)
def test_page_shows_what_was_recorded(
    tmp_path: Path, made: dict[str, Any], name: str, words: list[str]
) -> None:
    write_json(tmp_path / "run" / "metrics.json", made)
    out = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "run")])
    text = out.read_text()
    assert (tmp_path / "docs" / "results" / f"{name}.json").is_file()
    assert [w for w in words if w not in text] == []
    assert make(tmp_path / "docs" / "RESULTS.md").read_text() == text
    assert "/secret/place" not in (tmp_path / "docs" / "results" / f"{name}.json").read_text()


def test_slim_forgets_shares() -> None:
    assert "layers" not in slim_running(collection())["stacks"]["encoder"]
