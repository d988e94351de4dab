"""From measurements of mode=live to the flat rows of metrics.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from specgate.errors import StoreError
from specgate.report.live_settings import Budget
from specgate.report.replay_rows import BYTES, REQUESTS, ratio

if TYPE_CHECKING:
    from specgate.report.live import Live

Measured = Mapping[tuple[int, str], Mapping[str, Any]]
BASES = ("on_demand", "resident", "accelerate_cpu", "accelerate_disk")


def make_rows(live: Live, measured: Measured) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per variant and budget, and the timelines of the watched rounds.

    Raises:
        StoreError: if an offloaded model gave other values than the resident one.
    """
    repeats, rows, timelines = live.settings.repeats, [], []
    reference = reference_of(live.budgets)
    speeds = {b.key: [tokens_per_second(measured[t, b.key]) for t in range(repeats)] for b in live.budgets}
    resident = next((v for k, v in speeds.items() if k.startswith("resident@")), None)
    for budget in live.budgets:
        rounds = [measured[turn, budget.key] for turn in range(repeats)]
        watched = measured[repeats, budget.key]["watched"]
        same = agreement([*rounds, measured[repeats, budget.key]], measured[0, reference.key])
        check(budget, reference, same, live.plan.codec)
        row: dict[str, Any] = {"model": live.name, "variant": budget.name, "residency": budget.residency}
        row |= {"budgeted": budget.budgeted, "budget_gb": budget.gb, "slots": rounds[0]["slots"]}
        row |= {"about": budget.way.about} | speed(rounds, speeds[budget.key], live.settings.prompt_tokens)
        for base in BASES:
            against = next((v for k, v in speeds.items() if k.startswith(f"{base}@")), None)
            row[f"against_{base}"] = None if against is None else ratio(speeds[budget.key], against)
        lru = next((k for k in lru_of(live) if k.endswith(f"@{budget.residency:g}")), None)
        row["against_lru"] = ratio(speeds[budget.key], speeds[lru]) if lru and budget.budgeted else None
        row |= requests(rounds) | shares(watched, row["tokens_per_second"], resident) | memory(rounds) | same
        rows.append(row)
        if watched["timeline"]:
            timelines.append(
                {"variant": budget.name, "residency": budget.residency}
                | {key: watched[key] for key in ("file", "timeline")}
            )
    return rows, timelines


def lru_of(live: Live) -> list[str]:
    """Keys of the plain caches in which the least recently used expert goes."""
    names = ["offload:lru", *(["offload"] if live.settings.eviction in ("auto", "lru") else [])]
    return [f"{b.name}@{b.residency:g}" for name in names for b in live.budgets if b.name == name]


def reference_of(budgets: Sequence[Budget]) -> Budget:
    """What the values are compared to: the resident model, else the first that was measured."""
    return next((budget for budget in budgets if budget.way.kind == "resident"), budgets[0])


def agreement(rounds: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> dict[str, bool]:
    """Whether all rounds gave the reference's tokens, and the same logits bit for bit."""
    return {
        "tokens_equal": all(found["tokens"] == wanted["tokens"] for found in rounds),
        "logits_equal": all(found["digests"] == wanted["digests"] for found in rounds),
    }


def check(budget: Budget, reference: Budget, same: Mapping[str, bool], codec: str) -> None:
    """An offloaded model must give the resident's logits, unless a codec rounds its weights.

    Raises:
        StoreError: if it does not.
    """
    ours = budget.way.kind == "offload" and reference.way.kind in ("resident", "offload")
    if ours and codec == "none" and not same["logits_equal"]:
        raise StoreError(
            f"{budget.key} gave other logits than {reference.key}, though experts only move; please "
            "report it with your model, GPU and versions."
        )


def tokens_per_second(found: Mapping[str, Any]) -> float:
    """While decoding: from the first token of each prompt on."""
    return len(found["each"]) / sum(found["each"])


def speed(rounds: Sequence[Mapping[str, Any]], speeds: Sequence[float], prompt: int) -> dict[str, Any]:
    """Tokens per second over the rounds, milliseconds over all tokens, time to the first token."""
    every = np.array([second for found in rounds for second in found["each"]])
    first = statistics.median(second for found in rounds for second in found["first"])
    p50, p95 = (float(1e3 * x) for x in np.percentile(every, [50, 95]))
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_low": min(speeds),
        "tokens_per_second_high": max(speeds),
        "ms_p50": p50,
        "ms_p95": p95,
        "ms_first": 1e3 * first,
        "prefill_tokens_per_second": prompt / first,
        "tokens": len(every),
    }


def requests(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Hits, and bytes per generated token with the prompt's share; None where there is no store."""
    if not rounds[0]["stats"]:
        return dict.fromkeys(("hit_rate", "late_rate", *BYTES))
    counted = {k: sum(found["stats"].get(k, 0) for found in rounds) for k in rounds[0]["stats"]}
    asked = sum(counted.get(name, 0) for name in REQUESTS)
    tokens = sum(len(one) for found in rounds for one in found["tokens"])
    out: dict[str, Any] = {
        "hit_rate": counted.get("hit", 0) / asked if asked else None,
        "late_rate": counted.get("late", 0) / asked if asked else None,
    }
    for name, counter in BYTES.items():
        read = counted.get("read_bytes_demand", 0) + counted.get("read_bytes_prefetch", 0)
        out[name] = (read if counter is None else counted.get(counter, 0)) / tokens
    return out


def shares(watched: Mapping[str, Any], speed: float, resident: Sequence[float] | None) -> dict[str, Any]:
    """Where the time of decoding goes: what the resident model takes too, waiting, the rest."""
    wait, copying = watched["wait"] / watched["seconds"], watched["copying"]
    compute = None
    if resident is not None:
        compute = min(1.0 - wait, speed / statistics.median(resident))
    return {
        "compute_share": compute,
        "stall_share": wait,
        "other_share": max(0.0, 1.0 - wait - (compute or 0.0)),
        "copies_hidden": watched["copying_behind_compute"] / copying if copying else None,
    }


def memory(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bytes at their peak, joules per generated token (the prompt's share included)."""
    meters = [found["meter"] for found in rounds]
    joules = [meter["joules"] for meter in meters]
    tokens = sum(len(one) for found in rounds for one in found["tokens"])
    peaks = [meter["device_peak"] for meter in meters if meter["device_peak"] is not None]
    return {
        "host_bytes": max(found["host_bytes"] for found in rounds),
        "device_peak": max(peaks) if peaks else None,
        "host_peak": max(meter["host_peak"] for meter in meters),
        "joules_per_token": None if None in joules else sum(joules) / tokens,
    }
