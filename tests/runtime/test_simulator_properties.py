"""What a simulation promises whatever it is given."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from specgate.policy.rules import EVICTIONS, Rules
from specgate.policy.workload import Workload, oracle_forecasts
from specgate.runtime.simulator import COUNTS, TIMES, Simulator
from tests.runtime.simulations import Case, cases, needs_native

pytestmark = needs_native
some = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def simulator_of(case: Case, rules: Rules | None = None) -> Simulator:
    slots = case.slots[0] if len(case.slots) == 1 else case.slots
    return Simulator(
        case.workload, case.costs, rules or case.rules, slots, case.host_slots, case.warm, case.warm_host
    )


def misses_of(case: Case, slots: int, eviction: str) -> float:
    weights = np.zeros((case.workload.layers, case.workload.experts)) if eviction == "static" else None
    rules = replace(case.rules, eviction=eviction, weights_LE=weights)
    return case.run(rules=rules, slots=[slots], warm=[]).total("host_hits")


@some
@given(cases(), st.floats(0, 1), st.integers(1, 5), st.integers(0, 40))
def test_slots_are_never_exceeded_and_experts_in_use_stay(
    case: Case, threshold: float, depth: int, delay: int
) -> None:
    case = replace(case, costs=replace(case.costs, forecast_ns=delay / 8))
    simulator, w = simulator_of(case), case.workload
    while simulator.advance() is not None:
        here = simulator.resident()
        pools = Counter(0 if len(case.slots) == 1 else b // w.experts for b in here)
        assert all(count <= case.slots[pool] for pool, count in pools.items())
        n = simulator.event
        if simulator.in_use:
            assert {n % w.layers * w.experts + e for e in w.event(n)} <= set(here), n
        simulator.act(threshold, depth)


@some
@given(cases(prefetch=False, tiers=False), st.integers(0, 6))
def test_belady_misses_least_and_less_with_more_slots(case: Case, more: int) -> None:
    slots = max(1, case.workload.widest) + more
    case = replace(case, rules=replace(case.rules, admission="always"))
    best = misses_of(case, slots, "belady")
    assert misses_of(case, slots + 1, "belady") <= best
    gate = replace(case, rules=replace(case.rules, admission="gate"))
    for eviction in EVICTIONS:
        assert best <= misses_of(case, slots, eviction), eviction
        assert best <= misses_of(gate, slots, eviction), eviction


@some
@given(cases(prefetch=False, tiers=False), st.integers(0, 3), st.sampled_from(["forecast", "belady"]))
def test_perfect_prefetch_over_an_endless_link_never_stalls(case: Case, more: int, eviction: str) -> None:
    w = case.workload
    fast = replace(
        case.costs,
        link_bytes_per_ns=1e15,
        link_latency_ns=0.0,
        forecast_ns=0.0,
        pre_ns_N=case.costs.pre_ns_N + 1.0,
        exec_ns_N=case.costs.exec_ns_N + 1.0,
    )
    rules = Rules(eviction=eviction, prefetch="threshold", thresholds_L=np.full(w.layers, 0.5))
    foreseen = w.with_forecasts(oracle_forecasts(w, 1))
    result = case.run(
        workload=foreseen, costs=fast, rules=rules, slots=[2 * max(1, w.widest) + more], warm=[]
    )
    assert result.total("stall_ns") < 1e-6
    assert result.total("hits") == len(w.expert_M)


@some
@given(cases())
def test_times_and_bytes_add_up(case: Case) -> None:
    result, size = case.run(), case.costs.expert_bytes
    count, time = result.counts, result.times
    events_of = np.repeat(case.workload.document_S, case.workload.layers)
    demanded = np.bincount(
        events_of, weights=np.diff(case.workload.event_start_N1), minlength=case.workload.documents
    )
    assert (result.demands_D == demanded).all()
    assert time["total_ns"] == pytest.approx(time["compute_ns"] + time["stall_ns"], rel=1e-9, abs=1e-9)
    alone = replace(case.costs, launch_ns_N=None).compute_ns
    most = case.costs.compute_ns * (1 + case.costs.link_slowdown)
    assert result.total("compute_ns") <= most * (1 + 1e-9) + 1e-9
    assert result.total("compute_ns") >= alone * (1 - 1e-9), "launches hide behind waiting, nothing else does"
    assert (count["demand_bytes"] == size * (count["host_hits"] + count["misses"])).all()
    if not case.rules.low_bytes:
        assert (count["prefetch_bytes"] == size * count["prefetches"]).all()
        assert result.total("low_hits") == 0
    assert result.total("wasted_bytes") <= result.total("prefetch_bytes")
    assert (count["file_bytes"] >= size * count["misses"]).all()
    copied = result.total("demand_bytes") + result.total("prefetch_bytes")
    copies = copied / size + result.total("prefetches")  # approximate ones have a latency of their own
    assert result.total("link_busy_ns") <= copies * case.costs.copy_ns * (1 + 1e-9)
    assert (count["steps"] == np.bincount(case.workload.document_S)).all()
    assert result.hit_rate <= 1
    assert set(result.totals()) == {*COUNTS, *TIMES}


@some
@given(cases(prefetch=False), st.sampled_from([0.3, 5.0]))
def test_copies_that_the_model_waits_for_slow_nothing_down(case: Case, slowdown: float) -> None:
    """Bit for bit: without prefetches there are no others."""
    slow, free = (
        case.run(costs=replace(case.costs, link_slowdown=value)).totals() for value in (slowdown, 0.0)
    )
    assert slow == free


@some
@given(cases(), st.sampled_from([0.3, 5.0]))
def test_a_slower_host_makes_no_event_shorter(case: Case, slowdown: float) -> None:
    """Whatever the prefetches do: compute is what it was, and what the slowdown adds."""
    slow = case.run(costs=replace(case.costs, link_slowdown=slowdown))
    device = replace(case.costs, launch_ns_N=None).compute_ns
    assert slow.total("compute_ns") >= device * (1 - 1e-9)
    unbound = replace(
        case.costs, link_slowdown=slowdown, launch_ns_N=None, event_ns=0.0, host_pre_ns_N=None,
        host_exec_ns_N=None,
    )  # fmt: skip
    assert case.run(costs=unbound).totals() == case.run(costs=replace(unbound, link_slowdown=0.0)).totals()


@some
@given(cases())
def test_the_same_input_gives_the_same_bits(case: Case) -> None:
    simulator = simulator_of(case)
    first, second = simulator.run(), case.run()
    simulator.reset()
    for other in (second, simulator.run()):
        assert first.totals() == other.totals()
        assert all((first.of_documents(x) == other.of_documents(x)).all() for x in (*COUNTS, *TIMES))


def one_layer(workload: Workload, layer: int) -> Workload:
    events = [workload.event(n) for n in range(layer, workload.events, workload.layers)]
    experts = np.array([x for e in events for x in e], dtype=np.int32)
    start_N1 = np.concatenate([[0], np.cumsum([len(e) for e in events])]).astype(np.int64)
    E, K, of_S = workload.experts, workload.top_k, workload.document_S
    return Workload(1, E, K, start_N1, experts, np.ones_like(experts), of_S)


@some
@given(cases(prefetch=False, tiers=False), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_slots_per_layer_are_caches_of_their_own(case: Case, more: list[int]) -> None:
    w, L = case.workload, case.workload.layers
    slots = [max(1, w.widest) + m for m in more[:L]]
    together = case.run(slots=slots, warm=[])
    hits = evictions = 0.0
    for layer in range(L):
        own = slice(layer, None, L)
        pre_N, exec_N = case.costs.pre_ns_N[own], case.costs.exec_ns_N[own]
        own_costs = {"pre_ns_N": pre_N, "exec_ns_N": exec_N, "host_pre_ns_N": None, "host_exec_ns_N": None}
        costs = replace(case.costs, **own_costs, launch_ns_N=None)
        weights = case.rules.weights_LE
        rules = replace(case.rules, weights_LE=None if weights is None else weights[layer : layer + 1])
        alone = case.run(
            workload=one_layer(w, layer),
            costs=costs,
            rules=rules,
            slots=[slots[layer]],
            warm=[],
            host_slots=w.experts,
        )
        hits, evictions = hits + alone.total("hits"), evictions + alone.total("evictions")
    assert (together.total("hits"), together.total("evictions")) == (hits, evictions)


@some
@given(cases(), st.sampled_from([0.0, 0.3, 0.5, 0.9, 2.0]), st.integers(1, 5))
def test_stepping_with_a_constant_action_is_the_threshold_rule(
    case: Case, threshold: float, depth: int
) -> None:
    assume(case.workload.forecasts is not None)
    rules = replace(
        case.rules,
        prefetch="none",
        low_bytes=0,
        load_rise=0.0,
        full_rise=0.0,
        host_rise=0.0,
        adaptive=False,
        depth=depth,
    )
    if threshold <= 1:
        thresholds = np.full(case.workload.layers, threshold)
        expected = case.run(rules=replace(rules, prefetch="threshold", thresholds_L=thresholds))
    else:
        expected = case.run(rules=rules)
    simulator = simulator_of(case, rules)
    points = 0
    while (seen := simulator.advance()) is not None:
        assert np.isfinite(seen).all()
        assert seen.min() >= 0
        assert np.delete(seen, 1).max() <= 1 + 1e-6
        simulator.act(threshold, depth)
        points += 1
    assert simulator.result().totals() == expected.totals()
    unknown = case.costs.forecast_ns > 0  # the last ones may not be known before the end
    assert points <= case.workload.points
    assert unknown or points == case.workload.points
