"""What a learned predictor looks at, built so that entry (t, p) contains only what is known there (see
base.py).

Letters: B sequences, T tokens, N = B * T, L MoE layers, P = L + 1 source points, H horizons, E experts per
layer, K experts per token, D hidden size, F features, V token ids.

Every block is a tensor ``[B, T, P, f]``. All scans over tokens are one multiplication with a ``[T, T]`` decay
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specgate.predictors.layers import PointAttention, lookup
from specgate.traces.batch import RoutingBatch

if TYPE_CHECKING:
    from specgate.predictors.base import Predictor

HEAD_WIDTH = 16
MEANS, SLOW = (0.5, 0.9), 0.8
"""Rates of the decayed means of the running state and of the hidden state."""

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
    pad = x.new_zeros(x.shape[0], abs(by), *x.shape[2:])  # as long as that even where x is shorter: no guard
    if by > 0:
        return torch.cat([pad, x], dim=1)[:, : x.shape[1]]
    return torch.cat([x, pad], dim=1)[:, -by:]


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


def executed_weights(batch: RoutingBatch) -> Tensor:
    """Router weights, 0 on padding and where a full expert dropped the token: ``[B, T, L, K]`` float32."""
    values_BTLK = batch.weights_BTLK.float()
    if batch.dropped_BTL is not None:
        values_BTLK = values_BTLK * ~batch.dropped_BTL[..., None]
    return values_BTLK * batch.valid_BT[:, :, None, None]


class History:
    """What came before the last token of each sequence, as weighted sums over tokens.

    Args:
        last_B: index of the last token; what the batch holds of later ones is not looked at.
    """

    def __init__(self, batch: RoutingBatch, last_B: Tensor) -> None:
        self.batch, self.last_B = batch, last_B
        self.rows_B = torch.arange(last_B.shape[0], device=last_B.device)
        self.age_BT = last_B[:, None] - torch.arange(batch.valid_BT.shape[1], device=last_B.device)

    def token(self, x_BTF: Tensor, by: int) -> Tensor:
        """``x`` of the token ``by`` before the last, zeros where there is none: ``[B, F]``."""
        index_B = self.last_B - by
        there_B = (index_B >= 0) & (index_B < x_BTF.shape[1])
        return x_BTF[self.rows_B, index_B.clamp(0, x_BTF.shape[1] - 1)] * there_B[:, None]

    def decay_BTC(self, decay_C: Tensor, lag: int) -> Tensor:
        """Weights of :func:`decayed` at several rates, as it stands ``lag`` tokens before the last."""
        age_BT1 = (self.age_BT - lag)[..., None]
        return decay_C ** age_BT1.clamp(min=0) * ((age_BT1 >= 0) * (1 - decay_C))


def stack_of(predictor: Predictor, decays: Sequence[float] | None) -> dict[str, Any]:
    """What features must know of a predictor's stack, as keyword arguments; ``decays`` None: 0.7 and 0.95."""
    return {
        "layers": predictor.layers,
        "experts": predictor.experts,
        "vocab_size": predictor.vocab_size,
        "horizons": predictor.lookahead,
        "phase": predictor.phase,
        "hidden_size": predictor.hidden_size,
        "bidirectional": predictor.bidirectional,
        "decays": [0.7, 0.95] if decays is None else [float(a) for a in decays],
    }


