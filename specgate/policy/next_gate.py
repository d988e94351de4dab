"""Next-gate prefetch: the next layer's own router on today's hidden state, a fixed number of experts."""

from __future__ import annotations

from typing import ClassVar

from specgate.errors import ConfigError
from specgate.policy.base import ForecastSource, Policy, check_depth, check_eviction, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class NextGate(Policy):
    """The ``next_gate`` policy (Mixtral offloading: Eliseev and Mazur, 2023, arXiv:2312.17238).

    Needs traces with hidden states and routers: its forecasts are ``router_lookahead``'s.

    Args:
        width: experts fetched of each later layer; None: as many as a token uses (K).
        depth: layers ahead.
        eviction: who goes first; the paper has an LRU cache.
    """

    name: ClassVar[str] = "next_gate"
    forecast_source: ClassVar[ForecastSource] = "next_gate"

    def __init__(self, width: int | None = None, depth: int = 1, eviction: str = "lru") -> None:
        if width is not None and width < 1:
            raise ConfigError(f"width={width} fetches nothing; choose 1 or more, or null for K experts.")
        self.width = width
        self.depth = check_depth(self.name, depth)
        self.eviction = check_eviction(eviction)

    @property
    def horizons(self) -> int:
        return self.depth

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        width = self.width or train.top_k
        return Rules(eviction=self.eviction, prefetch="top", width=width, depth=self.depth)
