"""``markov2`` at run time: one point of the last token, from rows of its tables and sums over the history.

Letters: B sequences, T tokens, L MoE layers, H horizons, E experts per layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.predictors.counting import next_valid_BT
from specgate.traces.batch import WITHIN, RoutingBatch, last_valid_B

if TYPE_CHECKING:
    from specgate.predictors.markov2 import Markov2

OWN_SHARE = 0.5
"""Share of the sequence's own decayed use against popularity, before its weight is fitted."""


def step_evidence(chain: Markov2, batch: RoutingBatch, layer: int) -> Iterator[Tensor]:
    """The pieces of evidence of ``Markov2.evidence`` at the last token's point after ``layer``: ``[B, H, E]``
    each."""
    near_LHEE, skip_LHEE, extra_RF = chain.tables()
    last_B, device = last_valid_B(batch.valid_BT), near_LHEE.device
    rows_B = torch.arange(last_B.shape[0], device=device)
    experts_BLK = batch.experts_BTLK[rows_B, last_B]
    nothing_BHE = near_LHEE.new_zeros(last_B.shape[0], chain.lookahead, chain.experts)
    yield near_LHEE[layer][:, experts_BLK[:, layer]].sum(2).transpose(0, 1) if layer >= 0 else nothing_BHE
    if extra_RF is not None and layer < 1:
        yield from (nothing_BHE, nothing_BHE)
    elif extra_RF is not None:
        yield skip_LHEE[layer][:, experts_BLK[:, layer - 1]].sum(2).transpose(0, 1)
        row_BM = chain.row_JM[layer - 1, chain.pairs(experts_BLK[:, layer - 1 : layer + 1])[:, 0]]
        row_BM = row_BM.masked_fill(row_BM < 0, len(extra_RF) - 1)
        yield F.embedding_bag(row_BM, extra_RF, mode="sum").view_as(nothing_BHE) / chain.ranks
    if not chain.adapts:
        return
    column_H, wrapped_H = chain.columns[layer + 1], chain.kinds[layer + 1] != WITHIN
    goal_H = column_H % chain.layers
    prior_HE = chain.prior_LE()[goal_H]
    age_BT1 = (last_B[:, None] - torch.arange(batch.valid_BT.shape[1], device=device))[..., None]
    target_BTHK, valid_BT1 = batch.experts_BTLK[:, :, goal_H], batch.valid_BT[..., None]
    # The next token's layers that this one has passed are known of this one too.
    age_BTH = age_BT1 - (~((column_H >= chain.layers) & (goal_H <= layer))).long()
    for decay in chain.decays:
        weight_BTH = valid_BT1 * (age_BTH >= 0) * (1 - decay) * decay ** age_BTH.clamp(min=0)
        recent_BHE, mass_BH1 = collected(nothing_BHE, target_BTHK, weight_BTH)
        p_BHE = OWN_SHARE * (recent_BHE - mass_BH1 * prior_HE) + prior_HE
        yield chain.link(p_BHE) - chain.link(prior_HE)
    if layer < 0:
        yield nothing_BHE
        return
    same_BTKK = batch.experts_BTLK[:, :, layer, :, None] == experts_BLK[:, layer][:, None, None]
    shared_BT1 = same_BTKK.sum((2, 3))[..., None] * valid_BT1 * chain.decays[-1] ** age_BT1.clamp(min=0)
    following_BTHK = torch.cat([target_BTHK[:, 1:], torch.zeros_like(target_BTHK[:, :1])], dim=1)
    target_BTHK = torch.where(wrapped_H[:, None], following_BTHK, target_BTHK)
    there_BTH = torch.where(wrapped_H, next_valid_BT(batch)[..., None], valid_BT1)
    oldest_H = 1 + (torch.arange(chain.lookahead, device=device) >= chain.layers).long()
    hits_BHE, mass_BH1 = collected(nothing_BHE, target_BTHK, shared_BT1 * there_BTH * (age_BT1 >= oldest_H))
    p_BHE = (hits_BHE + chain.smoothing * prior_HE) / (mass_BH1 + chain.smoothing)
    yield chain.link(p_BHE) - chain.link(prior_HE)


def collected(zero_BHE: Tensor, experts_BTHK: Tensor, weight_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted uses of each expert, and the weights' sum: ``[B, H, E]`` and ``[B, H, 1]``."""
    index_BHX = experts_BTHK.permute(0, 2, 1, 3).flatten(2)
    weight_BHT = weight_BTH.to(zero_BHE.dtype).transpose(1, 2)
    weight_BHX = weight_BHT[..., None].expand(*weight_BHT.shape, experts_BTHK.shape[-1]).flatten(2)
    return zero_BHE.scatter_add(-1, index_BHX, weight_BHX), weight_BHT.sum(-1, keepdim=True)
