"""The dynamic program against every possible split of the slots."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.errors import BudgetError
from specgate.policy.distances import miss_curves_LC
from specgate.policy.layer_sizes import LayerSizes, best_sizes, widest_possible_L
from specgate.policy.workload import merge
from tests.policy.support import count, simulated, small_workload, some_costs

L, E = 3, 4


@given(
    drops=st.lists(st.lists(st.integers(0, 9), min_size=E, max_size=E), min_size=L, max_size=L),
    least=st.lists(st.integers(0, 2), min_size=L, max_size=L),
    slots=st.integers(6, 14),
)
@settings(max_examples=100, deadline=None)
def test_no_other_split_misses_less(drops: list[list[int]], least: list[int], slots: int) -> None:
    falling = np.array([[sum(row[i:]) for i in range(E + 1)] for row in drops])
    sizes = best_sizes(falling, slots, np.array(least))
    total = min(slots, L * E)
    assert sizes.sum() == total
    assert (sizes >= least).all()
    every = [
        sum(int(falling[layer, c]) for layer, c in enumerate(split))
        for split in itertools.product(*[range(low, E + 1) for low in least])
        if sum(split) == total
    ]
    assert sum(int(falling[layer, c]) for layer, c in enumerate(sizes)) == min(every)


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(BudgetError, match="5 slots are fewer than the 6"):
        LayerSizes().slots_of(small_workload(), 5)


def test_a_layer_can_take_any_event_of_so_many_tokens() -> None:
    batch = merge([small_workload(seed, tokens=(6,)) for seed in range(3)])
    assert widest_possible_L(batch).tolist() == [6, 6, 6]  # 3 tokens of K=2, and 6 experts
    assert widest_possible_L(small_workload()).tolist() == [2, 2, 2]


def test_the_simulator_counts_the_misses_that_the_curves_foretell() -> None:
    workload = small_workload(5, tokens=(40,))
    sizes = LayerSizes().slots_of(workload, 10)
    assert isinstance(sizes, np.ndarray)
    rules = LayerSizes().fit(workload, some_costs(workload), 10)
    result = simulated(workload, rules, sizes)
    foretold = miss_curves_LC(workload)[np.arange(3), sizes].sum()
    assert count(result, "host_hits") + count(result, "misses") == foretold
