"""How likely an expert is used again: recency and frequency in one number, fitted by maximum likelihood.

Letters: L MoE layers, E experts of a layer, S steps, G bins.

The model (a log-binomial regression; Wacholder, 1986, doi:10.1093/oxfordjournals.aje.a114212): before step s,
an expert with f decayed uses per step is used at the next event of its layer with the probability

    q = min(1, exp(intercept + slope * log(f + 1e-6))),

    f = (1 - g) * sum of g ** (s - s_i) over its uses s_i < s,   g = 2 ** (-1 / half_life).

Slope 1 and intercept 0 say that the future is as the past was; a smaller slope shrinks towards the mean. The
log-likelihood is concave in intercept and slope, so that Newton's method finds the maximum; the half-life is
the best of a geometric grid. Sufficient statistics are gathered in bins of log f.

The likelihood is that of the experts which a cache of the budget has to choose among: those whose recency
rank in their layer is at most twice the layer's share of slots. What never comes near the cache would
otherwise decide on the half-life.

The discount is the maximum-likelihood rate of a geometric life time: of all slots that were held through an
event, the share that was not handed to another expert in it, in LRU caches of the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.policy.distances import miss_curves_LC, ranks_SE
from specgate.policy.memo import once_per_workload
from specgate.policy.workload import Workload

Floats = NDArray[np.float64]
HALF_LIVES = (2.0, 4.0, 6.0, 8.0, 11.0, 16.0, 23.0, 32.0, 64.0, 128.0, 256.0)
_FLOOR = 1e-6
_BINS = 400
_STEPS = 20_000  # of the training documents; more change nothing in the third digit


@dataclass(frozen=True)
class Reuse:
    """A fitted model of reuse.

    Attributes:
        half_life: in steps.
        intercept, slope: see the module.
        discount: per event.
        nll: mean negative log-likelihood of such an expert's use at an event, in nats.
    """

    half_life: float
    intercept: float
    slope: float
    discount: float
    nll: float


def used_SLE(workload: Workload) -> NDArray[np.bool_]:
    """Whether each expert is used in each step: ``[S, L, E]``."""
    event_M = np.repeat(np.arange(workload.events), np.diff(workload.event_start_N1))
    used_NE = np.zeros((workload.events, workload.experts), dtype=bool)
    used_NE[event_M, workload.expert_M] = True
    return used_NE.reshape(workload.steps, workload.layers, workload.experts)


def binned(
    used: NDArray[np.bool_], half_life: float, keep: NDArray[np.bool_] | None = None
) -> tuple[Floats, Floats, Floats]:
    """Statistics of all (step, layer, expert) after the first step, per bin of log f.

    Args:
        used: ``[S, L, E]``.
        half_life: in steps.
        keep: ``[S, L, E]``, which of them count; None: all.

    Returns:
        The mean log f, how many, and how many of them used; bins without any are left out.
    """
    S = len(used)
    g = 2.0 ** (-1.0 / half_life)
    lowest = np.log(_FLOOR)
    f_LE = np.zeros(used.shape[1:])
    x_sum, count, hits = np.zeros(_BINS), np.zeros(_BINS), np.zeros(_BINS)
    rows = max(1, (1 << 20) // f_LE.size)
    for first in range(0, S, rows):
        part = used[first : first + rows]
        f_RLE = np.empty(part.shape)
        for i, now_LE in enumerate(part):
            f_RLE[i] = f_LE
            f_LE = g * (f_LE + (1 - g) * now_LE)  # before the next step, its age is 1
        counts = np.ones(part.shape, dtype=bool) if keep is None else keep[first : first + rows].copy()
        if first == 0:
            counts[0] = False  # before the first step nothing is known of any expert
        x = np.log(f_RLE[counts] + _FLOOR)
        of = np.clip(((x - lowest) / -lowest * _BINS).astype(np.int64), 0, _BINS - 1)
        x_sum += np.bincount(of, weights=x, minlength=_BINS)
        count += np.bincount(of, minlength=_BINS)
        hits += np.bincount(of, weights=part[counts], minlength=_BINS)
    full = count > 0
    return x_sum[full] / count[full], count[full], hits[full]


def likelihood(
    intercept: float, slope: float, x_G: Floats, count_G: Floats, hits_G: Floats
) -> tuple[float, Floats, Floats]:
    """Negative log-likelihood, its gradient ``[2]`` and its Hessian ``[2, 2]`` in intercept and slope."""
    eta = np.minimum(intercept + slope * x_G, -1e-4)
    q = np.exp(eta)
    missed = count_G - hits_G
    nll = -(hits_G * eta + missed * np.log1p(-q)).sum()
    slope_G = -hits_G + missed * q / (1 - q)
    curve_G = missed * q / (1 - q) ** 2
    design = np.stack([np.ones_like(x_G), x_G])
    return float(nll), design @ slope_G, (design * curve_G) @ design.T


def fit_line(x_G: Floats, count_G: Floats, hits_G: Floats) -> tuple[float, float, float]:
    """Intercept, slope (not below 0) and negative log-likelihood at the maximum.

    Newton's method with a halved step where that does not get better; q = 1 is kept out of reach.
    """
    rate = max(hits_G.sum() / count_G.sum(), 1e-9)
    at = np.array([np.log(rate), 0.0])  # the constant model: always below q = 1
    nll, gradient, hessian = likelihood(at[0], at[1], x_G, count_G, hits_G)
    for _ in range(100):
        step = np.linalg.solve(hessian + 1e-9 * np.trace(hessian) * np.eye(2), gradient)
        scale = 1.0
        while scale > 1e-8:
            trial = at - scale * step
            trial[1] = max(trial[1], 0.0)
            if (trial[0] + trial[1] * x_G).max() < 0:
                found = likelihood(trial[0], trial[1], x_G, count_G, hits_G)
                if found[0] <= nll:
                    break
            scale /= 2
        else:
            break
        done = nll - found[0] < 1e-10 * abs(nll)
        at, (nll, gradient, hessian) = trial, found
        if done:
            break
    return float(at[0]), float(at[1]), nll


def fit_discount(train: Workload, slots: int) -> float:
    """The chance that a slot is not handed over in an event, with LRU caches of ``slots / L`` per layer."""
    if train.events == 0 or slots <= 0:
        return 1.0
    curves = miss_curves_LC(train)
    per_layer = min(max(slots // train.layers, train.top_k), train.experts)
    handed_over = float(curves[:, per_layer].sum())
    if per_layer == train.experts:
        handed_over = 0.0  # what misses there is a first use, into a free slot
    held = float(train.events) * per_layer * train.layers
    return min(max(1.0 - handed_over / held, 0.0), 1.0)


@once_per_workload
def fit_reuse(train: Workload, slots: int, half_lives: tuple[float, ...] = HALF_LIVES) -> Reuse:
    """Fits the model to training documents.

    Args:
        train: documents in the order in which they are run.
        slots: device slots in all, for the discount.
        half_lives: candidates, in steps.

    Raises:
        ConfigError: fewer than two steps.
    """
    if train.steps < 2:
        raise ConfigError(
            f"{train.steps} training steps say nothing about reuse; give at least one document."
        )
    train = train.part(0, min(train.steps, _STEPS))
    used = used_SLE(train)
    near = np.stack([ranks_SE(train, layer) for layer in range(train.layers)], axis=1) <= 2 * max(
        slots // train.layers, 1
    )
    best: tuple[float, float, float, float] | None = None
    for half_life in half_lives:
        intercept, slope, nll = fit_line(*binned(used, half_life, near))
        if best is None or nll < best[0]:
            best = (nll, half_life, intercept, slope)
    assert best is not None
    nll, half_life, intercept, slope = best
    return Reuse(half_life, intercept, slope, fit_discount(train, slots), nll / int(near[1:].sum()))
