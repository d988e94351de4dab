"""Least recently used: the cache that every other policy is measured against."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class LRU(Policy):
    """The ``lru`` policy: the expert whose last use is longest ago goes first (Eliseev and Mazur, 2023,
    arXiv:2312.17238)."""

    name: ClassVar[str] = "lru"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="lru")
