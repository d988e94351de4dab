"""Small random simulations for hypothesis: workloads, forecasts, costs, rules and room."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from specgate.policy.costs import Costs
from specgate.policy.rules import EVICTIONS, Rules
from specgate.policy.workload import Forecasts, Workload
from specgate.runtime import native
from specgate.runtime.simulator import COUNTS, TIMES, SimulationResult, simulate
from tests.runtime.simulator_reference import Reference

needs_native = pytest.mark.skipif(not native.available(), reason="the native core was not compiled")
#: Multiples of 1/8: sums are exact in any order, so that equal times are equal in both implementations.
ROUND = st.integers(0, 40).map(lambda x: x / 8)
#: Any double: equal times do not happen by chance.
ROUGH = st.integers(0, 2**40).map(lambda x: 5.0 * ((x * 0.6180339887498949) % 1.0))


@dataclass(frozen=True)
class Case:
    """All arguments of a simulation."""

    workload: Workload
    costs: Costs
    rules: Rules
    slots: list[int]
    host_slots: int
    warm: list[int]
    warm_host: list[int]

    def run(self, **changes: Any) -> SimulationResult:
        case = replace(self, **changes)
        slots = case.slots[0] if len(case.slots) == 1 else case.slots
        return simulate(
            case.workload, case.costs, case.rules, slots, case.host_slots, case.warm, case.warm_host
        )

    def reference(self) -> Reference:
        return Reference(
            self.workload, self.costs, self.rules, self.slots, self.host_slots, self.warm, self.warm_host
        )


@st.composite
def workloads(draw: st.DrawFn, least: int = 0, forecasts: bool = True) -> Workload:
    """1 to 3 layers, 2 to 5 experts, up to 10 steps of up to 3 documents."""
    L, E = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    K = draw(st.integers(1, min(3, E)))
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    S = sum(lengths)
    sets = st.sets(st.integers(0, E - 1), min_size=least, max_size=K)
    events = [sorted(draw(sets)) for _ in range(S * L)]
    start_N1 = np.concatenate([[0], np.cumsum([len(e) for e in events])]).astype(np.int64)
    expert_M = np.array([x for e in events for x in e], dtype=np.int32)
    document_S = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    found = None
    if forecasts and draw(st.booleans()):
        H = draw(st.integers(1, 5))
        levels = st.sampled_from([0.0, 0.0, 0.0, 0.25, 0.5, 0.7, 0.9, 1.0])
        count = S * (L + 1) * H * E
        p = draw(st.lists(levels, min_size=count, max_size=count))
        found = Forecasts.from_dense(np.array(p, dtype=np.float32).reshape(S * (L + 1), H, E))
    return Workload(L, E, K, start_N1, expert_M, np.ones_like(expert_M), document_S, found)


@st.composite
def costs_of(draw: st.DrawFn, workload: Workload) -> Costs:
    """Copies that take about as long as events, or much longer."""
    rough = draw(st.booleans())
    one = ROUGH if rough else ROUND
    times = st.lists(one, min_size=workload.events, max_size=workload.events)
    pre_N, exec_N = np.array(draw(times)), np.array(draw(times))
    parts = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=workload.events, max_size=workload.events)
    return Costs(
        expert_bytes=64,
        link_bytes_per_ns=draw(st.sampled_from([8.0, 16.0, 64.0])) * (1.0 + draw(ROUGH) if rough else 1.0),
        link_latency_ns=draw(one),
        link_chunk_bytes=draw(st.sampled_from([0, 8, 16, 48])),
        forecast_share=draw(st.sampled_from([1.0, 1.0, 0.5, 0.8])),
        file_bytes_per_ns=draw(st.sampled_from([4.0, 16.0])) * (1.0 + draw(ROUGH) if rough else 1.0),
        file_latency_ns=draw(one),
        event_ns=draw(one),
        forecast_ns=draw(st.one_of(st.just(0.0), one)),
        pre_ns_N=pre_N,
        exec_ns_N=exec_N,
        launch_ns_N=2 * np.array(draw(times)) if draw(st.booleans()) else None,
        link_slowdown=draw(st.sampled_from([0.0, 0.125, 0.5, 2.0])),
        host_pre_ns_N=pre_N * draw(parts) if draw(st.booleans()) else None,
        host_exec_ns_N=exec_N * draw(parts) if draw(st.booleans()) else None,
    )


@st.composite
def rules_of(draw: st.DrawFn, workload: Workload, prefetch: bool = True) -> Rules:
    """Any."""
    L, E = workload.layers, workload.experts
    p = st.sampled_from([0.0, 0.2, 0.5, 0.6, 0.9])
    fetch = ("none", "threshold", "top", "cumulative", "priced", "priced") if prefetch else ("none",)
    eviction, fetched = draw(st.sampled_from(EVICTIONS)), draw(st.sampled_from(fetch))
    weights = draw(st.lists(st.integers(0, 5), min_size=L * E, max_size=L * E))
    return Rules(
        eviction=eviction,
        half_life=draw(st.sampled_from([0.7, 3.0, 50.0])),
        weights_LE=np.array(weights, dtype=np.float64).reshape(L, E) if eviction == "static" else None,
        admission=draw(st.sampled_from(["always", "always", "gate"])),
        prefetch=fetched,
        thresholds_L=np.array([draw(p) for _ in range(L)]) if fetched == "threshold" else None,
        load_rise=draw(st.sampled_from([0.0, 0.5])),
        full_rise=draw(st.sampled_from([0.0, 0.3])),
        host_rise=draw(st.sampled_from([0.0, 0.2])),
        width=draw(st.integers(1, 3)),
        mass=draw(st.sampled_from([0.3, 0.8, 1.0])),
        depth=draw(st.integers(1, 5)),
        adaptive=draw(st.booleans()),
        entropy_high=draw(st.sampled_from([0.4, 0.7, 1.0])),
        backlog_high=draw(st.sampled_from([0.5, 2.0, np.inf])),
        discount=draw(st.sampled_from([0.83, 0.97])),
        intercept=draw(st.sampled_from([-0.3, 0.1])),
        slope=draw(st.sampled_from([0.4, 0.9])),
        price_scale=draw(st.sampled_from([0.0, 0.4, 1.0])),
        price_floor=draw(st.sampled_from([0.0, 0.0, 0.3])),
        low_bytes=draw(st.sampled_from([0, 0, 12, 24])) if fetched == "priced" else 0,
    )


@st.composite
def cases(draw: st.DrawFn, prefetch: bool = True, tiers: bool = True) -> Case:
    """Anything that can be simulated."""
    workload = draw(workloads(forecasts=prefetch))
    L, E = workload.layers, workload.experts
    widest = max(1, workload.widest)
    room = st.integers(widest, widest + draw(st.sampled_from([0, 2, 6])))
    slots = [draw(room)] if draw(st.booleans()) else [draw(room) for _ in range(L)]
    host_slots = draw(st.integers(0, L * E)) if tiers and draw(st.booleans()) else L * E
    warm: list[int] = []
    if draw(st.booleans()):
        left = list(slots)
        for b in draw(st.permutations(range(L * E))):
            pool = 0 if len(slots) == 1 else b // E
            if left[pool]:
                left[pool] -= 1
                warm.append(b)
    warm_host = draw(st.permutations(range(L * E)))[: draw(st.integers(0, host_slots))]
    if host_slots == L * E:
        warm_host = []
    return Case(
        workload,
        draw(costs_of(workload)),
        draw(rules_of(workload, prefetch)),
        slots,
        host_slots,
        warm,
        warm_host,
    )


def agree(result: SimulationResult, reference: Reference) -> None:
    """Counters are the same, times to nine digits."""
    for d, (counts, times) in enumerate(zip(reference.counts, reference.times, strict=True)):
        for name in COUNTS:
            assert result.counts[name][d] == counts[name], (d, name)
        for name in TIMES:
            assert result.times[name][d] == pytest.approx(times[name], rel=1e-9, abs=1e-9), (d, name)
