"""The simulator against two references in Python, written from docs/simulator.md."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specgate.policy.rules import EVICTIONS
from specgate.runtime.simulator import Simulator
from tests.runtime.simulations import Case, agree, cases, needs_native
from tests.runtime.simulator_counts import counts_of

pytestmark = needs_native
many = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(cases())
def test_everything_is_as_the_long_reference_says(case: Case) -> None:
    slots = case.slots[0] if len(case.slots) == 1 else case.slots
    simulator = Simulator(
        case.workload, case.costs, case.rules, slots, case.host_slots, case.warm, case.warm_host
    )
    reference = case.reference()
    agree(simulator.run(), reference)
    assert simulator.resident() == sorted(reference.present)


@many
@given(cases(), st.sampled_from([8, 24, 40]))
def test_approximate_copies_are_as_the_long_reference_says(case: Case, low_bytes: int) -> None:
    """The same with events long enough, and prices low enough, for approximate copies to be common."""
    rules = replace(
        case.rules, prefetch="priced", thresholds_L=None, low_bytes=low_bytes, depth=3, price_scale=0.0
    )
    before, runs = case.costs.pre_ns_N + 4, case.costs.exec_ns_N + 4
    case = replace(case, rules=rules, costs=replace(case.costs, pre_ns_N=before, exec_ns_N=runs))
    agree(case.run(), case.reference())


@many
@given(cases(prefetch=False, tiers=False), st.integers(0, 6))
def test_counts_are_those_of_forty_lines(case: Case, more: int) -> None:
    slots = max(1, case.workload.widest) + more
    for eviction in [*sorted({*EVICTIONS} - {"static"}), case.rules.eviction]:
        if eviction in ("forecast", "priced"):
            continue
        rules = replace(case.rules, eviction=eviction, admission="always")
        result = case.run(rules=rules, slots=[slots], warm=[])
        expected = counts_of(case.workload, rules, slots)
        for name in ("hits", "host_hits", "evictions"):
            assert result.total(name) == expected[name], (eviction, name)
        assert result.total("demand_bytes") == expected["host_hits"] * case.costs.expert_bytes
