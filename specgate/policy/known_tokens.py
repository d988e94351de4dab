"""The price with perfect knowledge of the token under way: what a perfect predictor of it could give.

Letters: L MoE layers, M entries of forecasts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np

from specgate.errors import ConfigError
from specgate.policy.base import ForecastSource, Policy
from specgate.policy.costs import Costs
from specgate.policy.priced import Priced
from specgate.policy.rules import MAX_DEPTH, Rules
from specgate.policy.workload import Forecasts, Workload, oracle_forecasts


class KnownTokens(Policy):
    """The ``known_tokens`` policy: ``priced``, told every expert of this token's later layers, and no more.

    It bounds predictors that know the token but not the next one, which is not sampled yet; what lies between
    it and the oracle, only knowledge of later tokens can give.

    Args:
        tokens: later tokens that are known besides.
    """

    name: ClassVar[str] = "known_tokens"
    forecast_source: ClassVar[ForecastSource] = "oracle"

    def __init__(self, tokens: int = 0) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ConfigError(f"known_tokens: tokens={tokens} is no number of tokens; write 0 or more.")
        self.tokens = tokens

    @property
    def horizons(self) -> int:
        return MAX_DEPTH  # as many as the tokens have layers

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        depth = self._depth(train)
        return replace(Priced().fit(train, costs, slots), depth=depth)

    def foresee(self, train: Workload, workload: Workload) -> Forecasts:
        L = workload.layers
        known = oracle_forecasts(workload, self._depth(workload))
        point_M = np.repeat(np.arange(workload.points), np.diff(known.start_P1))
        step_M = point_M // (L + 1)
        event_M = step_M * L + point_M % (L + 1) + known.horizon_M.astype(np.int64) - 1
        keep_M = event_M // L - step_M <= self.tokens
        start_P1 = np.zeros(workload.points + 1, dtype=np.int64)
        np.cumsum(np.bincount(point_M[keep_M], minlength=workload.points), out=start_P1[1:])
        return Forecasts(start_P1, known.horizon_M[keep_M], known.expert_M[keep_M], known.p_M[keep_M])

    def _depth(self, workload: Workload) -> int:
        return min((self.tokens + 1) * workload.layers, MAX_DEPTH)
