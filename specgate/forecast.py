"""The Forecast: the only thing that a policy or a store sees of a predictor.

Letters: H horizons, E experts per layer, B concurrent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forecast:
    """Calibrated marginal probabilities that experts of later MoE layers are used.

    Shapes:
        p_HE: ``[H, E]`` in [0, 1], the probability that expert e of the target layer of row h is used by this
            token (or by any token of the batch, after :meth:`merge`).
        target_layer_H: ``[H]`` int64, the MoE layer of each row (counted over MoE layers only).
        next_token_H: ``[H]`` bool, True where the target belongs to the next token (decode wraps around).

    Attributes:
        source_layer: MoE layer whose router input was the newest thing known; -1 before the first MoE layer.
        horizon_H: ``[H]`` int64, how many MoE layers ahead each row lies (N+1 is 1).
    """

    p_HE: Tensor
    target_layer_H: Tensor
    next_token_H: Tensor
    horizon_H: Tensor
    source_layer: int

    def top(self, k: int) -> Tensor:
        """The ``k`` most probable experts of each row, best first: ``[H, k]`` int64."""
        return self.p_HE.topk(k, dim=-1).indices

    @staticmethod
    def merge(forecasts: list[Forecast]) -> Forecast:
        """P(any token needs it) = 1 - prod(1 - p) over forecasts with the same rows.

        Raises:
            ValueError: if the list is empty or rows differ in target layer.
        """
        if not forecasts:
            raise ValueError("merge needs at least one forecast")
        first = forecasts[0]
        if any(not torch.equal(f.target_layer_H, first.target_layer_H) for f in forecasts):
            raise ValueError("merge needs forecasts with the same target layers")
        missed_HE = torch.stack([1 - f.p_HE for f in forecasts]).prod(0)
        return Forecast(
            1 - missed_HE, first.target_layer_H, first.next_token_H, first.horizon_H, first.source_layer
        )
