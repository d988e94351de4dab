"""Cumulative width: as many of the most probable experts as make up a share of what a token uses."""

from __future__ import annotations

from typing import ClassVar

from specgate.errors import ConfigError
from specgate.policy.base import ForecastSource, Policy, check_depth, check_eviction, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


class Cumulative(Policy):
    """The ``cumulative`` policy: width by cumulated probability (FineMoE: Yu et al., 2025, arXiv:2502.05370).

    A sure forecast fetches few experts, an unsure one many. The paper takes its probabilities from stored
    expert maps; here a predictor says them.

    Args:
        mass: share of K that the probabilities of what is fetched add up to.
        depth: events ahead.
        eviction: who goes first.
    """

    name: ClassVar[str] = "cumulative"
    forecast_source: ClassVar[ForecastSource] = "predictor"

    def __init__(self, mass: float = 0.8, depth: int = 3, eviction: str = "lru") -> None:
        if not 0 < mass <= 1:
            raise ConfigError(f"mass={mass} is no share of the experts per token; choose 0 < mass <= 1.")
        self.mass = mass
        self.depth = check_depth(self.name, depth)
        self.eviction = check_eviction(eviction)

    @property
    def horizons(self) -> int:
        return self.depth

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        return Rules(eviction=self.eviction, prefetch="cumulative", mass=self.mass, depth=self.depth)
