"""Least frequently used."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class LFU(Policy):
    """The ``lfu`` policy: the expert with the fewest uses so far goes first; equal ones by last use."""

    name: ClassVar[str] = "lfu"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="lfu")
