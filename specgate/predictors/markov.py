"""First-order Markov chain over experts: P(expert at the target | an expert of the source layer), per point
and horizon.

Letters: B sequences, T tokens, N scored tokens, L MoE layers, P = L + 1 source points, H horizons, E experts
per layer (a second expert axis is the source's), K experts per token.

The expert-transition tables of e.g. Xue et al., "MoE-Infinity" (2024, arXiv:2401.14361) and of the llama.cpp
and colibri prefetchers. The K source experts are combined as independent evidence (naive Bayes): the logit of
popularity plus each source expert's change of that logit, shrunk by one factor because the K are not
independent.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.counting import CountingPredictor, next_valid_BT, used_BTCE
from specgate.predictors.features import points
from specgate.traces.batch import INVALID, WRAPPED, RoutingBatch


class Markov(CountingPredictor):
    """The ``markov`` predictor. At p = 0 no expert is known and it is popularity.

    Args:
        shrink: factor on the summed evidence of the K source experts (K = 1: 1 is the exact Markov chain);
            None chooses 1 for K = 1 and 0.6 otherwise.

    Shapes:
        joint_LHEE (buffer): ``[L, H, E_source, E_target]`` co-occurrence counts of layer l and horizon h.
        source_LHE (buffer): ``[L, H, E_source]`` uses of the source expert that have such a target.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "markov"
    joint_LHEE: Tensor
    source_LHE: Tensor

    def __init__(self, *, shrink: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shrink = shrink if shrink is not None else (1.0 if self.top_k == 1 else 0.6)
        L, H, E = self.layers, self.lookahead, self.experts
        self.register_buffer("joint_LHEE", torch.zeros(L, H, E, E))
        self.register_buffer("source_LHE", torch.zeros(L, H, E))

    def count(self, batch: RoutingBatch) -> None:
        super().count(batch)
        mask_BT = batch.mask_BT
        both_NCE = used_BTCE(batch, self.experts, 2 * self.layers)[mask_BT]
        follows_N1 = next_valid_BT(batch)[mask_BT][:, None].to(both_NCE.dtype)
        source_LEN = both_NCE[:, : self.layers].permute(1, 2, 0)
        for h0 in range(self.lookahead):
            kind_L, column_L = self.kinds[1:, h0], self.columns[1:, h0]
            target_LNE = both_NCE[:, column_L].transpose(0, 1) * (kind_L != INVALID)[:, None, None]
            self.joint_LHEE[:, h0] += source_LEN @ target_LNE
            scored_LN1 = torch.where(
                (kind_L == WRAPPED)[:, None, None], follows_N1, torch.ones_like(follows_N1)
            )
            self.source_LHE[:, h0] += (source_LEN @ scored_LN1)[..., 0] * (kind_L != INVALID)[:, None]

    def forward(self, batch: RoutingBatch) -> Tensor:
        prior_PHE = self.prior_PHE()
        prior_LH1E = prior_PHE[1:, :, None]
        p_LHEE = (self.joint_LHEE + self.smoothing * prior_LH1E) / (
            self.source_LHE[..., None] + self.smoothing
        )
        evidence_LHEE = (self.link(p_LHEE) - self.link(prior_LH1E)) * self.shrink
        used_BTLE = used_BTCE(batch, self.experts, self.layers)
        change_BTLHE = torch.einsum("btle,lhef->btlhf", used_BTLE, evidence_LHEE)
        return self.link(prior_PHE) + points(change_BTLHE)
