"""Confidence decay: how fast trust falls with the horizon, and whether confidence falls as accuracy does.

No tensors here: this reads the rows that ``specgate.report.evaluate`` makes.

Two laws are fitted by least squares to accuracy (and to confidence) over the horizons h = 1, 2, ...; both
fall from ``start`` at h = 1 towards ``floor``, the accuracy of guessing (K/E), or with four horizons or more
to a level that is fitted too:

    exponential   y(h) = floor + (start - floor) exp(-(h - 1) / tau)
    power         y(h) = floor + (start - floor) h ** -b

A trustworthy forecast decays slowly. Its half-life is the number of layers further ahead at which half of
what it knows beyond the floor at h = 1 is left: tau ln 2, or 2 ** (1 / b) - 1. Beyond a thousand layers it
is not stated: so slow a decay cannot be told from none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
LEAST = 3
"""Horizons that a fit needs; with one more than that the floor is fitted as well."""
_SHAPES: dict[str, Callable[[Float, float], Float]] = {
    "exponential": lambda h, rate: np.exp(-(h - 1) * rate),
    "power": lambda h, rate: h**-rate,
}
LONGEST = 1000.0
_RATES = (1e-6, 20.0)


def confidence_decay(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean confidence against accuracy over the horizons, per trace, predictor and kind.

    Confidence is the mean probability that the forecast gives its K most probable experts; accuracy is the
    share of those experts that was used. A positive ``gap`` is overconfidence. ``confidence_uncalibrated`` is
    the same before scaling.

    Returns:
        One dict per (trace, stack, phase, predictor, kind), in the rows' order, with columns ``horizon``,
        ``confidence``, ``confidence_uncalibrated``, ``accuracy``, ``gap``, each nearest horizon first, and,
        with three horizons or more, ``fit``: ``{"accuracy": ..., "confidence": ...}`` of :func:`fit_decay`.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in ("trace", "stack", "phase", "predictor", "kind"))
        groups.setdefault(key, []).append(row)
    table = []
    for (trace, stack, phase, predictor, kind), members in groups.items():
        members = sorted(members, key=lambda row: row["horizon"])
        entry: dict[str, Any] = {
            "trace": trace,
            "stack": stack,
            "phase": phase,
            "predictor": predictor,
            "kind": kind,
            "horizon": [row["horizon"] for row in members],
            "confidence": [row["mean_confidence"] for row in members],
            "confidence_uncalibrated": [row.get("mean_confidence_uncalibrated") for row in members],
            "accuracy": [row["mean_accuracy"] for row in members],
            "gap": [round(row["mean_confidence"] - row["mean_accuracy"], 6) for row in members],
        }
        if len(set(entry["horizon"])) >= LEAST:
            chance = members[0]["top_k"] / members[0]["experts"]
            entry["fit"] = {
                column: fit_decay(entry["horizon"], entry[column], chance)
                for column in ("accuracy", "confidence")
            }
        table.append(entry)
    return table


def fit_decay(horizons: Sequence[int], values: Sequence[float], chance: float) -> dict[str, Any]:
    """Both laws fitted to values over horizons, and which one fits better.

    Args:
        horizons: at least three different ones.
        values: accuracy or confidence at each.
        chance: accuracy of guessing, the floor that is not fitted.

    Returns:
        ``best`` (name of a law and of how its floor was found, by least error, corrected for the number of
        parameters) and ``laws``: per law ``floor``, ``floor_fitted``, ``start``, ``rate`` (1 / tau or b),
        ``tau`` (exponential), ``half_life`` (layers; None if there is no decay), ``r2`` (share of the
        variance explained), ``rmse`` and ``predicted`` (at the horizons).

    Raises:
        ValueError: for fewer than three horizons.
    """
    h, y = np.asarray(horizons, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(np.unique(h)) < LEAST:
        raise ValueError(f"{len(np.unique(h))} horizons do not show a decay: at least {LEAST} are needed")
    laws: dict[str, dict[str, Any]] = {}
    scores: dict[str, float] = {}
    for name, shape in _SHAPES.items():
        for fitted in (False, True) if len(h) > LEAST else (False,):
            key = f"{name}, fitted floor" if fitted else name
            law = _fit_law(h, y, shape, None if fitted else chance)
            left = len(h) - (3 if fitted else 2)
            scores[key] = law["sse"] / left if left else math.inf
            laws[key] = _describe(name, law, h, y)
    return {"best": min(scores, key=lambda key: scores[key]), "laws": laws}


def decay_curve(law: Mapping[str, Any], horizons: Float) -> Float:
    """The fitted law at any horizons (also between them)."""
    shape = _SHAPES[law["law"]]
    return np.asarray(law["floor"] + (law["start"] - law["floor"]) * shape(horizons, law["rate"]))


def _fit_law(
    h: Float, y: Float, shape: Callable[[Float, float], Float], floor: float | None
) -> dict[str, Any]:
    """Least squares: linear in start and floor for a given rate, golden section over ln rate from the best
    point of a grid.
    """

    def at(log_rate: float) -> tuple[float, float, float]:
        s = shape(h, math.exp(log_rate))
        if floor is not None:
            start = floor + float(s @ (y - floor)) / float(s @ s)
            return float(((floor + (start - floor) * s - y) ** 2).sum()), start, floor
        design = np.stack([s, 1 - s], axis=1)
        (start, bottom), *_ = np.linalg.lstsq(design, y, rcond=None)
        bottom = min(max(float(bottom), 0.0), 1.0)  # a share; the start that goes with it:
        start = bottom + float(s @ (y - bottom)) / float(s @ s)
        return float(((bottom + (start - bottom) * s - y) ** 2).sum()), start, bottom

    grid = np.linspace(math.log(_RATES[0]), math.log(_RATES[1]), 200)
    best = int(np.argmin([at(x)[0] for x in grid.tolist()]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if at(a)[0] <= at(b)[0] else (a, high)
    rate = math.exp((low + high) / 2)
    error, start, bottom = at(math.log(rate))
    return {"sse": error, "start": start, "floor": bottom, "rate": rate, "floor_fitted": floor is None}


def _describe(name: str, law: Mapping[str, Any], h: Float, y: Float) -> dict[str, Any]:
    rate, spread = law["rate"], float(((y - y.mean()) ** 2).sum())
    life = math.log(2) / rate if name == "exponential" else 2 ** min(1 / rate, 60.0) - 1
    half_life = life if life <= LONGEST else None
    described = {
        "law": name,
        "floor": round(law["floor"], 6),
        "floor_fitted": law["floor_fitted"],
        "start": round(law["start"], 6),
        "rate": round(rate, 8),
        "half_life": None if half_life is None else round(half_life, 4),
        "r2": round(1 - law["sse"] / spread, 6) if spread > 1e-12 else None,
        "rmse": round(math.sqrt(law["sse"] / len(h)), 8),
    }
    if name == "exponential":
        described["tau"] = None if half_life is None else round(1 / rate, 4)
    predicted = law["floor"] + (law["start"] - law["floor"]) * _SHAPES[name](h, rate)
    return described | {"predicted": [round(value, 6) for value in predicted.tolist()]}
