"""Building blocks with one set of weights per source point, run as batched products.

Letters: B sequences, T tokens, N flat tokens, P source points, F features, A attention heads, C width of
a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointLinear(nn.Module):
    """One linear map per source point.

    Shapes:
        forward: ``[P, N, in]`` -> ``[P, N, out]``.
    """

    def __init__(
        self, points: int, size_in: int, size_out: int, zero: bool = False, bias: float = 0.0
    ) -> None:
        super().__init__()
        bound = 0.0 if zero else 1 / math.sqrt(size_in)
        self.weight = nn.Parameter(torch.empty(points, size_in, size_out).uniform_(-bound, bound))
        self.bias_P1 = nn.Parameter(torch.full((points, size_out), bias))

    def forward(self, x_PNF: Tensor) -> Tensor:
        return torch.baddbmm(self.bias_P1[:, None], x_PNF, self.weight)


class PointAttention(nn.Module):
    """Causal self-attention over tokens at each source point, on what is known at that point of each token.

    The host's next attention mixes the earlier tokens' states into this one's; this foresees some of it.
    Distances enter as a learned linear penalty per head (ALiBi: Press et al., 2022, arXiv:2108.12409).

    Shapes:
        forward: ``[B, T, P, F]`` -> ``[B, T, P, A * C]``.
    """

    def __init__(self, points: int, size: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query_key_value = PointLinear(points, size, 3 * heads * width)
        self.slope_PA = nn.Parameter(torch.linspace(-4.0, 0.0, heads).repeat(points, 1))

    def forward(self, x_BTPF: Tensor) -> Tensor:
        B, T, P = x_BTPF.shape[:3]
        x_PNF = x_BTPF.flatten(0, 1).transpose(0, 1)
        qkv = self.query_key_value(x_PNF).view(P, B, T, 3, self.heads, self.width)
        q_PBATC, k_PBATC, v_PBATC = qkv.permute(3, 0, 1, 4, 2, 5)
        age_TT = torch.arange(T, device=q_PBATC.device)
        age_TT = age_TT[:, None] - age_TT[None]
        penalty_PATT = -F.softplus(self.slope_PA)[..., None, None] * age_TT.clamp(min=0)
        penalty_PATT = penalty_PATT.masked_fill(age_TT < 0, -torch.inf).to(q_PBATC.dtype)
        shape = (P * B, self.heads, T)
        out = F.scaled_dot_product_attention(
            q_PBATC.reshape(*shape, -1),
            k_PBATC.reshape(*shape, -1),
            v_PBATC.reshape(*shape, -1),
            attn_mask=penalty_PATT[:, None].expand(-1, B, -1, -1, -1).reshape(*shape, T),
        )
        return out.view(P, B, self.heads, T, self.width).permute(1, 3, 0, 2, 4).reshape(B, T, P, -1)
