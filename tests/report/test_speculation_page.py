"""Records of benchmarks.speculation become a section of docs/RESULTS.md, every number in its own column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specgate.report.record import write_json
from specgate.report.results import make, markdown, slim
from specgate.report.speculation_page import is_speculation, speculation_section, tables_of
from tests.report.support import record as scores

GPU_ROW: dict[str, Any] = {
    "predictor": "mlp", "shape": "olmoe-1b-7b", "batch": 8, "weights": "bfloat16", "context": 160,
    "microseconds": {"torch": 1201.04, "torch, on device": 702.26, "kernel": 16.12, "kernel, polled": 31.47,
                     "torch, graph": 63.85, "kernel, graph": 14.93},
    "p10_p90": {"torch": [1101.5, 1302.5], "torch, on device": [603.5, 804.5], "kernel": [15.5, 17.5],
                "kernel, polled": [29.5, 35.5], "torch, graph": [61.5, 65.5], "kernel, graph": [13.5, 18.5]},
    "times_faster": {"on the host": 38.16, "on the device": 43.56, "graphs": 4.28},
    "matrix_mb_per_point": 1.295,
}  # fmt: skip
CPU_ROW: dict[str, Any] = {
    "predictor": "router_lookahead", "shape": "mixtral-8x7b", "batch": 1, "weights": "float32",
    "context": 160,
    "microseconds": {"torch": 901.14, "torch, on device": 802.25, "kernel": 203.36, "kernel, polled": 304.47},
    "p10_p90": {"torch": [900.5, 910.5], "torch, on device": [801.5, 811.5], "kernel": [202.5, 212.5],
                "kernel, polled": [303.5, 313.5]},
    "times_faster": {"on the host": 2.96, "on the device": 3.94},
    "matrix_mb_per_point": 0.648,
}  # fmt: skip
CONFIG = {"horizons": 3, "threshold": 0.25, "rounds": 31, "seconds": 29.5, "out": "/secret/place"}


def record(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    kept = {key: value for key, value in scores().items() if key not in ("rows", "traces", "load", "mode")}
    return kept | {
        "entry": "speculation.py",
        "config": CONFIG,
        "speculation": list(rows),
        "threads": 5,
        "device": device,
    }


def test_columns_show_their_values_on_a_gpu() -> None:
    factors, times = tables_of(record(GPU_ROW))
    case = {"predictor": "mlp", "shape": "olmoe-1b-7b", "weights": "bfloat16", "batch": "8"}
    assert [dict(zip(factors.columns, row, strict=True)) for row in factors.rows] == [
        case
        | {
            "on the host": "38.16",
            "on the device": "43.56",
            "graphs": "4.28",
            "MB of matrices per point": "1.295",
        }
    ]
    assert [dict(zip(times.columns, row, strict=True)) for row in times.rows] == [
        case
        | {
            "torch": "1201.0 (1101.5 to 1302.5)",
            "torch, on device": "702.3 (603.5 to 804.5)",
            "torch, graph": "63.9 (61.5 to 65.5)",
            "kernel": "16.1 (15.5 to 17.5)",
            "kernel, polled": "31.5 (29.5 to 35.5)",
            "kernel, graph": "14.9 (13.5 to 18.5)",
        }
    ]
    assert "on the GPU" in times.title
    assert 'on the host: "torch" over "kernel, polled"' in factors.notes[0]
    assert 'on the device: "torch, on device" over "kernel"' in factors.notes[0]
    assert 'graphs: "torch, graph" over "kernel, graph"' in factors.notes[0]


def test_a_cpu_has_no_graphs() -> None:
    factors, times = tables_of(record(CPU_ROW, device="cpu"))
    assert factors.rows == [
        ["router_lookahead", "mixtral-8x7b", "float32", "1", "2.96", "3.94", "0.648"],
    ]
    assert times.rows == [
        [
            "router_lookahead", "mixtral-8x7b", "float32", "1", "901.1 (900.5 to 910.5)",
            "802.2 (801.5 to 811.5)", "203.4 (202.5 to 212.5)", "304.5 (303.5 to 313.5)",
        ]
    ]  # fmt: skip
    assert "on the CPU" in times.title
    assert "graph" not in " ".join([*factors.columns, *times.columns, *factors.notes, *times.notes])


def test_notes_say_what_was_asked_for() -> None:
    factors, times = tables_of(record(GPU_ROW))
    for words in ("horizons up to 3", "threshold 0.25", "160 tokens looked back on"):
        assert words in factors.notes[1]
    for words in ("At most 31 interleaved rounds", "29.5 s", "5 CPU thread(s)"):
        assert words in times.notes[0]


def test_a_stored_record_makes_the_same_section(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "docs" / "RESULTS.md"
    write_json(run / "metrics.json", record(GPU_ROW, CPU_ROW))
    page = make(out, [str(run)], "spoken").read_text()
    assert "## spoken" in page
    assert "2 cores of Test CPU" in page
    assert "\n".join(speculation_section(record(GPU_ROW, CPU_ROW))) in page
    assert "| – |" in page  # the second case has no graphs
    assert make(out).read_text() == page
    kept = slim(record(GPU_ROW))
    assert "/secret/place" not in json.dumps(kept)
    assert markdown({"x": kept}) == markdown({"x": record(GPU_ROW)})


def test_other_and_broken_records() -> None:
    assert is_speculation(record())
    assert not is_speculation(scores())
    assert speculation_section(record()) == []
    with pytest.raises(KeyError, match="times_faster"):
        speculation_section(record({k: v for k, v in GPU_ROW.items() if k != "times_faster"}))
    with pytest.raises(KeyError, match="threads"):
        slim({key: value for key, value in record(GPU_ROW).items() if key != "threads"})
