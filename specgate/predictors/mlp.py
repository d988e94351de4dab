"""A wide MLP per source point that foresees all horizons at once.

Letters: B sequences, T tokens, N = B * T tokens flat, L MoE layers, P = L + 1 source points, H horizons, E
experts, D hidden size, F features, W width.

In the spirit of the per-layer predictors of Pre-gated MoE (Hwang et al., 2024, arXiv:2308.12066) and of the
multi-head MLP predictors that followed; here all layers' weights lie in one tensor and run as one batched
product.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specgate.predictors.base import Predictor
from specgate.predictors.features import PointFeatures, prior_logit, stack_of
from specgate.predictors.layers import PointLinear, lookup
from specgate.traces.batch import RoutingBatch, last_valid_B

ENTRY_GAIN = 20.0
"""Factor on the entry table (see ``TOKEN_GAIN`` in features.py)."""


class PointMLP(nn.Module):
    """Features -> logits; GELU units that the layer's chosen experts gate, residual further layers, dropout.

    What a layer adds to the residual stream is its experts' outputs times their weights. The gate ``1 +
    weights @ G`` gives the hidden units that product, so that different experts can use different units.

    Shapes:
        forward: features ``[B, T, P, F]``, router weights ``[B, T, P, E]`` -> ``[B, T, P, H, E]``.
    """

    def __init__(
        self,
        points: int,
        size: int,
        width: int,
        depth: int,
        horizons: int,
        experts: int,
        dropout: float,
        bias: float,
    ) -> None:
        super().__init__()
        self.horizons, self.experts = horizons, experts
        self.drop = nn.Dropout(dropout)
        self.first = PointLinear(points, size, width)
        self.gate = PointLinear(points, experts, width, bias=1.0)
        nn.init.normal_(self.gate.weight, std=0.5)
        self.more = nn.ModuleList([PointLinear(points, width, width) for _ in range(depth - 1)])
        self.last = PointLinear(points, width, horizons * experts, zero=True, bias=bias)

    def forward(self, x_BTPF: Tensor, routed_BTPE: Tensor) -> Tensor:
        B, T, P = x_BTPF.shape[:3]
        x_PNF, routed_PNE = (x.flatten(0, 1).transpose(0, 1) for x in (x_BTPF, routed_BTPE))
        y_PNW = nn.functional.gelu(self.first(x_PNF)) * self.gate(routed_PNE)
        for layer in self.more:
            y_PNW = y_PNW + nn.functional.gelu(layer(self.drop(y_PNW)))
        out = self.last(self.drop(y_PNW))
        return out.transpose(0, 1).reshape(B, T, P, self.horizons, self.experts)

    def step(self, x_BF: Tensor, routed_BE: Tensor, point: int) -> Tensor:
        """One point of one token: ``[B, F]``, ``[B, E]`` -> ``[B, H, E]``, without dropout."""
        y_BW = nn.functional.gelu(self.first.at(x_BF, point)) * self.gate.at(routed_BE, point)
        for layer in self.more:
            assert isinstance(layer, PointLinear)
            y_BW = y_BW + nn.functional.gelu(layer.at(y_BW, point))
        return self.last.at(y_BW, point).view(-1, self.horizons, self.experts)


class MLP(Predictor):
    """The ``mlp`` predictor.

    Args:
        width: units per hidden layer. depth: hidden layers. dropout: on the hidden units.
        token_dim, state_dim, decays, heads: see :class:`PointFeatures`.

    Shapes:
        entry_VF (parameter): ``[V, H * E]``, a trained token table added at p = 0, where the token's id is
            all that is known of it and the MLP's narrow embedding falls short of a plain table.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "mlp"

    def __init__(
        self,
        *,
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        token_dim: int = 32,
        state_dim: int = 32,
        decays: list[float] | None = None,
        heads: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.features = PointFeatures(
            **stack_of(self, decays), token_dim=token_dim, state_dim=state_dim, heads=heads
        )
        self.entry_VF = nn.Embedding(self.vocab_size, self.lookahead * self.experts)
        nn.init.zeros_(self.entry_VF.weight)
        bias = prior_logit(self)
        self.head = PointMLP(
            self.layers + 1, self.features.size, width, depth, self.lookahead, self.experts, dropout, bias
        )

    def forward(self, batch: RoutingBatch) -> Tensor:
        logits_BTPHE = self.head(*self.features(batch))
        entry_BTF = lookup(self.entry_VF, batch.token_ids_BT) * ENTRY_GAIN
        entry_BT1HE = entry_BTF.view(*entry_BTF.shape[:2], 1, self.lookahead, self.experts)
        return torch.cat([logits_BTPHE[:, :, :1] + entry_BT1HE, logits_BTPHE[:, :, 1:]], dim=2)

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """One point's weights, the last token's features, attention over the history of that point."""
        last_B = last_valid_B(batch.valid_BT)
        logits_BHE = self.head.step(*self.features.step(batch, layer, last_B), layer + 1)
        if layer >= 0:
            return logits_BHE
        ids_B = batch.token_ids_BT.gather(1, last_B[:, None])[:, 0]
        return logits_BHE + (lookup(self.entry_VF, ids_B) * ENTRY_GAIN).view_as(logits_BHE)
