"""Confidence decay: does confidence fall with the horizon as fast as accuracy does?

No tensors here: this reads the rows that ``specgate.report.evaluate`` makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def confidence_decay(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean confidence against accuracy over the horizons, per trace, predictor and kind.

    Confidence is the mean probability that the forecast gives its K most probable experts; accuracy is the
    share of those experts that was used. A positive ``gap`` is overconfidence. ``confidence_uncalibrated`` is
    the same before temperature scaling.

    Returns:
        One dict per (trace, stack, phase, predictor, kind), in the rows' order, with columns ``horizon``,
        ``confidence``, ``confidence_uncalibrated``, ``accuracy``, ``gap``, each nearest horizon first.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("trace", "stack", "phase", "predictor", "kind"))
        groups.setdefault(key, []).append(row)
    table = []
    for (trace, stack, phase, predictor, kind), members in groups.items():
        members = sorted(members, key=lambda row: row["horizon"])
        table.append(
            {
                "trace": trace,
                "stack": stack,
                "phase": phase,
                "predictor": predictor,
                "kind": kind,
                "horizon": [row["horizon"] for row in members],
                "confidence": [row["mean_confidence"] for row in members],
                "confidence_uncalibrated": [row["mean_confidence_uncalibrated"] for row in members],
                "accuracy": [row["mean_accuracy"] for row in members],
                "gap": [round(row["mean_confidence"] - row["mean_accuracy"], 6) for row in members],
            }
        )
    return table
