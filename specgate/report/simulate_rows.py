"""What policies reached, from the simulator's figures of each document; intervals by resampling documents.

Letters: D documents (or batches of them), R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weights = NDArray[np.float64]

#: What stands for the oracle and for the reference that every share is counted from.
ORACLE, REFERENCE = "oracle", "lru"
#: Figures of a document that are kept.
COUNTED = (
    "hits", "late", "host_hits", "misses", "low_hits", "demand_bytes", "prefetch_bytes", "wasted_bytes",
    "file_bytes", "evictions", "stale", "refused", "late_ns", "stall_ns", "compute_ns", "total_ns",
    "link_busy_ns",
)  # fmt: skip


def share_of_gain(time_D: Floats, reference_D: Floats, oracle_D: Floats) -> float | None:
    """How much of the time that the oracle saves over the reference a policy saves; None if it saves none."""
    gain = float(reference_D.sum() - oracle_D.sum())
    return float(reference_D.sum() - time_D.sum()) / gain if gain > 0 else None


def resampled(D: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """How often each document is drawn, ``[R, D]``."""
    drawn = np.random.default_rng(seed).integers(0, D, (resamples, D))
    counts = np.zeros((resamples, D), dtype=np.int64)
    np.add.at(counts, (np.repeat(np.arange(resamples), D), drawn.reshape(-1)), 1)
    return counts


def interval(values_R: Floats) -> tuple[float, float]:
    """The middle 95 % of resampled values that are numbers."""
    good = values_R[np.isfinite(values_R)]
    if not len(good):
        return float("nan"), float("nan")
    low, high = np.percentile(good, [2.5, 97.5])
    return float(low), float(high)


def bounds(values_R: Floats) -> tuple[float | None, float | None]:
    """:func:`interval`, None where there is none, as JSON has it."""
    low, high = interval(values_R)
    return (low, high) if np.isfinite(low) else (None, None)


def cell_rows(
    found: Mapping[str, Mapping[str, Floats]],
    tokens_D: Floats,
    compute_ns_D: Floats,
    weights_RD: Weights,
    documents: int,
) -> dict[str, dict[str, Any]]:
    """A row per policy of one cell (machine, batch, budget), all over the same documents.

    Args:
        found: figures ``[D]`` of each policy's documents, by label.
        tokens_D: generated tokens of each document (or batch of them).
        compute_ns_D: time of each with all experts on the device.
        weights_RD: see :func:`specgate.report.simulate_groups.weights_of`; the same for all cells of a batch,
            so that they can be compared.
        documents: different ones; fewer than D where some are in several batches.
    """
    out: dict[str, dict[str, Any]] = {}
    reference, oracle = found.get(REFERENCE), found.get(ORACLE)
    total = float(tokens_D.sum())
    for label, figures in found.items():
        time_D = figures["total_ns"]
        sums = {name: float(figures[name].sum()) for name in COUNTED}
        asked = sums["hits"] + sums["late"] + sums["host_hits"] + sums["misses"] + sums["low_hits"]
        per_second_R = (weights_RD @ tokens_D) / (weights_RD @ time_D) * 1e9
        low, high = bounds(per_second_R)
        row: dict[str, Any] = {
            "policy": label,
            "documents": documents,
            "groups": len(tokens_D),
            "tokens": int(total),
            "tokens_per_second": total / sums["total_ns"] * 1e9,
            "tokens_per_second_low": low,
            "tokens_per_second_high": high,
            "against_resident": float(compute_ns_D.sum()) / sums["total_ns"],
            "hit_rate": sums["hits"] / asked if asked else None,
            "late_rate": sums["late"] / asked if asked else None,
            "low_rate": sums["low_hits"] / asked if asked else None,
            "file_rate": sums["misses"] / asked if asked else None,
            "stall_ms_per_token": sums["stall_ns"] * 1e-6 / total,
            "link_share": sums["link_busy_ns"] / sums["total_ns"],
            "useful_share": _useful(sums),
        }
        for name in ("demand_bytes", "prefetch_bytes", "wasted_bytes", "file_bytes"):
            row[name] = sums[name] / total
        if reference is not None and oracle is not None:
            ref_D, best_D = reference["total_ns"], oracle["total_ns"]
            row["share_of_gain"] = share_of_gain(time_D, ref_D, best_D)
            gain_R = weights_RD @ (ref_D - best_D)
            with np.errstate(divide="ignore", invalid="ignore"):
                share_R = np.where(gain_R > 0, (weights_RD @ (ref_D - time_D)) / gain_R, np.nan)
            row["share_low"], row["share_high"] = bounds(share_R)
        out[label] = row
    return out


def _useful(sums: Mapping[str, float]) -> float | None:
    """Share of the bytes fetched ahead that were used before they were evicted."""
    fetched = sums["prefetch_bytes"]
    return 1 - sums["wasted_bytes"] / fetched if fetched else None


def compare_to_best(
    rows: Mapping[str, dict[str, Any]],
    name: str,
    others: Sequence[str],
    found: Mapping[str, Mapping[str, Floats]],
    weights_RD: Weights,
) -> None:
    """Writes into the row of ``name`` which of ``others`` is fastest, and by how much it beats it."""
    rivals = [label for label in others if label in rows and label != name]
    if name not in rows or not rivals:
        return
    best = max(rivals, key=lambda label: float(rows[label]["tokens_per_second"]))
    rows[name]["best_reference"] = best
    _compare(rows, name, best, "against_best", found, weights_RD)


def compare_to_main(
    rows: Mapping[str, dict[str, Any]],
    main: str,
    found: Mapping[str, Mapping[str, Floats]],
    weights_RD: Weights,
) -> None:
    """Writes into every other row its speed in multiples of ``main``'s, on the same documents."""
    for name in rows:
        if main in rows and name != main:
            _compare(rows, name, main, "against_main", found, weights_RD)


def _compare(
    rows: Mapping[str, dict[str, Any]],
    name: str,
    other: str,
    key: str,
    found: Mapping[str, Mapping[str, Floats]],
    weights_RD: Weights,
) -> None:
    mine_D, other_D = found[name]["total_ns"], found[other]["total_ns"]
    low, high = bounds((weights_RD @ other_D) / (weights_RD @ mine_D))
    rows[name] |= {key: float(other_D.sum() / mine_D.sum()), f"{key}_low": low, f"{key}_high": high}
