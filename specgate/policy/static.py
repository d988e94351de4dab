"""Static pinning: the experts that training documents use most."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class Static(Policy):
    """The ``static`` policy (Fiddler, Kamahori et al., 2024, arXiv:2402.07033): the least used goes first."""

    name: ClassVar[str] = "static"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="static", weights_LE=train.use_counts_LE().astype("float64"))
