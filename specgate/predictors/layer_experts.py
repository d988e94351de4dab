"""A learned stand-in for the experts of the host's layers: units of each expert, weighted by its gate.

Letters: P source points, N tokens, D hidden size, E experts per layer, K of them with a gate above 0, U units
per expert, M maps into a unit (2 for SwiGLU, else 1), R = P * N * K rows.

Two ways to the same values. The dense one runs every expert on every token: one batched product, best for
few tokens and captured by a CUDA graph. The grouped one sorts the (token, expert) pairs by expert and runs
those alone, as inference engines run a mixture of experts (Gale et al., "MegaBlocks", 2022,
arXiv:2211.15841): E / K times less work and memory, best for training.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError

ACTIVATIONS = ("swiglu", "relu", "gelu")
FEW = 1024
"""(point, token) pairs up to which all experts are run."""


class LayerExperts(nn.Module):
    """What the host's experts would add to the residual stream: units of each expert, per host layer.

    Args:
        top_k: K, the most gates of a token that are not 0.
        units: U, per expert. activation: ``swiglu`` (two maps in), ``relu`` or ``gelu`` (one).

    Shapes:
        forward: x ``[P, N, D]``, gates ``[P, N, E]``, layer ``[P]`` int64 -> ``[P, N, D]``.

    Raises:
        ConfigError: for an unknown activation.
    """

    def __init__(
        self, layers: int, experts: int, top_k: int, hidden: int, units: int, activation: str, dropout: float
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation={activation!r} is unknown: choose one of {', '.join(ACTIVATIONS)}")
        self.top_k, self.activation, self.drop = top_k, activation, nn.Dropout(dropout)
        wide = units * (2 if activation == "swiglu" else 1)
        bound = 1 / math.sqrt(hidden)
        self.into_LEDM = nn.Parameter(torch.empty(layers, experts, hidden, wide).uniform_(-bound, bound))
        self.out_LEUD = nn.Parameter(torch.zeros(layers, experts, units, hidden))

    def forward(self, x_PND: Tensor, gates_PNE: Tensor, layer_P: Tensor) -> Tensor:
        run = self.grouped if self._pays(x_PND) else self.dense
        return run(x_PND, gates_PNE, layer_P)

    def _pays(self, x_PND: Tensor) -> bool:
        """Whether to sort by expert: not for few tokens, nor where a GPU has no such product (its operands
        are bfloat16, in multiples of 16 bytes)."""
        if x_PND.shape[0] * x_PND.shape[1] <= FEW or self.top_k * 2 > self.into_LEDM.shape[1]:
            return False
        sizes = (*self.into_LEDM.shape[-2:], self.out_LEUD.shape[-2])
        half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        return not x_PND.is_cuda or (half and all(size % 8 == 0 for size in sizes))

    def activate(self, into: Tensor) -> Tensor:
        """The units' values of what was mapped into them (SwiGLU: left halves, then right halves)."""
        if self.activation == "swiglu":
            left, right = into.chunk(2, dim=-1)
            return F.silu(left) * right
        return F.relu(into) if self.activation == "relu" else F.gelu(into)

    def dense(self, x_PND: Tensor, gates_PNE: Tensor, layer_P: Tensor) -> Tensor:
        """Every expert on every token."""
        into_PEDM, out_PEUD = (w.index_select(0, layer_P) for w in (self.into_LEDM, self.out_LEUD))
        E = gates_PNE.shape[-1]
        into_PNEM = torch.bmm(x_PND, into_PEDM.transpose(1, 2).flatten(2)).unflatten(-1, (E, -1))
        units_PNEU = self.drop(self.activate(into_PNEM))
        gated = (units_PNEU * gates_PNE[..., None].to(units_PNEU.dtype)).flatten(-2)
        return torch.bmm(gated, out_PEUD.flatten(1, 2))

    def grouped(self, x_PND: Tensor, gates_PNE: Tensor, layer_P: Tensor) -> Tensor:
        """The K experts of each token."""
        (P, N, E), K = gates_PNE.shape, self.top_k
        dtype = torch.get_autocast_dtype("cuda") if x_PND.is_cuda else x_PND.dtype
        into, out = (
            w.index_select(0, layer_P).flatten(0, 1).to(dtype) for w in (self.into_LEDM, self.out_LEUD)
        )
        gate_PNK, expert_PNK = gates_PNE.topk(K, dim=-1, sorted=False)
        group_PNK = expert_PNK + E * torch.arange(P, device=x_PND.device)[:, None, None]
        sorted_R, order_R = group_PNK.flatten().sort()
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(P * N * K, device=x_PND.device))
        ends = torch.arange(1, P * E + 1, device=x_PND.device)
        ends = torch.searchsorted(sorted_R, ends).to(torch.int32)
        rows_RD = x_PND.to(dtype)[:, :, None].expand(-1, -1, K, -1).reshape(P * N * K, -1)
        rows_RD = Permute.apply(rows_RD, order_R, place_R)
        gate_R1 = gate_PNK.reshape(-1, 1).index_select(0, order_R).to(dtype)
        units_RU = self.drop(self.activate(F.grouped_mm(rows_RD, into, offs=ends))) * gate_R1
        found_RD = Permute.apply(F.grouped_mm(units_RU, out, offs=ends), place_R, order_R)
        return found_RD.view(P, N, K, -1).sum(2)


class Permute(torch.autograd.Function):
    """Rows in another order; the gradient goes back by the inverse order, with nothing to add up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None
