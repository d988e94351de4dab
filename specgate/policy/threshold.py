"""Confidence threshold: fetch what is foreseen surely enough; how surely follows memory and link.

Letters: L MoE layers, E experts of a layer, M entries of forecasts, C slots of a layer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.policy.base import (
    ForecastSource,
    Policy,
    check_depth,
    check_eviction,
    check_slots,
    forecasts_of,
)
from specgate.policy.costs import Costs
from specgate.policy.distances import miss_curves_LC, ranks_SE
from specgate.policy.pricing import price_of_link, saved_time
from specgate.policy.reuse import used_SLE
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class Threshold(Policy):
    """The ``threshold`` policy: confidence thresholds per layer that rise with the load.

    Fetching above a fixed confidence is what most published prefetchers do (e.g. AdapMoE, arXiv:2408.10284).
    Here each layer's threshold is the one that would have saved most on training documents, and it rises
    towards 1 (no prefetch, on-demand loading alone) as the link, the device and the host memory fill.

    Args:
        threshold: one for all layers; None fits one per layer on training documents.
        depth: events ahead.
        load_rise: how far the share of the link's time that demands use raises it; 1: to 1 at a full link.
        full_rise: the same for the share of device slots in use.
        host_rise: the same for the share of host slots in use.
        eviction: who goes first.
        calibrated: whether a predictor's probabilities are calibrated first.
    """

    name: ClassVar[str] = "threshold"
    forecast_source: ClassVar[ForecastSource] = "predictor"

    def __init__(
        self,
        threshold: float | None = None,
        depth: int = 3,
        load_rise: float = 0.25,
        full_rise: float = 0.1,
        host_rise: float = 0.1,
        eviction: str = "lru",
        calibrated: bool = True,
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold={threshold} is no probability; choose 0 to 1, or null to fit it.")
        self.threshold, self.calibrated = threshold, calibrated
        self.depth = check_depth(self.name, depth)
        self.eviction = check_eviction(eviction)
        self.load_rise, self.full_rise, self.host_rise = load_rise, full_rise, host_rise
        Rules(load_rise=load_rise, full_rise=full_rise, host_rise=host_rise)  # checks them

    @property
    def horizons(self) -> int:
        return self.depth

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        if self.threshold is not None:
            thresholds = np.full(train.layers, self.threshold)
        else:
            thresholds = fit_thresholds(train, costs, slots, self.depth)
        return Rules(
            eviction=self.eviction,
            prefetch="threshold",
            thresholds_L=thresholds,
            depth=self.depth,
            load_rise=self.load_rise,
            full_rise=self.full_rise,
            host_rise=self.host_rise,
        )


def fit_thresholds(train: Workload, costs: Costs, slots: int, depth: int) -> NDArray[np.float64]:
    """The threshold of each layer that would have saved most time: float64 ``[L]``.

    Candidates are forecasts of experts that an LRU cache of the layer's share of slots does not hold. One
    that is used saves :func:`~specgate.policy.pricing.saved_time`; each costs the expected load of its LRU
    victim and the link's time at the utilisation that LRU's misses cause.

    Raises:
        NotApplicableError: the documents have no forecasts.
    """
    forecasts = forecasts_of("threshold", train)
    L, S = train.layers, train.steps
    per_layer = min(max(slots // L, 1), train.experts)
    curves = miss_curves_LC(train)
    load_ns = costs.copy_ns
    misses_ns = float(curves[:, per_layer].sum()) * load_ns
    price = price_of_link(misses_ns / (misses_ns + costs.compute_ns), costs.link_chunk_bytes > 0)
    mean_event_ns = costs.compute_ns / max(costs.events, 1)

    h_M = forecasts.horizon_M.astype(np.int64)
    point_M = np.repeat(np.arange(train.points), np.diff(forecasts.start_P1))
    event_M = (point_M // (L + 1)) * L + point_M % (L + 1) + h_M - 1
    saved_H = [saved_time(load_ns, load_ns, h, mean_event_ns) for h in range(1, depth + 1)]
    saved_M = np.asarray([0.0, *saved_H])[np.minimum(h_M, depth)]
    used = used_SLE(train)
    thresholds = np.ones(L)
    for layer in range(L):
        mine = np.nonzero((event_M % L == layer) & (h_M <= depth) & (event_M < S * L))[0]
        step, expert = event_M[mine] // L, forecasts.expert_M[mine]
        absent = ranks_SE(train, layer)[step, expert] > per_layer
        mine, step, expert = mine[absent], step[absent], expert[absent]
        if not len(mine):
            continue
        victim = (curves[layer, per_layer - 1] - curves[layer, per_layer]) / S
        gain = used[step, layer, expert] * saved_M[mine] - (victim * load_ns + price * costs.copy_ns)
        thresholds[layer] = best_threshold(forecasts.p_M[mine], gain)
    return thresholds


def best_threshold(p_M: NDArray[np.floating], gain_M: NDArray[np.floating]) -> float:
    """The threshold whose takers (``p >= threshold``) gain most in all; 1 if none gain anything."""
    order = np.argsort(-p_M, kind="stable")
    p, total = p_M[order].astype(np.float64), np.cumsum(gain_M[order])
    last = np.append(p[1:] < p[:-1], True)  # the last of equal ones stands for all of them
    p, total = p[last], total[last]
    best = int(total.argmax())
    return float(p[best]) if total[best] > 0 else 1.0
