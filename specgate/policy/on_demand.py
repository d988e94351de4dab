"""No cache: every expert is loaded when it is demanded and goes after its event."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.base import Policy, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class OnDemand(Policy):
    """The ``on_demand`` policy: offloading without a cache (DeepSpeed Inference, 2022, arXiv:2207.00032)."""

    name: ClassVar[str] = "on_demand"

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction="none")
