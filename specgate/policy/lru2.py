"""LRU-2: by the last use but one."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class LRU2(Policy):
    """The ``lru2`` policy: whose last use but one is longest ago goes first.

    O'Neil et al., 1993, doi:10.1145/170036.170081.
    """

    name: ClassVar[str] = "lru2"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="lru2")
