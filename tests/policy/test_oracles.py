"""belady, perfect_prefetch and oracle: bounds, against exhaustive search on tiny traces."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.oracle import Oracle
from specgate.policy.perfect_prefetch import PerfectPrefetch
from specgate.policy.registry import POLICIES, policy
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload
from tests.policy.support import count, noisy_forecasts, simulated, small_workload, some_costs


def fewest_misses(workload: Workload, slots: int) -> int:
    """Over all choices of who goes at every event (nobody goes who is needed, nobody comes who is not)."""
    E, L = workload.experts, workload.layers
    events = [frozenset((n % L) * E + e for e in workload.event(n)) for n in range(workload.events)]

    @cache
    def best(n: int, present: frozenset[int]) -> int:
        if n == len(events):
            return 0
        absent = events[n] - present
        others = sorted(present - events[n])
        surplus = max(0, len(present) + len(absent) - slots)
        return len(absent) + min(
            best(n + 1, (present - set(gone)) | events[n]) for gone in itertools.combinations(others, surplus)
        )

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("slots", [2, 3, 4])
def test_no_choice_of_victims_misses_less_than_belady(seed: int, slots: int) -> None:
    workload = small_workload(seed, layers=2, experts=4, top_k=2, tokens=(5, 3))
    rules = policy("belady").fit(workload, some_costs(workload), slots)
    assert count(simulated(workload, rules, slots), "host_hits") == fewest_misses(workload, slots)


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("layer_sizes",)])
@pytest.mark.parametrize("slots", [5, 9])
def test_nobody_without_prefetch_misses_less_than_belady(name: str, slots: int) -> None:
    workload = small_workload(11, tokens=(40, 30))
    workload = workload.with_forecasts(noisy_forecasts(workload, 3))
    rules = policy(name).fit(workload, some_costs(workload), slots)
    plain = Rules.from_plain(rules.plain() | {"prefetch": "none", "low_bytes": 0})
    bound = simulated(workload, Rules(eviction="belady"), slots)
    assert count(simulated(workload, plain, slots), "hits") <= count(bound, "hits")


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_with_time_enough_and_room_oracles_do_not_stall(seed: int) -> None:
    workload = small_workload(seed, tokens=(30,))
    costs = some_costs(workload, pre_ns_N=np.full(workload.events, 1000.0))
    lru = count(simulated(workload, Rules(), 9, costs), "stall_ns")
    stalls = {}
    for name in ("perfect_prefetch", "oracle"):
        mine = policy(name, depth=2)
        seen = workload.with_forecasts(mine.foresee(workload, workload))
        result = simulated(seen, mine.fit(workload, costs, 9), 9, costs)
        stalls[name] = count(result, "stall_ns")
        assert count(result, "wasted_bytes") == 0
    assert stalls["oracle"] == 0
    assert 0 <= stalls["perfect_prefetch"] < 0.2 * lru  # LRU's victim may itself be wanted next: it stays


@pytest.mark.parametrize("slots", [5, 8, 12])
def test_the_joint_oracle_is_at_least_as_fast_as_lru_and_belady(slots: int) -> None:
    workload = small_workload(13, tokens=(60, 40))
    mine = Oracle(depth=6)
    seen = workload.with_forecasts(mine.foresee(workload, workload))
    oracle = count(simulated(seen, mine.fit(workload, some_costs(workload), slots), slots), "total_ns")
    for eviction in ("lru", "belady"):
        assert oracle <= count(simulated(workload, Rules(eviction=eviction), slots), "total_ns")


def test_depths_are_checked() -> None:
    assert Oracle().horizons == 24
    with pytest.raises(ConfigError, match="perfect_prefetch: depth=0"):
        PerfectPrefetch(depth=0)
