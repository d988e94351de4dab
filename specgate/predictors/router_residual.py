"""The target layer's router on today's hidden state, plus a trained correction: the default predictor.

Letters: B sequences, T tokens, P = L + 1 source points, H horizons, E experts per layer.

Starts exactly at ``router_lookahead`` (the correction's last map is zero) and learns what the layers in
between add. Router-initialised predictors with a low-rank correction are the strongest published ones; here
the correction is the wide per-point MLP of ``mlp``, trained to imitate the target routers too (see
:class:`RouterPrior`). Without hidden states it is ``mlp`` under another name.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.mlp import MLP
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import WITHIN, RoutingBatch


class RouterResidual(RouterPrior, MLP):
    """The ``router_residual`` predictor.

    Args:
        those of :class:`RouterPrior` and of :class:`MLP`.

    Shapes:
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "router_residual"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.host is not None:
            with torch.no_grad():  # where the router speaks, the correction starts at zero
                bias_PHE = self.head.last.bias_P1.view(self.layers + 1, self.lookahead, self.experts)
                bias_PHE[self.kinds == WITHIN] = 0.0

    def forward(self, batch: RoutingBatch) -> Tensor:
        return self.corrected(batch, MLP.forward(self, batch))

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """The routers of the next layers on one hidden state, and :class:`MLP`'s step."""
        return self.corrected_step(batch, layer, MLP.step_logits(self, batch, layer))
