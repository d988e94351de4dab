"""Belady's eviction: what is used farthest in the future goes first. It knows the future."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class Belady(Policy):
    """The ``belady`` policy (Belady, 1966, doi:10.1147/sj.52.0078): the fewest misses without prefetching."""

    name: ClassVar[str] = "belady"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="belady")
