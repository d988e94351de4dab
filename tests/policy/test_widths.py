"""next_gate and cumulative: how many experts are fetched, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.cumulative import Cumulative
from specgate.policy.next_gate import NextGate
from specgate.policy.workload import Forecasts, Workload, decoding
from tests.policy.support import count, noisy_forecasts, simulated, small_workload, some_costs


def one_step(p_HE: list[list[float]]) -> Workload:
    """Two layers and one token that uses experts 0 and 1; ``p_HE`` is foreseen before its first layer."""
    workload = decoding([np.array([[[0, 1], [0, 1]]])], experts=len(p_HE[0]))
    p_PHE = np.zeros((3, len(p_HE), len(p_HE[0])))
    p_PHE[0] = p_HE
    return workload.with_forecasts(Forecasts.from_dense(p_PHE))


def test_next_gate_takes_a_fixed_width_of_each_horizon() -> None:
    workload = one_step([[0.9, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7]])
    costs = some_costs(workload, pre_ns_N=np.full(2, 1e6))
    rules = NextGate(width=1).fit(workload, costs, 8)
    assert count(simulated(workload, rules, 8, costs), "prefetches") == 1  # depth 1: the next event alone
    rules = NextGate(depth=2).fit(workload, costs, 8)
    assert rules.width == workload.top_k
    assert count(simulated(workload, rules, 8, costs), "prefetches") == 4


@pytest.mark.parametrize(
    ("p_E", "fetched"),
    [
        ([1.0, 1.0, 0.0, 0.0], 2),  # sure of both: no more
        ([0.5, 0.5, 0.5, 0.5], 4),  # 0.8 * 2 = 1.6 takes all four
        ([0.9, 0.8, 0.2, 0.1], 2),
        ([0.9, 0.6, 0.2, 0.1], 3),
    ],
)
def test_cumulative_takes_experts_until_their_sum_is_reached(p_E: list[float], fetched: int) -> None:
    workload = one_step([p_E])
    costs = some_costs(workload, pre_ns_N=np.full(2, 1e6))
    rules = Cumulative(mass=0.8, depth=1).fit(workload, costs, 8)
    assert count(simulated(workload, rules, 8, costs), "prefetches") == fetched


def test_more_mass_fetches_more() -> None:
    workload = small_workload(3, tokens=(40,))
    workload = workload.with_forecasts(noisy_forecasts(workload, 2))
    by_mass = []
    for mass in (0.2, 0.6, 1.0):
        rules = Cumulative(mass=mass, depth=2).fit(workload, some_costs(workload), 9)
        by_mass.append(count(simulated(workload, rules, 9), "prefetches"))
    assert by_mass == sorted(by_mass)
    assert by_mass[0] < by_mass[2]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="mass=0"):
        Cumulative(mass=0.0)
    with pytest.raises(ConfigError, match="width=0"):
        NextGate(width=0)
    with pytest.raises(ConfigError, match="depth=0"):
        NextGate(depth=0)
