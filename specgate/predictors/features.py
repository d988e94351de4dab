"""What a learned predictor looks at, built so that entry (t, p) contains only what is known there (see
base.py).

Letters: B sequences, T tokens, N = B * T, L MoE layers, P = L + 1 source points, H horizons, E experts per
layer, K experts per token, D hidden size, F features, V token ids.

Every block is a tensor ``[B, T, P, f]``. All scans over tokens are one multiplication with a ``[T, T]`` decay
matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specgate.predictors.layers import PointAttention
from specgate.traces.batch import RoutingBatch

HEAD_WIDTH = 16

TOKEN_GAIN = 4.0
"""Token embeddings are stored this much smaller than they are used: Adam then moves a rare id's embedding as
many times faster, which it needs, being updated only in the few steps that contain it."""


def multi_hot_BTLE(batch: RoutingBatch, experts: int, weighted: bool) -> Tensor:
    """Use of each expert, 1 where used, 0 elsewhere and on padding: ``[B, T, L, E]`` float32.

    Args:
        weighted: the router weight instead of 1, and 0 where a full expert dropped the token: what executed.
            (Whether token t was dropped at layer l follows from that layer's routing of tokens up to t.)
    """
    values_BTLK = torch.ones_like(batch.weights_BTLK, dtype=torch.float32)
    if weighted:
        values_BTLK = batch.weights_BTLK.float()
        if batch.dropped_BTL is not None:
            values_BTLK = values_BTLK * ~batch.dropped_BTL[..., None]
    values_BTLK = values_BTLK * batch.valid_BT[:, :, None, None]
    shape = (*batch.experts_BTLK.shape[:3], experts)
    return torch.zeros(shape, device=values_BTLK.device).scatter_(-1, batch.experts_BTLK, values_BTLK)


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """``x[:, t - by]`` at t (dim 1 is time; ``by`` may be negative), zeros where there is no such token."""
    if by == 0:
        return x
    T, pad = x.shape[1], torch.zeros_like(x[:, : min(abs(by), x.shape[1])])
    if by > 0:
        return torch.cat([pad, x[:, : T - pad.shape[1]]], dim=1)
    return torch.cat([x[:, pad.shape[1] :], pad], dim=1)


def decayed(x: Tensor, decay: float) -> Tensor:
    """Exponentially decayed mean ``(1 - a) * sum_{s <= t} a^(t - s) x_s`` over dim 1, for all t at once.

    Shapes:
        x: ``[B, T, ...]``; output: the same.
    """
    age_TT = (
        torch.arange(x.shape[1], device=x.device)[:, None] - torch.arange(x.shape[1], device=x.device)[None]
    )
    matrix_TT = torch.where(age_TT >= 0, decay ** age_TT.clamp(min=0).to(x.dtype), 0.0) * (1 - decay)
    return (matrix_TT.to(x.dtype) @ x.flatten(2)).reshape(x.shape)


def column_PH(layers: int, horizons: int, device: torch.device | None = None) -> Tensor:
    """Target column of (point, horizon): j < L is this token's layer j, j >= L the next token's layer j -
    L."""
    column = torch.arange(layers + 1, device=device)[:, None] + torch.arange(horizons, device=device)[None, :]
    return column.clamp(max=2 * layers - 1)


def at_targets_BTPHE(after_BTLE: Tensor, horizons: int) -> Tensor:
    """A per-layer running state, read at each target as late as it is known at the source point (decode
    only).

    ``after_BTLE`` holds the state after token t. A target in this token reads the state after token t - 1. A
    target in the next token reads the state after token t if its layer was already passed (layer <= l), else
    after t - 1.

    Shapes:
        after_BTLE: ``[B, T, L, ...]``; output: ``[B, T, P, H, ...]``.
    """
    layers = after_BTLE.shape[2]
    both = torch.cat([shifted(after_BTLE), after_BTLE], dim=2)
    column = column_PH(layers, horizons, after_BTLE.device)
    point_P1 = torch.arange(layers + 1, device=column.device)[:, None]
    not_yet_PH = (column >= layers) & (column - layers > point_P1 - 1)
    return both[:, :, torch.where(not_yet_PH, column - layers, column)]


class PointFeatures(nn.Module):
    """The inputs of the learned predictors at every source point.

    Blocks: token embeddings around t; the experts of this and the previous layer, weighted; a running state
    (the token's embedding plus an embedding per expert used so far, the id-only stand-in for the residual
    stream) and its decayed mean over earlier tokens; while decoding the target layers' experts of the
    previous token and their decayed use; with hidden states the normalised residual stream of this layer, its
    change since the previous layer, its decayed mean over earlier tokens and its log-norm.

    Args:
        layers, experts, vocab_size, horizons, phase, hidden_size: of the stack.
        token_dim, state_dim: widths of the embeddings. decays: rates of the recency features. heads: of
            the attention over tokens (0: none).

    Shapes:
        forward: ``RoutingBatch`` -> features ``[B, T, P, F]`` float32 with F = :attr:`size`, and the router
            weights of the point's own layer ``[B, T, P, E]`` (they are among the features too).
    """

    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        vocab_size: int,
        horizons: int,
        phase: str,
        hidden_size: int | None,
        token_dim: int,
        state_dim: int,
        decays: list[float],
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.layers, self.experts, self.horizons = layers, experts, horizons
        self.phase, self.hidden_size, self.decays = phase, hidden_size, decays
        # The ids of the whole prompt are known in prefill, those up to t while decoding.
        self.offsets = [2, 1, 0] if phase == "decode" else [2, 1, 0, -1, -2]
        self.token_VF = nn.Embedding(vocab_size, token_dim)
        nn.init.normal_(self.token_VF.weight, std=0.3 / TOKEN_GAIN)
        self.expert_LEF = nn.Parameter(torch.randn(layers, experts, state_dim) * 0.5)
        self.start_VF = nn.Linear(token_dim, state_dim, bias=False)
        self.size = token_dim * len(self.offsets) + 2 * experts + 3 * state_dim
        if phase == "decode":
            self.size += horizons * experts * (1 + len(decays))
        if hidden_size is not None:
            self.size += 3 * hidden_size + 1
        self.attention: PointAttention | None = None
        if heads:
            seen = token_dim + (state_dim if hidden_size is None else hidden_size)
            self.attention = PointAttention(layers + 1, seen, heads, HEAD_WIDTH)
            self.size += heads * HEAD_WIDTH

    def forward(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        P, scale = self.layers + 1, self.experts**0.5
        weighted_BTLE = multi_hot_BTLE(batch, self.experts, weighted=True)
        used_BTLE = multi_hot_BTLE(batch, self.experts, weighted=False)
        token_BTF = self.token_VF(batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
        around_BTF = torch.cat([shifted(token_BTF, by) for by in self.offsets], dim=-1)
        this_BTPE = points(weighted_BTLE) * scale
        before_BTPE = points(shift_layer(weighted_BTLE)) * scale
        blocks = [around_BTF[:, :, None].expand(-1, -1, P, -1), this_BTPE, before_BTPE]
        blocks += self.running_state(token_BTF, used_BTLE, weighted_BTLE)
        if self.phase == "decode":
            past = [at_targets_BTPHE(weighted_BTLE * scale, self.horizons)]
            past += [at_targets_BTPHE(decayed(used_BTLE, a) * scale, self.horizons) for a in self.decays]
            blocks += [x.flatten(3) for x in past]
        seen_BTPF = blocks[3]
        if self.hidden_size is not None:
            hidden = self.hidden_blocks(batch)
            blocks += hidden
            seen_BTPF = hidden[0]
        if self.attention is not None:
            token_BTPF = token_BTF[:, :, None].expand(-1, -1, P, -1)
            blocks.append(self.attention(torch.cat([token_BTPF, seen_BTPF], dim=-1)))
        return torch.cat(blocks, dim=-1), this_BTPE

    def running_state(self, token_BTF: Tensor, used_BTLE: Tensor, weighted_BTLE: Tensor) -> list[Tensor]:
        """The id-only residual stream, its decayed means over earlier tokens (known at the same point or, in
        decode, after the whole earlier token)."""
        step_BTLF = torch.einsum("btle,lef->btlf", 0.5 * used_BTLE + weighted_BTLE, self.expert_LEF)
        start_BT1F = self.start_VF(token_BTF)[:, :, None]
        state_BTPF = torch.cat([start_BT1F, step_BTLF], dim=2).cumsum(2)
        norm_P1 = (
            torch.arange(1, self.layers + 2, device=state_BTPF.device)[:, None].to(state_BTPF.dtype).sqrt()
        )
        state_BTPF = state_BTPF / norm_P1
        if self.phase == "decode":
            means = [decayed(state_BTPF[:, :, -1:], a).expand_as(state_BTPF) for a in (0.5, 0.9)]
        else:
            means = [decayed(state_BTPF, a) for a in (0.5, 0.9)]
        return [state_BTPF, *[shifted(m) * 2 for m in means]]

    def hidden_blocks(self, batch: RoutingBatch) -> list[Tensor]:
        """Normalised residual stream, its change over the layer, its decayed mean over earlier tokens, its
        log-norm."""
        assert batch.hidden_BTLD is not None
        hidden_BTLD = batch.hidden_BTLD.float() * batch.valid_BT[:, :, None, None]
        rms_BTL1 = (hidden_BTLD.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        unit_BTLD = hidden_BTLD / rms_BTL1
        change_BTLD = unit_BTLD - shift_layer(unit_BTLD)
        mean_BTLD = shifted(decayed(unit_BTLD, 0.8)) * 2
        return [points(x) for x in (unit_BTLD, change_BTLD, mean_BTLD, rms_BTL1.log())]


def points(x_BTL: Tensor) -> Tensor:
    """Per-layer values as per-point values: point p = l + 1 sees layer l, point 0 zeros: ``[B, T, L, f] ->
    [B, T, P, f]``."""
    return torch.cat([torch.zeros_like(x_BTL[:, :, :1]), x_BTL], dim=2)


def shift_layer(x_BTL: Tensor) -> Tensor:
    """Layer l - 1's values at layer l, zeros at layer 0."""
    return torch.cat([torch.zeros_like(x_BTL[:, :, :1]), x_BTL[:, :, :-1]], dim=2)
