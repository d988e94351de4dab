"""What every policy offers: from training documents, the rules by which experts are kept and fetched.

Letters: L MoE layers, E experts of a layer (see :mod:`specgate.policy.workload`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np

from specgate.errors import BudgetError, ConfigError, NotApplicableError
from specgate.policy.costs import Costs
from specgate.policy.rules import EVICTIONS, Rules
from specgate.policy.workload import Forecasts, Int, Workload, oracle_forecasts

#: Where a policy's foresight comes from: nowhere; a predictor; the document itself; the policy's own matching
#: of expert activation matrices; the next layer's router on today's hidden state.
ForecastSource = Literal["none", "predictor", "oracle", "eam", "next_gate"]


class Policy(ABC):
    """Decides what to fetch ahead, what stays and what goes. It has options, and no state.

    Attributes:
        name: what ``policy=`` chooses it by.
        forecast_source: see :data:`ForecastSource`.
        calibrated: whether a predictor's probabilities are wanted calibrated (or as the predictor says them).
        trust: whether they are corrected by how often earlier ones came true (specgate.runtime.trust).
    """

    name: ClassVar[str]
    forecast_source: ClassVar[ForecastSource] = "none"
    calibrated: bool = True
    trust: bool = False

    @abstractmethod
    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        """The rules for one budget. The same input gives the same rules.

        Args:
            train: training documents; with forecasts if the policy foresees.
            costs: of the machine and the model (per-event times are those of ``train``).
            slots: device slots in all.

        Raises:
            ConfigError: options that make no sense, or training documents that lack what they need.
            BudgetError: fewer slots than one event needs.
        """

    def slots_of(self, train: Workload, slots: int) -> int | Int:
        """Slots in all, shared by the layers; or slots of each layer, int64 ``[L]``."""
        del train
        return slots

    @property
    def horizons(self) -> int:
        """How many horizons of forecasts it makes use of; 0: none."""
        return 0

    def foresee(self, train: Workload, workload: Workload) -> Forecasts | None:
        """What the policy is told while it runs ``workload``: documents one by one, before they are merged.

        Raises:
            NotApplicableError: it wants a forecast of a predictor or router, and the workload has none.
        """
        del train
        if self.forecast_source == "none":
            return None
        if self.forecast_source == "oracle":
            return oracle_forecasts(workload, self.horizons)
        return within(forecasts_of(self.name, workload), self.horizons)


def within(forecasts: Forecasts, horizons: int) -> Forecasts:
    """Those of the nearest horizons alone."""
    if int(forecasts.horizon_M.max(initial=0)) <= horizons:
        return forecasts
    keep_M = forecasts.horizon_M <= horizons
    before_M1 = np.concatenate([[0], np.cumsum(keep_M)])
    return Forecasts(
        before_M1[forecasts.start_P1],
        forecasts.horizon_M[keep_M],
        forecasts.expert_M[keep_M],
        forecasts.p_M[keep_M],
    )


def forecasts_of(name: str, workload: Workload) -> Forecasts:
    """The workload's forecasts.

    Raises:
        NotApplicableError: there are none.
    """
    if workload.forecasts is None:
        raise NotApplicableError(
            f"policy={name} works on forecasts, and these documents have none; name a predictor's checkpoint."
        )
    return workload.forecasts


def check_slots(train: Workload, slots: int) -> None:
    """Raises BudgetError if an event of the training documents does not fit."""
    if slots < train.widest:
        raise BudgetError(
            f"{slots} slots hold fewer experts than the {train.widest} that one event needs at once; "
            "raise the budget."
        )


def check_eviction(eviction: str) -> str:
    """The eviction rule of a policy that leaves it to the user.

    Raises:
        ConfigError: unknown.
    """
    if eviction not in EVICTIONS:
        raise ConfigError(f"eviction={eviction} is unknown; choose one of {', '.join(EVICTIONS)}.")
    return eviction


def check_depth(name: str, depth: int, value: str = "depth") -> int:
    """A number of horizons.

    Raises:
        ConfigError: less than 1, or more than forecasts can have.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= 255:
        raise ConfigError(f"{name}: {value}={depth} is no horizon; choose 1 (the next event) to 255.")
    return depth
