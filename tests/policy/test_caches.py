"""Caches without foresight, in the simulator, against one that sorts its blocks anew at every miss.

One test per policy: on_demand, static, lru, lfu, lfru, lru2, gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.gate import Gate
from specgate.policy.lfru import LFRU
from specgate.policy.registry import policy
from specgate.policy.workload import Workload, merge
from tests.policy.support import KeyOf, count, simulated, slow_misses, small_workload, some_costs

L, E = 3, 6
HALF_LIFE = 4.0


def heat(uses: Sequence[int], n: int) -> float:
    """Uses that halve every HALF_LIFE steps, as of the step of event n."""
    return sum(2.0 ** (-(n // L - used // L) / HALF_LIFE) for used in uses)


def keys(train: Workload) -> dict[str, KeyOf]:
    """The key of each policy, as docs/policies.md has it."""
    weights = np.zeros(L * E)
    for n in range(train.events):
        for e in train.event(n):
            weights[(n % L) * E + e] += 1
    return {
        "static": lambda b, uses, n: (weights[b], uses[-1]),
        "lru": lambda b, uses, n: (uses[-1],),
        "lfu": lambda b, uses, n: (len(uses), uses[-1]),
        "lfru": lambda b, uses, n: (round(heat(uses, n), 9), uses[-1]),
        "lru2": lambda b, uses, n: (uses[-2] if len(uses) > 1 else -math.inf, uses[-1]),
    }


def missed(workload: Workload, name: str, slots: int, **options: float) -> float:
    rules = policy(name, **options).fit(small_workload(99), some_costs(small_workload(99)), slots)
    result = simulated(workload, rules, slots)
    assert count(result, "hits") + count(result, "host_hits") == len(workload.expert_M)
    return count(result, "host_hits")


@pytest.mark.parametrize("name", ["static", "lru", "lfu", "lfru", "lru2"])
@pytest.mark.parametrize("slots", [4, 9, 14])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_misses_are_those_of_the_slow_cache(name: str, slots: int, seed: int) -> None:
    workload = small_workload(seed, tokens=(25, 15))
    options = {"half_life": HALF_LIFE} if name == "lfru" else {}
    expected = slow_misses(workload, slots, keys(small_workload(99))[name])
    assert missed(workload, name, slots, **options) == expected


def test_a_batch_s_events_are_served_at_once() -> None:
    batch = merge([small_workload(seed, tokens=(20,)) for seed in (3, 4, 5)])
    expected = slow_misses(batch, 9, keys(small_workload(99))["lru"])
    assert missed(batch, "lru", 9) == expected


def test_without_a_cache_every_use_is_loaded() -> None:
    workload = small_workload(1)
    assert missed(workload, "on_demand", 14) == len(workload.expert_M)


def gated_misses(workload: Workload, slots: int) -> int:
    """LRU whose cold newcomers are the next to go, in the order of last use among themselves."""
    present: set[int] = set()
    rejected: set[int] = set()
    uses: dict[int, list[int]] = {}
    misses = 0
    for n in range(workload.events):
        wanted = {(n % L) * E + e for e in workload.event(n)}
        absent = wanted - present
        judged = absent | (wanted & rejected)
        misses += len(absent)
        for b in wanted:
            uses.setdefault(b, []).append(n)
        for _ in range(max(0, len(present) + len(absent) - slots)):
            present.remove(min(present - wanted, key=lambda b: (b not in rejected, uses[b][-1], b)))
        stay = present - wanted - rejected
        present |= wanted
        rejected = (rejected & present) - wanted
        coldest = min((heat(uses[b], n) for b in stay), default=None)
        if coldest is not None and len(present) == slots:
            rejected |= {b for b in judged if heat(uses[b], n) <= coldest + 1e-12}
    return misses


@pytest.mark.parametrize("slots", [5, 9, 14])
def test_the_gate(slots: int) -> None:
    workload = small_workload(8, tokens=(40, 20))
    assert missed(workload, "gate", slots, half_life=HALF_LIFE) == gated_misses(workload, slots)


@pytest.mark.parametrize("make", [LFRU, Gate])
def test_half_lives_are_positive(make: type[LFRU] | type[Gate]) -> None:
    with pytest.raises(ConfigError, match="half_life=0"):
        make(half_life=0.0)
    with pytest.raises(ConfigError, match="eviction=hottest"):
        Gate(eviction="hottest")
