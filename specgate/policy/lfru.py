"""Least frequently and recently used: uses that fade with a half-life."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class LFRU(Policy):
    """The ``lfru`` policy (LRFU: Lee et al., 2001, doi:10.1109/TC.2001.970573).

    Args:
        half_life: steps in which a use counts half.
    """

    name: ClassVar[str] = "lfru"

    def __init__(self, half_life: float = 64.0) -> None:
        self.half_life = Rules(eviction="lfru", half_life=half_life).half_life

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="lfru", half_life=self.half_life)