def prior_logit(predictor: Predictor) -> float:
    """The logit of "as often as any other", K / E through the predictor's link."""
    prior = min(predictor.top_k / predictor.experts, 0.999)
    return math.log(prior) if predictor.top_k == 1 else math.log(prior / (1 - prior))


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
            the attention over tokens (0: none). bidirectional: it sees later tokens too.

    Shapes:
        forward: ``RoutingBatch`` -> features ``[B, T, P, F]`` float32 with F = :attr:`size`, and the router
            weights of the point's own layer ``[B, T, P, E]`` (they are among the features too).
    """

    decay_C: Tensor
    means_C: Tensor
    slow_1: Tensor

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
        bidirectional: bool = False,
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
        for name, rates in (("decay_C", decays), ("means_C", MEANS), ("slow_1", [SLOW])):
            self.register_buffer(name, torch.tensor(rates, dtype=torch.float32), persistent=False)
        self.attention: PointAttention | None = None
        if heads:
            seen = token_dim + (state_dim if hidden_size is None else hidden_size)
            self.attention = PointAttention(layers + 1, seen, heads, HEAD_WIDTH, bidirectional)
            self.size += heads * HEAD_WIDTH

    def forward(self, batch: RoutingBatch) -> tuple[Tensor, Tensor]:
        P, scale = self.layers + 1, self.experts**0.5
        weighted_BTLE = multi_hot_BTLE(batch, self.experts, weighted=True)
        used_BTLE = multi_hot_BTLE(batch, self.experts, weighted=False)
        token_BTF = lookup(self.token_VF, batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
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
            blocks.append(self.attention(torch.cat([token_BTPF, seen_BTPF], dim=-1), batch.valid_BT))
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
            means = [decayed(state_BTPF[:, :, -1:], a).expand_as(state_BTPF) for a in MEANS]
        else:
            means = [decayed(state_BTPF, a) for a in MEANS]
        return [state_BTPF, *[shifted(m) * 2 for m in means]]

    def hidden_blocks(self, batch: RoutingBatch) -> list[Tensor]:
        """Normalised residual stream, its change over the layer, its decayed mean over earlier tokens, its
        log-norm."""
        assert batch.hidden_BTLD is not None
        hidden_BTLD = batch.hidden_BTLD.float() * batch.valid_BT[:, :, None, None]
        rms_BTL1 = (hidden_BTLD.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        unit_BTLD = hidden_BTLD / rms_BTL1
        change_BTLD = unit_BTLD - shift_layer(unit_BTLD)
        mean_BTLD = shifted(decayed(unit_BTLD, SLOW)) * 2
        return [points(x) for x in (unit_BTLD, change_BTLD, mean_BTLD, rms_BTL1.log())]

    # ------------------------------------------------------------------ one point of one token

    def step(self, batch: RoutingBatch, layer: int, last_B: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` gives at the point after ``layer`` of token ``last_B`` of each sequence, at a
        fraction of the work: sums over tokens have one row, only one point is computed.

        Shapes:
            output: ``[B, F]`` and ``[B, E]``.
        """
        history = History(batch, last_B)
        token_BTF = lookup(self.token_VF, batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
        executed_BTLK = executed_weights(batch)
        experts_BLK = batch.experts_BTLK[history.rows_B, last_B]
        weights_BLK = executed_BTLK[history.rows_B, last_B] * self.experts**0.5
        nothing_BE = token_BTF.new_zeros(last_B.shape[0], self.experts)
        this_BE, before_BE = (
            nothing_BE.scatter(1, experts_BLK[:, x], weights_BLK[:, x]) if x >= 0 else nothing_BE
            for x in (layer, layer - 1)
        )
        blocks = [history.token(token_BTF, by) for by in self.offsets] + [this_BE, before_BE]
        blocks += self._state_step(history, executed_BTLK, token_BTF, layer)
        if self.phase == "decode":
            blocks.append(self._past_step(history, executed_BTLK, layer))
        seen_BTF: Tensor | None = None
        if self.hidden_size is not None:
            seen_BTF, hidden = self._hidden_step(history, layer)
            blocks += hidden
        if self.attention is not None:
            if seen_BTF is None:
                seen_BTF = self._state_BTF(batch, executed_BTLK, token_BTF, layer)
            about_BTF = torch.cat([token_BTF, seen_BTF], dim=-1)
            blocks.append(self.attention.step(about_BTF, batch.valid_BT, last_B, layer + 1))
        return torch.cat(blocks, dim=-1), this_BE

    def _state_step(
        self, history: History, executed_BTLK: Tensor, token_BTF: Tensor, layer: int
    ) -> list[Tensor]:
        """:meth:`running_state` at one point of one token: blocks ``[B, f]`` and ``[B, 2 f]``."""
        batch, last_B, rows_B = history.batch, history.last_B, history.rows_B
        start_BTF, table_XF = self.start_VF(token_BTF), self.expert_LEF.flatten(0, 1)
        first_L1 = torch.arange(self.layers, device=last_B.device)[:, None] * self.experts
        cell_BTLK = batch.experts_BTLK + first_L1
        value_BTLK = executed_BTLK + 0.5 * batch.valid_BT[:, :, None, None]
        state_BF = start_BTF[rows_B, last_B]
        if depth := layer + 1:
            used_BXF = table_XF[cell_BTLK[rows_B, last_B, :depth].flatten(1)]
            value_BX1 = value_BTLK[rows_B, last_B, :depth].flatten(1)[..., None]
            state_BF = state_BF + (used_BXF * value_BX1).sum(1)
        state_BF = state_BF * (depth + 1) ** -0.5
        depth = self.layers if self.phase == "decode" else layer + 1
        time_BTC = 2 * history.decay_BTC(self.means_C, 1)
        mean_BCF = time_BTC.mT @ start_BTF
        if depth:
            B, C = time_BTC.shape[0], time_BTC.shape[2]
            cell_BX = cell_BTLK[:, :, :depth].flatten(1)
            value_BTCX = value_BTLK[:, :, None, :depth].flatten(3) * time_BTC[..., None]
            used_BCX = value_BTCX.new_zeros(B, C, depth * self.experts)
            index_BCX = cell_BX[:, None].expand(-1, C, -1)
            used_BCX = used_BCX.scatter_add(2, index_BCX, value_BTCX.transpose(1, 2).flatten(2))
            mean_BCF = mean_BCF + used_BCX @ table_XF[: depth * self.experts]
        return [state_BF, (mean_BCF * (depth + 1) ** -0.5).flatten(1)]

    def _state_BTF(self, batch: RoutingBatch, executed_BTLK: Tensor, token_BTF: Tensor, layer: int) -> Tensor:
        """The running state of every token at one point: ``[B, T, f]``."""
        state_BTF, depth = self.start_VF(token_BTF), layer + 1
        if depth:
            first_L1 = torch.arange(depth, device=state_BTF.device)[:, None] * self.experts
            steps = self.expert_LEF.flatten(0, 1)[batch.experts_BTLK[:, :, :depth] + first_L1]
            value = 0.5 * batch.valid_BT[:, :, None, None] + executed_BTLK[:, :, :depth]
            state_BTF = state_BTF + (steps * value[..., None]).sum((2, 3))
        return state_BTF * (depth + 1) ** -0.5

    def _past_step(self, history: History, executed_BTLK: Tensor, layer: int) -> Tensor:
        """The target layers' experts of the previous token and their decayed use: ``[B, C * H * E]``."""
        batch, H = history.batch, self.horizons
        column_H = torch.arange(layer + 1, layer + 1 + H, device=history.last_B.device)
        column_H = column_H.clamp(max=2 * self.layers - 1)
        # The next token's layers that are passed already include this token, the others do not.
        lag_H = 1 - ((column_H >= self.layers) & (column_H <= self.layers + layer)).long()
        age_BTH = history.age_BT[..., None] - lag_H
        target_H = column_H % self.layers
        time_BTHC = self.decay_C ** age_BTH.clamp(min=0)[..., None] * (1 - self.decay_C)
        time_BTHC = time_BTHC * ((age_BTH >= 0) & batch.valid_BT[..., None])[..., None]
        last_BTHK = executed_BTLK[:, :, target_H] * (age_BTH == 0)[..., None]
        decayed_BTCHK = time_BTHC.mT[..., None].expand(-1, -1, -1, -1, last_BTHK.shape[-1])
        value_BTCHK = torch.cat([last_BTHK[:, :, None], decayed_BTCHK], dim=2) * self.experts**0.5
        first_CH1 = torch.arange(value_BTCHK.shape[2] * H, device=lag_H.device).view(-1, H, 1) * self.experts
        cell_BTCHK = batch.experts_BTLK[:, :, None, target_H] + first_CH1
        zeros_BX = value_BTCHK.new_zeros(value_BTCHK.shape[0], first_CH1.numel() * self.experts)
        return zeros_BX.scatter_add(1, cell_BTCHK.flatten(1), value_BTCHK.flatten(1))

    def _hidden_step(self, history: History, layer: int) -> tuple[Tensor, list[Tensor]]:
        """:meth:`hidden_blocks` at one point: all tokens' normalised stream, and the last one's blocks."""
        batch = history.batch
        assert batch.hidden_BTLD is not None
        if layer < 0:
            none_BTD = torch.zeros_like(batch.hidden_BTLD[:, :, 0], dtype=torch.float32)
            none_BD = none_BTD[:, 0]
            return none_BTD, [none_BD, none_BD, none_BD, none_BD[:, :1]]
        hidden_BTD = batch.hidden_BTLD[:, :, layer].float() * batch.valid_BT[..., None]
        rms_BT1 = (hidden_BTD.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        unit_BTD = hidden_BTD / rms_BT1
        last_BD = history.token(unit_BTD, 0)
        change_BD = last_BD
        if layer > 0:
            before_BD = history.token(batch.hidden_BTLD[:, :, layer - 1], 0).float()
            change_BD = last_BD - before_BD * (before_BD.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        time_BT1 = 2 * history.decay_BTC(self.slow_1, 1)
        mean_BD = (time_BT1.mT @ unit_BTD)[:, 0]
        return unit_BTD, [last_BD, change_BD, mean_BD, history.token(rms_BT1, 0).log()]


def points(x_BTL: Tensor) -> Tensor:
    """Per-layer values as per-point values: point p = l + 1 sees layer l, point 0 zeros: ``[B, T, L, f] ->
    [B, T, P, f]``."""
    return torch.cat([torch.zeros_like(x_BTL[:, :, :1]), x_BTL], dim=2)


def shift_layer(x_BTL: Tensor) -> Tensor:
    """Layer l - 1's values at layer l, zeros at layer 0."""
    return torch.cat([torch.zeros_like(x_BTL[:, :, :1]), x_BTL[:, :, :-1]], dim=2)
