"""The target routers on today's hidden state plus what each chosen expert changes: cheap by design.

Letters: B sequences, T tokens, N = B * T, L MoE layers, P = L + 1 source points, H horizons, E experts per
layer, K experts per token, D size of the state looked at, R units per expert, W = E * R, A heads, C width of
a head, S width of a token's embedding.

A mixture of experts computes little for much capacity by running K of E experts; a correction of its router
can do the same. Here every (point, expert) has R units that read the state and write to the logits of all
horizons, and only those of the K experts just chosen run (after the conditional computation of Shazeer et
al., 2017, arXiv:1701.06538, and the low-rank updates of Hu et al., 2021, arXiv:2106.09685). One narrow
attention head or two look at earlier tokens; tables of token ids and of hashed pairs and triples of them
(Huang et al., "Over-Tokenized Transformer", 2025, arXiv:2501.16975), which cost an addition, hold what ids
alone say. All that is linear in the state (the routers themselves) is one matrix, or one for every expert
that weighs heaviest; likewise the values.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.predictors.expert_lowrank_step import SHIFT_DECAY, ExpertLowRankStep
from specgate.predictors.features import (
    TOKEN_GAIN,
    at_targets_BTPHE,
    decayed,
    multi_hot_BTLE,
    points,
    shifted,
)
from specgate.predictors.mlp import ENTRY_GAIN
from specgate.traces.batch import RoutingBatch


class ExpertLowRank(ExpertLowRankStep):
    """The ``expert_lowrank`` predictor.

    Args:
        units: R, per expert, or one number per rank of the K chosen experts: the lighter ones run only the
            first of their units.
        foresee: further units, of the experts of the next layer that the forecast itself puts first (one
            number per rank, as many ranks as wished), which write to the horizons after that (None: none).
        heads, head_width: of the attention (0 heads: none). value_width: of its values. span: how many tokens
            back it looks, its own included (None: all).
        shared: units that run for every token, whatever its experts.
        token_dim: S. ngram_rows: of a table for pairs of ids and one for triples, hashed (0: none).
        state_dim: of the id-only state. decays: of the recency features (decode).
        dropout: on the units and on what ids say.
        reuse: start from what the previous point's correction said of the same target.
        shift: let the units and values also see, value by value, the token before and a decayed mean of all
            before (Peng et al., "RWKV", 2023, arXiv:2305.13048). depth: likewise the token's state one layer
            before.
        by_expert: what is linear in the state, and the values, have a matrix for every expert, of which the
            token's heaviest one's is used: as many operations with E times the parameters, which only a small
            host affords.

    Shapes:
        linear_PDF (parameter): ``[P, D, H * E]``, what is linear in the state for every token.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: for units, foresee, span or ngram_rows out of range.
    """

    name: ClassVar[str] = "expert_lowrank"
    step_logits = ExpertLowRankStep.step_logits  # says what this forward says

    def forward(self, batch: RoutingBatch) -> Tensor:
        B, T = batch.valid_BT.shape
        P, H, E = self.layers + 1, self.lookahead, self.experts
        used_BTLE = multi_hot_BTLE(batch, E, weighted=False)
        weighted_BTLE = multi_hot_BTLE(batch, E, weighted=True)
        x_PND = self.state_PND(batch, used_BTLE, weighted_BTLE)
        gate_PNE = points(weighted_BTLE).flatten(0, 1).transpose(0, 1)
        mixed_PND = self.shifted_in(x_PND, B, T)
        units = F.gelu(self.into(mixed_PND))
        own = units[..., : E * self.units].unflatten(-1, (E, self.units))
        size = self.top_k**0.5 if self.top_k > 1 else 1.0
        own = (own * self.gates_PNER((gate_PNE * size).to(own.dtype), batch)).flatten(-2)
        y_PNF = self.out(self.drop(torch.cat([own, units[..., E * self.units :]], dim=-1)))
        y_PNF = y_PNF + torch.bmm(x_PND.to(y_PNF.dtype), self.linear_PDF.to(y_PNF.dtype))
        if self.linear_own is not None:
            y_PNF = y_PNF + self.linear_own(x_PND * (gate_PNE > 0).any(-1, keepdim=True), gate_PNE.argmax(-1))
        token_BTF = self.token_VF(batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
        parts = token_BTF.chunk(len(self.offsets), dim=-1)
        around_BTF = torch.stack([shifted(x, by) for x, by in zip(parts, self.offsets, strict=True)]).sum(0)
        around_BTF = self.drop(around_BTF + self.ngram_BTF(batch))
        around_PNF = around_BTF.flatten(0, 1).expand(P, -1, -1)
        y_PNF = y_PNF + self.weight_out(torch.cat([gate_PNE * E**0.5, around_PNF], dim=-1))
        if self.heads:
            y_PNF = y_PNF + self.mixed_out(self.look_back(x_PND, mixed_PND, gate_PNE, batch.valid_BT))
        y_BTPHE = y_PNF.transpose(0, 1).reshape(B, T, P, H, E) + self.bias_PHE
        if self.phase == "decode":
            past = [used_BTLE, *[decayed(used_BTLE, a) for a in self.decays]]
            for weight_PHE, seen in zip(self.recent_CPHE, past, strict=True):
                y_BTPHE = y_BTPHE + at_targets_BTPHE(seen, H) * weight_PHE
        entry = (self.entry_VF(batch.token_ids_BT) * ENTRY_GAIN).view(B, T, 1, H, E)
        y_BTPHE = torch.cat([y_BTPHE[:, :, :1] + entry, y_BTPHE[:, :, 1:]], dim=2)
        base_BTPHE = self.prior(batch)
        if base_BTPHE is not None:
            base_BTPHE = base_BTPHE * self.trust_PH[..., None]
        if self.ahead is not None:
            next_BTPE = y_BTPHE[..., 0, :] if base_BTPHE is None else (base_BTPHE + y_BTPHE)[..., 0, :]
            later_PNF = self.ahead(mixed_PND, next_BTPE.flatten(0, 1).transpose(0, 1))
            later_BTPHE = later_PNF.transpose(0, 1).reshape(B, T, P, H - 1, E)
            y_BTPHE = torch.cat([y_BTPHE[..., :1, :], y_BTPHE[..., 1:, :] + later_BTPHE], dim=-2)
        y_BTPHE = self.carried(y_BTPHE)
        return y_BTPHE if base_BTPHE is None else base_BTPHE + y_BTPHE

    def gates_PNER(self, gate_PNE: Tensor, batch: RoutingBatch) -> Tensor:
        """The router weight of every unit's expert, 0 for units beyond what its rank runs: ``[P, N, E, R]``,
        or ``[P, N, E, 1]`` if all run."""
        if min(self.by_rank) == self.units:
            return gate_PNE[..., None]
        limit_BTLE = torch.zeros(
            (*batch.experts_BTLK.shape[:3], self.experts), dtype=torch.int64, device=gate_PNE.device
        ).scatter_(-1, batch.experts_BTLK, self.limit_K.expand_as(batch.experts_BTLK))
        limit_PNE1 = points(limit_BTLE).flatten(0, 1).transpose(0, 1)[..., None]
        runs_PNER = torch.arange(self.units, device=gate_PNE.device) < limit_PNE1
        return torch.where(runs_PNER, gate_PNE[..., None], 0.0)

    def carried(self, y_BTPHE: Tensor) -> Tensor:
        """Every point's correction plus a learned share of what the point before said of the same target."""
        if self.reuse_PHE is None:
            return y_BTPHE
        last, out = y_BTPHE[:, :, 0], [y_BTPHE[:, :, 0]]
        for p in range(1, self.layers + 1):
            earlier = torch.cat([last[:, :, 1:], torch.zeros_like(last[:, :, :1])], dim=2)
            last = y_BTPHE[:, :, p] + earlier * self.reuse_PHE[p]
            out.append(last)
        return torch.stack(out, dim=2)

    def shifted_in(self, x_PND: Tensor, B: int, T: int) -> Tensor:
        """x plus learned shares, value by value, of the token before, of a decayed mean of all before and of
        the token's state one point before."""
        mixed_PND = x_PND
        if self.shift_2PD is not None:
            x_BTPD = x_PND.transpose(0, 1).unflatten(0, (B, T))
            mean_BTPD = shifted(decayed(x_BTPD, SHIFT_DECAY))
            before = shifted(x_BTPD) * self.shift_2PD[0] + mean_BTPD * self.shift_2PD[1]
            mixed_PND = (x_BTPD + before).flatten(0, 1).transpose(0, 1)
        if self.depth_PD is not None:
            above_PND = torch.cat([torch.zeros_like(x_PND[:1]), x_PND[:-1]])
            mixed_PND = mixed_PND + above_PND * self.depth_PD[:, None]
        return mixed_PND

    def look_back(self, x_PND: Tensor, mixed_PND: Tensor, gate_PNE: Tensor, valid_BT: Tensor) -> Tensor:
        """Attention over the tokens known at the point (earlier ones, or all of a bidirectional stack):
        ``[P, N, A * C]``."""
        (B, T), P, A, C = valid_BT.shape, self.layers + 1, self.heads, self.head_width
        q_PNF, k_PNC = self.query_key(x_PND).split([A * C, C], dim=-1)
        v_PNF = self.value(mixed_PND)
        if self.value_own is not None:
            ran_PN1 = (gate_PNE > 0).any(-1, keepdim=True)
            v_PNF = v_PNF + self.value_own(mixed_PND * ran_PN1, gate_PNE.argmax(-1))
        q = q_PNF.view(P, B, T, A, C).transpose(2, 3)
        k = k_PNC.view(P, B, 1, T, C).expand(-1, -1, A, -1, -1)
        v = v_PNF.view(P, B, T, A, self.value_width).transpose(2, 3)
        age_TT = torch.arange(T, device=q.device)
        age_TT = age_TT[:, None] - age_TT[None]
        bias = -F.softplus(self.slope_PA)[:, None, :, None, None] * age_TT.abs()
        if self.bidirectional:
            bias = bias.masked_fill(~valid_BT[None, :, None, None, :], -1e4)
        else:
            bias = bias.masked_fill(age_TT < 0, -torch.inf)
        if self.span is not None:
            bias = bias.masked_fill(age_TT.abs() >= self.span, -torch.inf)
        bias = bias.expand(P, B, A, T, T).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.transpose(2, 3).reshape(P, B * T, -1)
