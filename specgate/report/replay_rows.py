"""From measurements of a replay to the flat rows of metrics.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from specgate.errors import StoreError
from specgate.report.replay_settings import Entry

if TYPE_CHECKING:
    from specgate.report.replay import Replay

Measured = Mapping[tuple[int, str], Mapping[str, Any]]
REQUESTS = ("hit", "late", "host_hit", "miss")
BYTES = {
    "demand_bytes": "copied_bytes_demand",
    "prefetch_bytes": "copied_bytes_prefetch",
    "useful_bytes": "useful_bytes",
    "wasted_bytes": "wasted_bytes",
    "late_bytes": "late_bytes",
    "read_bytes": None,
}


def make_rows(replay: Replay, measured: Measured) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per entry, and the timelines of the watched rounds.

    Raises:
        StoreError: if two variants computed different values.
    """
    repeats, rows, timelines = replay.settings.repeats, [], []
    check_values(measured)
    speeds = {entry.key: speeds_of(measured, entry, repeats) for entry in replay.entries}
    for entry in replay.entries:
        rounds = [measured[turn, entry.key] for turn in range(repeats)]
        watched = measured[repeats, entry.key]["watched"]
        row = {
            **replay.script.labels,
            "variant": entry.name,
            "residency": entry.residency,
            "slots": entry.slots,
        }
        row |= {"budgeted": entry.budgeted, "about": entry.kind.about}
        row |= speed(rounds, speeds[entry.key])
        for base in ("on_demand", "resident"):
            against = next((v for k, v in speeds.items() if k.startswith(f"{base}@")), None)
            row[f"against_{base}"] = None if against is None else ratio(speeds[entry.key], against)
        row |= requests(rounds) | shares(watched) | memory(rounds)
        rows.append(row)
        timelines.append(
            {"variant": entry.name, "residency": entry.residency}
            | {key: watched[key] for key in ("file", "timeline")}
        )
    return rows, timelines


def check_values(measured: Measured) -> None:
    """All variants must have computed the same.

    Raises:
        StoreError: naming two that did not.
    """
    (first, wanted), *others = ((key, found["digest"]) for (_, key), found in measured.items())
    for key, digest in others:
        if digest != wanted:
            raise StoreError(
                f"The replay computed other values with {key} than with {first}, though experts only move; "
                "please report it with your GPU and versions."
            )


def speeds_of(measured: Measured, entry: Entry, repeats: int) -> list[float]:
    """Tokens per second of each round."""
    every = [measured[turn, entry.key]["seconds"] for turn in range(repeats)]
    return [len(seconds) / sum(seconds) for seconds in every]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of how often faster."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def speed(rounds: Sequence[Mapping[str, Any]], speeds: Sequence[float]) -> dict[str, Any]:
    """Tokens per second over the rounds, and milliseconds per token over all tokens."""
    every = np.array([second for found in rounds for second in found["seconds"]])
    p50, p95 = (float(1e3 * x) for x in np.percentile(every, [50, 95]))
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_low": min(speeds),
        "tokens_per_second_high": max(speeds),
        "ms_p50": p50,
        "ms_p95": p95,
        "tokens": len(every),
    }


def requests(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hits and bytes per token, over all rounds."""
    counted = {k: sum(found["stats"][k] for found in rounds) for k in rounds[0]["stats"]}
    tokens = sum(len(found["seconds"]) for found in rounds)
    asked = sum(counted[name] for name in REQUESTS)
    out: dict[str, Any] = {
        "hit_rate": counted["hit"] / asked if asked else None,
        "late_rate": counted["late"] / asked if asked else None,
    }
    for name, counter in BYTES.items():
        value = counted["read_bytes_demand"] + counted["read_bytes_prefetch"]
        out[name] = (value if counter is None else counted[counter]) / tokens
    return out | {"stale": counted["stale"] / tokens, "overflow": counted["overflow"] / tokens}


def shares(watched: Mapping[str, Any]) -> dict[str, Any]:
    """Where the time of the watched round went."""
    seconds, copying = watched["seconds"], watched["copying"]
    compute, wait = watched["compute"] / seconds, watched["wait"] / seconds
    return {
        "compute_share": compute,
        "stall_share": wait,
        "other_share": max(0.0, 1.0 - compute - wait),
        "copies_hidden": watched["copying_behind_compute"] / copying if copying else None,
        "link_gb_per_second": watched["copied_bytes"] / copying * 1e-9 if copying else None,
    }


def memory(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes at their peak, joules per token."""
    meters = [found["meter"] for found in rounds]
    joules = [meter["joules"] for meter in meters]
    tokens = sum(len(found["seconds"]) for found in rounds)
    peaks = [meter["device_peak"] for meter in meters if meter["device_peak"] is not None]
    return {
        "device_bytes": max(found["device_bytes"] for found in rounds),
        "host_bytes": max(found["host_bytes"] for found in rounds),
        "device_peak": max(peaks) if peaks else None,
        "host_peak": max(meter["host_peak"] for meter in meters),
        "joules_per_token": None if None in joules or not tokens else sum(joules) / tokens,
    }
