"""Stack distances against caches that are run one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.policy import distances
from specgate.policy.workload import Workload, decoding, merge
from tests.policy.support import small_workload


def lru_misses(workload: Workload, layer: int, size: int) -> int:
    """A list, most recent first; of one event's experts the highest id counts as the latest."""
    recent: list[int] = []
    misses = 0
    for step in range(workload.steps):
        now = workload.event(step * workload.layers + layer)
        misses += len([e for e in now if e not in recent[:size]])
        recent = sorted(now, reverse=True) + [e for e in recent if e not in now]
    return misses


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_miss_curves_are_those_of_lru_caches_of_every_size(seed: int, top_k: int) -> None:
    workload = small_workload(seed, top_k=top_k)
    curves_LC = distances.miss_curves_LC(workload)
    for layer in range(workload.layers):
        slow = [lru_misses(workload, layer, size) for size in range(top_k, workload.experts + 1)]
        assert curves_LC[layer, top_k:].tolist() == slow


def test_merged_batches_have_wider_events() -> None:
    a, b = (small_workload(seed, tokens=(15,)) for seed in (1, 2))
    workload = merge([a, b])
    widest = workload.widest
    assert widest > a.top_k
    curves_LC = distances.miss_curves_LC(workload)
    for size in range(widest, workload.experts + 1):
        assert curves_LC[1, size] == lru_misses(workload, 1, size)


def test_by_hand() -> None:
    tokens = np.array([[[0, 1]], [[1, 2]], [[0, 2]]])  # T=3, L=1, K=2
    workload = decoding([tokens], experts=4)
    never = workload.experts + 1
    assert distances.ranks_SE(workload, 0).tolist() == [
        [never] * 4,
        [2, 1, never, never],  # 0 and 1 were used at once: 0 goes first
        [3, 2, 1, never],
    ]
    assert [d.tolist() for d in distances.stack_distances(workload)] == [[never, never, 1, never, 3, 1]]
