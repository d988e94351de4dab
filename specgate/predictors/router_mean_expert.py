"""The target layer's router on the current hidden state plus what the layers in between add to it on average.

Letters: B sequences, T tokens, N scored tokens, L MoE layers, P source points, H horizons, E experts per
layer, K experts per token, D hidden size, X = E + 1 regressors (the layer's experts, and a constant).

The "quasi-hidden" state of recent prefetchers adds each chosen expert's mean output. A trace holds hidden
states, not expert outputs, so what is added here is estimated from the trace: the least-squares fit of
``hidden[l + h] - hidden[l]`` on the router weights of layer l's experts and a constant, on training tokens.
It thereby contains the mean output of attention and of the layers in between as well, which is to its
advantage.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.features import executed_weights, multi_hot_BTLE
from specgate.predictors.router_lookahead import RouterLookahead
from specgate.traces.batch import WITHIN, RoutingBatch


class RouterMeanExpert(RouterLookahead):
    """The ``router_mean_expert`` predictor; before it is fitted it is ``router_lookahead``.

    Args:
        ridge: added to the diagonal of the normal equations, in tokens.

    Shapes:
        gram_LXX, cross_LHXD (buffers): sums of products over training tokens.
        added_LHXD (buffer): the fitted mean change of the residual stream per expert, last row the constant.
        forward: ``RoutingBatch`` with ``hidden_BTLD`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "router_mean_expert"
    gram_LXX: Tensor
    cross_LHXD: Tensor
    added_LHXD: Tensor

    def __init__(self, *, ridge: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        assert self.hidden_size is not None
        self.ridge = ridge
        L, H, X, D = self.layers, self.lookahead, self.experts + 1, self.hidden_size
        self.register_buffer("gram_LXX", torch.zeros(L, X, X, dtype=torch.float64))
        self.register_buffer("cross_LHXD", torch.zeros(L, H, X, D, dtype=torch.float64))
        self.register_buffer("added_LHXD", torch.zeros(L, H, X, D))

    def regressors(self, batch: RoutingBatch) -> Tensor:
        """Router weights of the chosen experts and a constant: ``[B, T, L, X]``."""
        weighted_BTLE = multi_hot_BTLE(batch, self.experts, weighted=True)
        return torch.cat([weighted_BTLE, torch.ones_like(weighted_BTLE[..., :1])], dim=-1)

    def count(self, batch: RoutingBatch) -> None:
        super().count(batch)
        assert batch.hidden_BTLD is not None
        hidden_LND = batch.hidden_BTLD[batch.mask_BT].double().transpose(0, 1)
        x_LNX = self.regressors(batch)[batch.mask_BT].double().transpose(0, 1)
        self.gram_LXX += x_LNX.mT @ x_LNX
        for h0 in range(min(self.lookahead, self.layers - 1)):
            change_LND = hidden_LND[h0 + 1 :] - hidden_LND[: -h0 - 1]
            self.cross_LHXD[: self.layers - h0 - 1, h0] += x_LNX[: -h0 - 1].mT @ change_LND

    def finish(self) -> None:
        """Solve the normal equations."""
        ridge_XX = self.ridge * torch.eye(self.experts + 1, dtype=torch.float64, device=self.gram_LXX.device)
        solved = torch.linalg.solve((self.gram_LXX + ridge_XX)[:, None], self.cross_LHXD)
        self.added_LHXD.copy_(torch.where((self.kinds[1:] == WITHIN)[..., None, None], solved, 0.0))

    def router_scores(self, batch: RoutingBatch) -> Tensor:
        assert batch.hidden_BTLD is not None
        added_BTLHD = torch.einsum("btlx,lhxd->btlhd", self.regressors(batch), self.added_LHXD)
        hidden_BTLHD = batch.hidden_BTLD.float()[:, :, :, None] + added_BTLHD
        return self.host.scores(hidden_BTLHD, self.columns[1:].clamp(max=self.layers - 1))

    def hidden_step(self, batch: RoutingBatch, layer: int, last_B: Tensor, count: int) -> Tensor:
        rows_B = torch.arange(last_B.shape[0], device=last_B.device)
        weights_BK = executed_weights(batch)[rows_B, last_B, layer]
        added_BKHD = self.added_LHXD[layer, :count].transpose(0, 1)[batch.experts_BTLK[rows_B, last_B, layer]]
        added_BHD = (weights_BK[..., None, None] * added_BKHD).sum(1) + self.added_LHXD[layer, :count, -1]
        return super().hidden_step(batch, layer, last_B, count) + added_BHD
