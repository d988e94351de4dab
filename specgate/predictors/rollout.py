"""A learned stand-in for the host's own layers, run ahead from every source point at once.

Letters: B sequences, T tokens, N = B * T tokens flat, L MoE layers, P = L + 1 source points, H horizons, E
experts per layer, D hidden size, A attention heads, C width of a head.

From point p the residual stream x (the hidden state at layer p - 1, or at p = 0 an embedding of the token)
goes through H steps; step j adds what the experts of layer m = p - 1 + j would add and then what the
attention of layer m + 1 would add, and hands x to that layer's router:

    x <- x + experts_m(x)      units of each expert, times the expert's weight: the host's own at j = 0, later
                               the target router's softmax on x, the K largest kept
    x <- x + attention_m+1(x)  over the earlier tokens, as far as they are known at the point

Both have the form that hosts have, so that they can become what they stand in for. The maps belong to the
host's layer, not to the source point, so that every horizon trains them. A step's source points run as one
batched product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(x: Tensor) -> Tensor:
    """x over its root mean square, along the last axis."""
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` along the first axis; its gradient is added up without sorting, as indexing's would be."""
    return x.index_select(0, index)


class LayerAttention(nn.Module):
    """What the host's attention would add, per host layer.

    Queries and keys are turned by position (RoPE: Su et al., 2021, arXiv:2104.09864), in part or not at all,
    and a bias is learned per distance (Raffel et al., 2020, arXiv:1910.10683).

    Args:
        heads, width: A and C. span: distances beyond share one bias. rotary: share of a head that is turned.
        qk_norm: bring queries and keys to unit root mean square first (as OLMoE does).
    """

    angle_C: Tensor

    def __init__(
        self,
        layers: int,
        hidden: int,
        heads: int,
        width: int,
        *,
        span: int,
        rotary: float,
        qk_norm: bool,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        self.heads, self.width, self.span, self.bidirectional = heads, width, span, bidirectional
        size, bound = heads * width, 1 / math.sqrt(hidden)
        self.qkv_LDF = nn.Parameter(torch.empty(layers, hidden, 3 * size).uniform_(-bound, bound))
        self.out_LFD = nn.Parameter(torch.zeros(layers, size, hidden))
        sides = 2 * span + 1 if bidirectional else span + 1
        self.bias_LAS = nn.Parameter(torch.zeros(layers, heads, sides))
        self.gain_L2F = nn.Parameter(torch.ones(layers, 2, size)) if qk_norm else None
        turned = int(rotary * width) // 2 * 2  # values per head that are turned, in pairs
        self.register_buffer(
            "angle_C", 10000.0 ** (-torch.arange(0, turned, 2).float() / max(turned, 1)), persistent=False
        )

    def turn(self, x_PBATC: Tensor, positions_BT: Tensor) -> Tensor:
        """Rotate the first values of every head by the token's position."""
        half = len(self.angle_C)
        if not half:
            return x_PBATC
        phase = positions_BT[:, None, :, None].float() * self.angle_C
        cos, sin = phase.cos().to(x_PBATC.dtype), phase.sin().to(x_PBATC.dtype)
        a, b, rest = x_PBATC.split([half, half, self.width - 2 * half], dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)

    def heads_of(self, x_PND: Tensor, layer_P: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[P, B, A, T, C]``."""
        B, T = positions_BT.shape
        q, k, v = torch.bmm(x_PND, rows(self.qkv_LDF, layer_P)).chunk(3, dim=-1)
        if self.gain_L2F is not None:
            gain_P2F = rows(self.gain_L2F, layer_P).to(q.dtype)
            q, k = unit(q) * gain_P2F[:, :1], unit(k) * gain_P2F[:, 1:]
        q, k, v = (y.view(len(y), B, T, self.heads, self.width).transpose(2, 3) for y in (q, k, v))
        return self.turn(q, positions_BT), self.turn(k, positions_BT), v

    def bias_PATT(self, T: int, layer_P: Tensor) -> Tensor:
        """Additive bias by distance, minus infinity where a token may not look: ``[P, A, T, T]``."""
        age_TT = torch.arange(T, device=layer_P.device)
        age_TT = age_TT[:, None] - age_TT[None]
        low = -self.span if self.bidirectional else 0
        place = (age_TT.clamp(low, self.span) - low).flatten()
        bias = rows(self.bias_LAS, layer_P).index_select(-1, place).unflatten(-1, (T, T))
        return bias if self.bidirectional else bias.masked_fill(age_TT < 0, -torch.inf)

    def forward(self, x_PND: Tensor, layer_P: Tensor, positions_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Every token looks at the tokens of the same point (prefill: they are as far as this one).

        Shapes:
            x_PND: ``[P, N, D]``. layer_P: int64, the host layer whose attention it is. output: ``[P, N, D]``.
        """
        q, k, v = self.heads_of(x_PND, layer_P, positions_BT)
        P, (B, T) = len(q), positions_BT.shape
        bias = self.bias_PATT(T, layer_P)[:, None].to(q.dtype)
        if self.bidirectional:
            bias = bias.masked_fill(~valid_BT[None, :, None, None, :], -1e4)
        out = F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias.expand(P, B, -1, -1, -1).flatten(0, 1)
        )
        mixed = out.view(P, B, self.heads, T, self.width).transpose(2, 3).reshape(P, B * T, -1)
        return torch.bmm(mixed, rows(self.out_LFD, layer_P))

    def onto_past(self, x_PND: Tensor, past_PND: Tensor, layer_P: Tensor, positions_BT: Tensor) -> Tensor:
        """Every token looks at itself at its own point, and at earlier tokens as they went by this layer
        (decode: they are done).

        Shapes:
            past_PND: ``[L, N, D]``, row l what entered the attention of host layer l.
        """
        q, own_k, own_v = self.heads_of(x_PND, layer_P, positions_BT)
        every_P = torch.arange(len(past_PND), device=layer_P.device)
        _, k, v = self.heads_of(past_PND, every_P, positions_BT)
        k, v = k[layer_P], v[layer_P]
        T = positions_BT.shape[1]
        bias = self.bias_PATT(T, layer_P)[:, None]
        now = torch.eye(T, dtype=torch.bool, device=bias.device)
        own = (q * own_k).sum(-1, keepdim=True) / math.sqrt(self.width) + bias[..., :1, :1]
        seen = q @ k.transpose(-1, -2) / math.sqrt(self.width) + bias.masked_fill(now, -torch.inf).to(q.dtype)
        weights = torch.cat([seen, own.to(seen.dtype)], dim=-1).float().softmax(-1).to(v.dtype)
        out = weights[..., :-1] @ v + weights[..., -1:] * own_v
        mixed = out.transpose(2, 3).flatten(1, 2).flatten(2)
        return torch.bmm(mixed, rows(self.out_LFD, layer_P))
