"""LRU with an admission gate: what is not hotter than what it would replace does not stay."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_eviction, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class Gate(Policy):
    """The ``gate`` policy (TinyLFU: Einziger et al., 2017, arXiv:1512.00727, with exact decayed counts).

    Args:
        half_life: steps in which a use counts half.
        eviction: who goes first among those that were admitted.
    """

    name: ClassVar[str] = "gate"

    def __init__(self, half_life: float = 64.0, eviction: str = "lru") -> None:
        self.half_life = Rules(half_life=half_life).half_life
        self.eviction = check_eviction(eviction)

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction=self.eviction, admission="gate", half_life=self.half_life)
