"""Stack distances of experts within their layer: how many slots an LRU cache of a layer needs for a hit.

Letters: L MoE layers, E experts of a layer, S steps, M entries of a workload's lists, C slots of a layer.

Mattson et al., "Evaluation techniques for storage hierarchies", 1970 (doi:10.1147/sj.92.0078): an LRU cache
of C blocks always holds the C most recently used ones, so that one pass gives the misses of every size.
Experts of one event are used at once; of two that were last used in the same event, the lower id goes first.
"""

from __future__ import annotations

import numpy as np

from specgate.policy.memo import once_per_workload
from specgate.policy.workload import Int, Small, Workload


def last_use_SE(workload: Workload, layer: int) -> Int:
    """The step before step s that last used each expert of a layer, -1 if none did: int64 ``[S, E]``."""
    S, E = workload.steps, workload.experts
    last_SE = np.full((S, E), -1, dtype=np.int64)
    step_M, expert_M = uses(workload, layer)
    later = step_M + 1 < S
    last_SE[step_M[later] + 1, expert_M[later]] = step_M[later]
    return np.maximum.accumulate(last_SE, axis=0)


def uses(workload: Workload, layer: int) -> tuple[Int, Small]:
    """Step and expert of each use of a layer's experts, in order."""
    entries = np.nonzero(workload.event_layers_M() == layer)[0]
    event_M = np.repeat(np.arange(workload.events), np.diff(workload.event_start_N1))[entries]
    return event_M // workload.layers, workload.expert_M[entries]


def ranks_SE(workload: Workload, layer: int) -> Small:
    """Recency rank of each expert of a layer before each step: int32 ``[S, E]``, 1 is the latest used.

    An LRU cache of C slots for this layer holds an expert iff its rank is at most C. Experts that were not
    used so far have rank E + 1.
    """
    E = workload.experts
    last_SE = last_use_SE(workload, layer)
    key_SE = last_SE * E + np.arange(E)
    rank_SE = np.empty(key_SE.shape, dtype=np.int32)
    np.put_along_axis(rank_SE, np.argsort(-key_SE, axis=1), np.arange(1, E + 1, dtype=np.int32)[None], axis=1)
    rank_SE[last_SE < 0] = E + 1
    return rank_SE


def stack_distances(workload: Workload) -> list[Small]:
    """Of each layer, the stack distance of every use, in order; E + 1 where it is the first."""
    found = []
    for layer in range(workload.layers):
        step_M, expert_M = uses(workload, layer)
        found.append(ranks_SE(workload, layer)[step_M, expert_M])
    return found


@once_per_workload
def miss_curves_LC(workload: Workload) -> Int:
    """Misses of an LRU cache of C slots for each layer: int64 ``[L, E + 1]``, C = 0 to E.

    Exact where C is at least the layer's widest event (a smaller cache cannot run).
    """
    E = workload.experts
    curves = np.empty((workload.layers, E + 1), dtype=np.int64)
    for layer, distance in enumerate(stack_distances(workload)):
        hits = np.bincount(distance, minlength=E + 2)[: E + 1]
        curves[layer] = len(distance) - np.cumsum(hits)
    curves.setflags(write=False)
    return curves
