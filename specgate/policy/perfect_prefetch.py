"""LRU with perfect foresight of what comes next: what prefetching alone can give."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from specgate.policy.base import ForecastSource, Policy, check_depth, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class PerfectPrefetch(Policy):
    """The ``perfect_prefetch`` policy: everything that the next ``depth`` events use is fetched, LRU evicts.

    Args:
        depth: events that are foreseen.
    """

    name: ClassVar[str] = "perfect_prefetch"
    forecast_source: ClassVar[ForecastSource] = "oracle"
    eviction: ClassVar[str] = "lru"

    def __init__(self, depth: int = 6) -> None:
        self.depth = check_depth(self.name, depth)

    @property
    def horizons(self) -> int:
        return self.depth

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(
            eviction=self.eviction,
            prefetch="threshold",
            thresholds_L=np.ones(train.layers),
            depth=self.depth,
        )
