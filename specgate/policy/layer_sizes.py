"""Cache sizes per layer by dynamic programming over the layers' miss curves.

Letters: L MoE layers, E experts of a layer, C slots of a layer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from specgate.errors import BudgetError
from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.distances import miss_curves_LC
from specgate.policy.rules import Rules
from specgate.policy.workload import Int, Workload


class LayerSizes(Policy):
    """The ``layer_sizes`` policy: an LRU cache per layer, sized so that all layers together miss least.

    AdapMoE (Zhong et al., 2024, arXiv:2408.10284) sizes its layers by dynamic programming over a model of
    expected misses; here the curves are the training documents' own, exact by stack distance.
    """

    name: ClassVar[str] = "layer_sizes"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="lru")

    def slots_of(self, train: Workload, slots: int) -> int | Int:
        """Slots of each layer, int64 ``[L]``, ``slots`` in all (L * E at most).

        Raises:
            BudgetError: fewer slots than every layer needs for its widest possible event.
        """
        return best_sizes(miss_curves_LC(train), slots, widest_possible_L(train))


def widest_possible_L(workload: Workload) -> Int:
    """Experts that one event of each layer can need: those of all its tokens, at most E: int64 ``[L]``."""
    total_M1 = np.concatenate([[0], np.cumsum(workload.tokens_M, dtype=np.int64)])
    tokens_N = np.diff(total_M1[workload.event_start_N1])
    widest_L = tokens_N.reshape(-1, workload.layers).max(axis=0, initial=0)
    return np.minimum(widest_L, workload.experts)


def best_sizes(misses_LC: Int, slots: int, least_L: Int) -> Int:
    """Sizes that miss least: O(L * slots * E), exact. Ties go to the smaller size of the later layer.

    Args:
        misses_LC: ``[L, E + 1]``, misses of each layer with C slots.
        slots: in all layers together; more than L * E are of no use.
        least_L: slots that each layer needs at least.

    Returns:
        int64 ``[L]``, their sum is ``min(slots, L * E)``.

    Raises:
        BudgetError: the least sizes do not fit.
    """
    L, E = misses_LC.shape[0], misses_LC.shape[1] - 1
    if slots < int(least_L.sum()):
        raise BudgetError(
            f"{slots} slots are fewer than the {int(least_L.sum())} that {L} layers with caches of their own "
            "need; raise the budget or share one cache."
        )
    slots = min(slots, L * E)
    never = np.iinfo(np.int64).max // 4
    best_C = np.full(
        slots + 1, never, dtype=np.int64
    )  # fewest misses of the layers so far with so many slots
    best_C[0] = 0
    choice_LC = np.zeros((L, slots + 1), dtype=np.int64)
    for layer in range(L):
        now_C = np.full(slots + 1, never, dtype=np.int64)
        for size in range(int(least_L[layer]), min(E, slots) + 1):
            reached = best_C[: slots + 1 - size] + misses_LC[layer, size]
            better = reached < now_C[size:]
            now_C[size:][better] = reached[better]
            choice_LC[layer, size:][better] = size
        best_C = now_C
    sizes = np.zeros(L, dtype=np.int64)
    left = slots
    for layer in range(L - 1, -1, -1):
        sizes[layer] = choice_LC[layer, left]
        left -= int(sizes[layer])
    return sizes
