"""P(expert used | used, or not used, by the previous token at the target layer).

Letters: B sequences, T tokens, L MoE layers, P source points, H horizons, E experts per layer.

The temporal-locality baseline behind LRU expert caches: Eliseev and Mazur (2023, arXiv:2312.17238); Xue et
al., "MoE-Infinity" (2024, arXiv:2401.14361). In prefill the previous token's later layers are not routed yet,
so there it is popularity, exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.counting import CountingPredictor, used_BTCE
from specgate.predictors.features import at_targets_BTPHE, shifted
from specgate.traces.batch import RoutingBatch


class PreviousToken(CountingPredictor):
    """The ``previous_token`` predictor.

    Shapes:
        used_LE2, seen_LE2 (buffers): ``[L, E, 2]``; how often the expert was used, and could have been, after
            tokens that had not used it (0) and that had (1).
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``; popularity at a sequence's first token.
    """

    name: ClassVar[str] = "previous_token"
    used_LE2: Tensor
    seen_LE2: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("used_LE2", torch.zeros(self.layers, self.experts, 2))
        self.register_buffer("seen_LE2", torch.zeros(self.layers, self.experts, 2))

    def count(self, batch: RoutingBatch) -> None:
        super().count(batch)
        used_BTLE = used_BTCE(batch, self.experts, self.layers)
        scored_BT = batch.mask_BT & shifted(batch.valid_BT)
        now_NLE, before_NLE = used_BTLE[scored_BT], shifted(used_BTLE)[scored_BT]
        after_NLE2 = torch.stack([1 - before_NLE, before_NLE], dim=-1)
        self.seen_LE2 += after_NLE2.sum(0)
        self.used_LE2 += (now_NLE[..., None] * after_NLE2).sum(0)

    def forward(self, batch: RoutingBatch) -> Tensor:
        B, T = batch.valid_BT.shape
        prior_LE1 = self.prior_LE()[..., None]
        if self.phase == "prefill":
            logits_PHE = self.link(self.prior_PHE())
            return logits_PHE.expand(B, T, *logits_PHE.shape)
        p_LE2 = (self.used_LE2 + self.smoothing * prior_LE1) / (self.seen_LE2 + self.smoothing)
        logits_LE3 = self.link(torch.cat([p_LE2, prior_LE1], dim=-1))
        # After token t: 1 used, 0 not used, and popularity where there is no token.
        used_BTLE = used_BTCE(batch, self.experts, self.layers)
        after_BTLE = logits_LE3[..., 0] + used_BTLE * (logits_LE3[..., 1] - logits_LE3[..., 0])
        none_BT11 = ~batch.valid_BT[:, :, None, None]
        after_BTLE = torch.where(none_BT11, logits_LE3[..., 2].expand_as(after_BTLE), after_BTLE)
        # shifted() inside at_targets fills with zeros: work on the difference to popularity.
        return at_targets_BTPHE(after_BTLE - logits_LE3[..., 2], self.lookahead) + self.link(self.prior_PHE())
