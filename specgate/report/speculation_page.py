"""Tables of ``benchmarks.speculation``, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgate.report.tables import Table, number

VARIANTS = {
    "torch": "step, calibration, merge, threshold, and the list of experts on the host",
    "torch, on device": "the same without the list: nothing waits for the device",
    "torch, graph": "that, captured into one CUDA graph per token",
    "kernel": "launches alone",
    "kernel, polled": "each launch waited for: the list of experts on the host",
    "kernel, graph": "launches captured into one CUDA graph per token",
}
"""Ways to foresee, in the order of the table."""
PAIRS = {
    "on the host": ("torch", "kernel, polled"),
    "on the device": ("torch, on device", "kernel"),
    "graphs": ("torch, graph", "kernel, graph"),
}
"""What each factor divides: the median of the first by that of the second."""
CASE = ("predictor", "shape", "weights", "batch")
SETTINGS = ("horizons", "threshold", "rounds", "seconds")


def is_speculation(record: Mapping[str, Any]) -> bool:
    """Whether a record is of ``benchmarks.speculation``."""
    return "speculation" in record


def slim_speculation(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record: no local paths."""
    kept = {key: record[key] for key in ("speculation", "threads", "device")}
    return kept | {"config": {key: record["config"][key] for key in SETTINGS}}


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """How often the kernel is faster, then how long each variant takes; none where no case was measured."""
    return [_factors(record), _times(record)] if record["speculation"] else []


def _case(row: Mapping[str, Any]) -> list[str]:
    return [str(row[key]) for key in CASE]


def _factors(record: Mapping[str, Any]) -> Table:
    rows = record["speculation"]
    pairs = [name for name in PAIRS if any(name in row["times_faster"] for row in rows)]
    table = Table(
        "Speculation kernel against the same predictor in torch: times faster",
        [*CASE, *pairs, "MB of matrices per point"],
        left=3,
    )
    for row in rows:
        factors = [number(row["times_faster"].get(name), 2) for name in pairs]
        table.rows.append([*_case(row), *factors, number(row["matrix_mb_per_point"], 3)])
    compared = "; ".join(f'{name}: "{PAIRS[name][0]}" over "{PAIRS[name][1]}"' for name in pairs)
    config = record["config"]
    table.notes = [
        f"Ratios of the medians below. {compared}. 1 is as fast as torch.",
        f"Random weights of the model's shape; horizons up to {config['horizons']}, threshold "
        f"{config['threshold']:g}, {rows[0]['context']} tokens looked back on. Batch: sequences. Weights: "
        "type of the kernel's matrices; torch computes with the predictor's own. MB (10^6 bytes): matrices "
        "that the kernel reads, rows of zeros included.",
    ]
    return table


def _times(record: Mapping[str, Any]) -> Table:
    rows, config = record["speculation"], record["config"]
    variants = [name for name in VARIANTS if any(name in row["microseconds"] for row in rows)]
    where = "on the GPU" if str(record["device"]).startswith("cuda") else "on the CPU"
    table = Table(
        f"Foreseeing {where}: microseconds per source point, median (10th to 90th percentile)",
        [*CASE, *variants],
        left=3,
    )
    for row in rows:
        table.rows.append([*_case(row), *[_time(row, name) for name in variants]])
    table.notes = [
        f"At most {config['rounds']} interleaved rounds, none begun after {config['seconds']:g} s of a case "
        f"but the first three; {record['threads']} CPU thread(s). A reading is the mean of a burst of "
        "decoded tokens, shared out over a token's source points: its id and each MoE layer.",
        "; ".join(f"{name}: {VARIANTS[name]}" for name in variants) + ".",
    ]
    return table


def _time(row: Mapping[str, Any], name: str) -> str:
    if name not in row["microseconds"]:
        return number(None)
    low, high = row["p10_p90"][name]
    return f"{number(row['microseconds'][name], 1)} ({number(low, 1)} to {number(high, 1)})"


def speculation_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    lines: list[str] = []
    for table in tables_of(record):
        lines += [f"**{table.title}**", "", table.to_markdown(), ""]
    return lines
