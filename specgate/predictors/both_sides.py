"""The features of the learned predictors for stacks whose tokens may also see later tokens.

Letters: B sequences, T tokens, P source points, F features, A attention heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.predictors.features import HEAD_WIDTH, PointFeatures
from specgate.predictors.layers import PointLinear
from specgate.traces.batch import RoutingBatch

_NEVER = -1e4


class TwoSidedAttention(nn.Module):
    """Self-attention over all real tokens of a sequence at each source point.

    As in :class:`~specgate.predictors.layers.PointAttention` distances enter as learned linear penalties
    (ALiBi: Press et al., 2022, arXiv:2108.12409), here one towards earlier and one towards later tokens.

    Shapes:
        forward: ``[B, T, P, F]`` and valid ``[B, T]`` -> ``[B, T, P, A * C]``.
    """

    def __init__(self, points: int, size: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query_key_value = PointLinear(points, size, 3 * heads * width)
        slope_A = torch.linspace(-4.0, 0.0, heads)
        self.slope_2PA = nn.Parameter(torch.stack([slope_A, slope_A.flip(0)])[:, None].repeat(1, points, 1))

    def forward(self, x_BTPF: Tensor, valid_BT: Tensor) -> Tensor:
        B, T, P = x_BTPF.shape[:3]
        x_PNF = x_BTPF.flatten(0, 1).transpose(0, 1)
        qkv = self.query_key_value(x_PNF).view(P, B, T, 3, self.heads, self.width)
        q_PBATC, k_PBATC, v_PBATC = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        place_T = torch.arange(T, device=x_BTPF.device)
        age_TT = place_T[:, None] - place_T
        away_2TT = torch.stack([age_TT.clamp(min=0), (-age_TT).clamp(min=0)]).to(self.slope_2PA.dtype)
        penalty_PATT = -torch.einsum("spa,stu->patu", F.softplus(self.slope_2PA), away_2TT)
        hidden_B1T = (~valid_BT[:, None, None]) * _NEVER
        mask_PBATT = (penalty_PATT[:, None] + hidden_B1T).to(q_PBATC.dtype)
        out = F.scaled_dot_product_attention(q_PBATC, k_PBATC, v_PBATC, attn_mask=mask_PBATT)
        return out.permute(1, 3, 0, 2, 4).reshape(B, T, P, -1)


class SequenceFeatures(PointFeatures):
    """:class:`PointFeatures` whose attention looks both ways in a bidirectional stack, causal otherwise.

    Args:
        bidirectional: of the stack. heads: of the attention over tokens (0: none). Others as there.

    Shapes:
        forward: as :class:`PointFeatures`.
    """

    def __init__(self, *, bidirectional: bool, heads: int, **kwargs: Any) -> None:
        super().__init__(heads=0 if bidirectional else heads, **kwargs)
        self.around: TwoSidedAttention | None = None
        if bidirectional and heads:
            self.around = TwoSidedAttention(self.layers + 1, self.size, heads, HEAD_WIDTH)
            self.size += heads * HEAD_WIDTH

    def forward(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        x_BTPF, routed_BTPE = super().forward(batch)
        if self.around is not None:
            x_BTPF = torch.cat([x_BTPF, self.around(x_BTPF, batch.valid_BT)], dim=-1)
        return x_BTPF, routed_BTPE
