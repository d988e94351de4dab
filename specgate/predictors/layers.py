"""Building blocks with one set of weights per source point, run as batched products.

Letters: B sequences, T tokens, N flat tokens, P source points, F features, A attention heads, C width of
a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def weight_at(module: nn.Module, row: int) -> Tensor:
    """``module.weight[row]``, unpacking that row alone where the weights are packed."""
    packed = getattr(getattr(module, "parametrizations", None), "weight", None)
    if packed is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight[row]
    return packed[0](packed.original0[row], packed.original1[row])


def lookup(table: nn.Embedding, ids: Tensor) -> Tensor:
    """``table(ids)``, unpacking those rows alone where the table is packed: ``[...]`` -> ``[..., F]``."""
    packed = getattr(getattr(table, "parametrizations", None), "weight", None)
    if packed is None:
        return table(ids)
    return packed[0](packed.original0[ids], packed.original1[ids])


_NEVER = -1e4
"""Added to the scores of padding (not minus infinity: a sequence may be all padding)."""


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

    def at(self, x_NF: Tensor, point: int, start: int = 0, stop: int | None = None) -> Tensor:
        """One point's map alone: ``[N, in]`` -> ``[N, out]``, or outputs ``start`` to ``stop`` of it."""
        weight_FO = weight_at(self, point)[:, start:stop]
        return torch.addmm(self.bias_P1[point, start:stop], x_NF, weight_FO)


class PointAttention(nn.Module):
    """Self-attention over tokens at each source point, on what is known at that point of each token.

    The host's next attention mixes other tokens' states into this one's; this foresees some of it. Distances
    enter as a learned linear penalty per head (ALiBi: Press et al., 2022, arXiv:2108.12409).

    Args:
        both_ways: look at later tokens too, with a penalty of their own (a bidirectional stack); otherwise at
            this and earlier ones.

    Shapes:
        forward: ``[B, T, P, F]`` and valid ``[B, T]`` -> ``[B, T, P, A * C]``.
    """

    def __init__(self, points: int, size: int, heads: int, width: int, both_ways: bool = False) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.query_key_value = PointLinear(points, size, 3 * heads * width)
        self.slope_PA = nn.Parameter(torch.linspace(-4.0, 0.0, heads).repeat(points, 1))
        self.later_PA = nn.Parameter(self.slope_PA.detach().flip(1)) if both_ways else None

    def penalty(self, age: Tensor, of: int | slice) -> Tensor:
        """Added to the scores of tokens ``age`` tokens back, at points ``of``: ``[P, A, ...age]``, or
        ``[A, ...age]`` at one point."""
        room = (...,) + (None,) * age.dim()
        back = -F.softplus(self.slope_PA[of])[room] * age.clamp(min=0)
        if self.later_PA is None:
            return back.masked_fill(age < 0, -torch.inf)
        return back - F.softplus(self.later_PA[of])[room] * (-age).clamp(min=0)

    def forward(self, x_BTPF: Tensor, valid_BT: Tensor) -> Tensor:
        B, T, P = x_BTPF.shape[:3]
        x_PNF = x_BTPF.flatten(0, 1).transpose(0, 1)
        qkv = self.query_key_value(x_PNF).view(P, B, T, 3, self.heads, self.width)
        q_PBATC, k_PBATC, v_PBATC = qkv.permute(3, 0, 1, 4, 2, 5)
        place_T = torch.arange(T, device=q_PBATC.device)
        bias_P1ATT = self.penalty(place_T[:, None] - place_T, slice(None))[:, None]
        if self.later_PA is not None:  # causal attention never sees the padding on the right
            bias_P1ATT = bias_P1ATT + ~valid_BT[:, None, None] * _NEVER
        shape = (P * B, self.heads, T)
        out = F.scaled_dot_product_attention(
            q_PBATC.reshape(*shape, -1),
            k_PBATC.reshape(*shape, -1),
            v_PBATC.reshape(*shape, -1),
            attn_mask=bias_P1ATT.to(q_PBATC.dtype).expand(-1, B, -1, -1, -1).reshape(*shape, T),
        )
        return out.view(P, B, self.heads, T, self.width).permute(1, 3, 0, 2, 4).reshape(B, T, P, -1)

    def step(self, x_BTF: Tensor, valid_BT: Tensor, last_B: Tensor, point: int) -> Tensor:
        """What :meth:`forward` gives at one point of one token of each sequence.

        Shapes:
            x_BTF: ``[B, T, F]``, the point's inputs at all tokens. last_B: the token of each sequence.
            output: ``[B, A * C]``.
        """
        B, T = x_BTF.shape[:2]
        size = self.heads * self.width
        x_BF = x_BTF[torch.arange(B, device=last_B.device), last_B]
        q_BA1C = self.query_key_value.at(x_BF, point, 0, size).view(B, self.heads, 1, self.width)
        kv = self.query_key_value.at(x_BTF.flatten(0, 1), point, size).view(B, T, 2, self.heads, self.width)
        k_BATC, v_BATC = kv.permute(2, 0, 3, 1, 4)
        age_BT = last_B[:, None] - torch.arange(T, device=last_B.device)
        bias_BA1T = self.penalty(age_BT, point).transpose(0, 1)[:, :, None]
        if self.later_PA is not None:
            bias_BA1T = bias_BA1T + ~valid_BT[:, None, None] * _NEVER
        bias_BA1T = bias_BA1T.to(q_BA1C.dtype)
        return F.scaled_dot_product_attention(q_BA1C, k_BATC, v_BATC, attn_mask=bias_BA1T).reshape(B, size)
