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
alone say. All that is linear in the state (the routers themselves) is one matrix.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.expert_units import ExpertUnits
from specgate.predictors.features import (
    TOKEN_GAIN,
    History,
    at_targets_BTPHE,
    decayed,
    executed_weights,
    multi_hot_BTLE,
    points,
    prior_logit,
    shifted,
)
from specgate.predictors.layers import PointLinear, lookup
from specgate.predictors.mlp import ENTRY_GAIN
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch, last_valid_B

NGRAMS = (2, 3)
HASH, PRIME = 1_000_003, 2_147_483_647
SHIFT_DECAY = 0.8
"""Of the mean over earlier tokens that ``shift`` adds."""


class ExpertLowRank(RouterPrior):
    """The ``expert_lowrank`` predictor.

    Args:
        units: R, per expert, or one number per rank of the K chosen experts: the lighter ones run only the
        first
            of their units. foresee: further units, of the experts of the next layer that the forecast itself
            puts first (one number per rank; as many ranks as wished), which write to the horizons after
            that. heads, head_width: of the attention (0 heads: none). value_width: of its values. span: how
            many tokens back it looks (None: all).
        ngram_rows: of a table for pairs of ids and one for triples, hashed (0: none).
        shared: units that run for every token, whatever its experts. token_dim: S. state_dim: of the id-only
            state. decays: of the recency features (decode). dropout: on the units and on what ids say.
        reuse: start from what the previous point's correction said of the same target.
        shift: let the units and values also see, value by value, the token before and a decayed mean of all
            before (Peng et al., "RWKV", 2023, arXiv:2305.13048). depth: likewise the token's state one layer
            before.

    Shapes:
        router_PDF (parameter): ``[P, D, H * E]``, the target routers at the start.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "expert_lowrank"
    limit_K: Tensor

    def __init__(
        self,
        *,
        units: int | list[int] = 12,
        foresee: list[int] | None = None,
        heads: int = 1,
        head_width: int = 16,
        value_width: int = 32,
        span: int | None = None,
        shared: int = 0,
        token_dim: int = 32,
        ngram_rows: int = 0,
        state_dim: int = 32,
        decays: list[float] | None = None,
        dropout: float = 0.0,
        reuse: bool = True,
        shift: bool = True,
        depth: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        by_rank = [units] * self.top_k if isinstance(units, int) else [int(n) for n in units]
        if len(by_rank) != self.top_k or min(by_rank) < 0 or max(by_rank) < 1:
            raise ConfigError(
                f"units={units} is not one number, or {self.top_k} (one per chosen expert): give either"
            )
        self.by_rank, units = by_rank, max(by_rank)
        self.register_buffer("limit_K", torch.tensor(by_rank), persistent=False)
        L, E, H = self.layers, self.experts, self.lookahead
        P, out = L + 1, H * E
        self.units, self.heads, self.head_width, self.value_width = units, heads, head_width, value_width
        self.decays = [0.7, 0.95] if decays is None else [float(a) for a in decays]
        self.offsets = [1, 0] if self.phase == "decode" else [1, 0, -1]
        self.token_VF = nn.Embedding(self.vocab_size, token_dim * len(self.offsets))
        nn.init.normal_(self.token_VF.weight, std=0.3 / TOKEN_GAIN)
        if span is not None and span < 1:
            raise ConfigError(f"span={span} leaves the heads no token to look at: choose at least 1, or null")
        self.span = span
        if ngram_rows < 0:
            raise ConfigError(f"ngram_rows={ngram_rows} is no size of a table: choose 0 for none, or more")
        tables = [nn.Embedding(ngram_rows, token_dim) for _ in NGRAMS if ngram_rows]
        for table in tables:
            nn.init.zeros_(table.weight)
        self.ngrams = nn.ModuleList(tables)
        if self.hidden_size is None:
            self.expert_LEF = nn.Parameter(torch.randn(L, E, state_dim) * 0.5)
            self.start_VF = nn.Embedding(self.vocab_size, state_dim)
        D = self.hidden_size or state_dim
        self.into = PointLinear(P, D, E * units + shared)
        self.shared = shared
        self.out = PointLinear(P, E * units + shared, out, zero=True)
        self.weight_out = PointLinear(P, E + token_dim, out, zero=True)
        self.linear_PDF = nn.Parameter(torch.zeros(P, D, out))
        ahead = [int(n) for n in foresee or []] if H > 1 else []
        self.ahead = ExpertUnits(P, D, E, ahead, out - E, self.top_k == 1) if ahead else None
        if heads:
            self.query_key = PointLinear(P, D, (heads + 1) * head_width)  # the heads share their keys
            self.value = PointLinear(P, D, heads * value_width)
            self.mixed_out = PointLinear(P, heads * value_width, out, zero=True)
            self.slope_PA = nn.Parameter(torch.linspace(-4.0, 0.0, heads).repeat(P, 1))
        if self.phase == "decode":
            self.recent_CPHE = nn.Parameter(torch.zeros(1 + len(self.decays), P, H, E))
        self.entry_VF = nn.Embedding(self.vocab_size, out)
        nn.init.zeros_(self.entry_VF.weight)
        self.drop = nn.Dropout(dropout)
        self.shift_2PD = nn.Parameter(torch.zeros(2, P, D)) if shift else None
        self.depth_PD = nn.Parameter(torch.zeros(P, D)) if depth else None
        self.reuse_PHE = nn.Parameter(torch.zeros(P, H, E)) if reuse else None
        bias = prior_logit(self)
        start_PHE = torch.where((self.kinds == WITHIN) & (self.host is not None), 0.0, bias)
        self.bias_PHE = nn.Parameter(start_PHE[..., None].repeat(1, 1, E))

    def state_PND(self, batch: RoutingBatch, used_BTLE: Tensor, weighted_BTLE: Tensor) -> Tensor:
        """What is looked at: the hidden state over its root mean square, or a sum of embeddings."""
        if self.hidden_size is not None:
            assert batch.hidden_BTLD is not None
            hidden = batch.hidden_BTLD.float() * batch.valid_BT[:, :, None, None]
            state = points(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))
        else:
            step = torch.einsum("btle,lef->btlf", 0.5 * used_BTLE + weighted_BTLE, self.expert_LEF)
            start = self.start_VF(batch.token_ids_BT)[:, :, None]
            count_P1 = torch.arange(1, self.layers + 2, device=step.device)[:, None]
            state = torch.cat([start, step], dim=2).cumsum(2) * count_P1.rsqrt()
        return state.flatten(0, 1).transpose(0, 1)

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
        token_BTF = self.token_VF(batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
        parts = token_BTF.chunk(len(self.offsets), dim=-1)
        around_BTF = torch.stack([shifted(x, by) for x, by in zip(parts, self.offsets, strict=True)]).sum(0)
        around_BTF = self.drop(around_BTF + self.ngram_BTF(batch))
        around_PNF = around_BTF.flatten(0, 1).expand(P, -1, -1)
        y_PNF = y_PNF + self.weight_out(torch.cat([gate_PNE * E**0.5, around_PNF], dim=-1))
        if self.heads:
            y_PNF = y_PNF + self.mixed_out(self.look_back(x_PND, mixed_PND, batch.valid_BT))
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

    def flops_per_token_layer(self, context: int) -> float | None:
        """Floating-point operations (a multiply-add is two) of the units that run, the keys and values of
        earlier tokens and the previous point's correction being kept; only where there is something to
        foresee. Additions per value are left out."""
        E, A, C, V = self.experts, self.heads, self.head_width, self.value_width
        D, token_dim = self.linear_PDF.shape[1], self.weight_out.weight.shape[1] - E
        both_ways = self.bidirectional or self.phase == "decode"
        seen: float = context if both_ways else context / 2
        if self.span is not None and self.span < context:
            sides = 2 if self.bidirectional else 1  # the first tokens see fewer than span
            seen = self.span * sides if both_ways else self.span - self.span**2 / (2 * context)
            seen = min(seen, context)
        running = sum(self.by_rank) + self.shared
        total = 0.0
        for p, targets_H in enumerate((self.kinds != INVALID).tolist()):
            out = sum(targets_H) * E
            if not out:
                continue
            total += token_dim * out + self.top_k * out
            if self.ahead is not None and out > E:
                total += sum(self.ahead.by_rank) * ((D if p else 0) + out - E)
            if p == 0 and self.hidden_size is not None:
                continue  # no state yet: what it adds is a constant
            total += D * out + running * (D + out)
            if A:
                total += D * ((A + 1) * C + A * V) + seen * A * (C + V) + A * V * out
        return 2.0 * total / self.layers

    def ngram_BTF(self, batch: RoutingBatch) -> Tensor | float:
        """What the token's id together with the one, and the two, before it say: ``[B, T, S]``."""
        total: Tensor | float = 0.0
        for n, table in zip(NGRAMS, self.ngrams, strict=False):
            assert isinstance(table, nn.Embedding)
            key_BT = torch.zeros_like(batch.token_ids_BT)
            for by in range(n):  # an id of 0 before the first token
                key_BT = (key_BT * HASH + shifted(batch.token_ids_BT + 1, by)) % PRIME
            found_BTF = lookup(table, key_BT % table.num_embeddings)
            total = total + found_BTF * (TOKEN_GAIN * batch.valid_BT[..., None])
        return total

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

    def look_back(self, x_PND: Tensor, mixed_PND: Tensor, valid_BT: Tensor) -> Tensor:
        """Attention over the tokens known at the point (earlier ones, or all of a bidirectional stack):
        ``[P, N, A * C]``."""
        (B, T), P, A, C = valid_BT.shape, self.layers + 1, self.heads, self.head_width
        q_PNF, k_PNC = self.query_key(x_PND).split([A * C, C], dim=-1)
        q = q_PNF.view(P, B, T, A, C).transpose(2, 3)
        k = k_PNC.view(P, B, 1, T, C).expand(-1, -1, A, -1, -1)
        v = self.value(mixed_PND).view(P, B, T, A, self.value_width).transpose(2, 3)
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

    # ------------------------------------------------------------------ one point of one token

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """The last token at its point, and at the points before it whose corrections are carried on."""
        last_B = last_valid_B(batch.valid_BT)
        history, point = History(batch, last_B), layer + 1
        ids_PND = None
        if self.hidden_size is None:
            hot = [multi_hot_BTLE(batch, self.experts, weighted=weighted) for weighted in (False, True)]
            ids_PND = self.state_PND(batch, *hot)
        around_BF = self._around_step(history)
        first = point if self.reuse_PHE is None else max(0, point - self.lookahead + 1)
        y_BHE: Tensor | None = None
        for p in range(first, point + 1):
            x_BTD = self._point_BTD(batch, ids_PND, p)
            above_BTD = None if self.depth_PD is None or p == 0 else self._point_BTD(batch, ids_PND, p - 1)
            mine_BHE = self._correction_step(history, x_BTD, above_BTD, around_BF, p)
            if y_BHE is not None and self.reuse_PHE is not None:
                carried_BHE = torch.cat([y_BHE[:, 1:], torch.zeros_like(y_BHE[:, :1])], dim=1)
                mine_BHE = mine_BHE + carried_BHE * self.reuse_PHE[p]
            y_BHE = mine_BHE
        assert y_BHE is not None
        return self.corrected_step(batch, layer, y_BHE)

    def _point_BTD(self, batch: RoutingBatch, ids_PND: Tensor | None, point: int) -> Tensor:
        """:meth:`state_PND` at one point; ``ids_PND``: all of it, where it is made of ids."""
        if ids_PND is not None:
            return ids_PND[point].view(*batch.valid_BT.shape, -1)
        assert batch.hidden_BTLD is not None
        hidden_BTD = batch.hidden_BTLD[:, :, max(point - 1, 0)].float() * batch.valid_BT[..., None]
        unit_BTD = hidden_BTD * torch.rsqrt(hidden_BTD.pow(2).mean(-1, keepdim=True) + 1e-6)
        return unit_BTD if point else torch.zeros_like(unit_BTD)

    def _around_step(self, history: History) -> Tensor:
        """What the ids of the tokens around the last one say: ``[B, S]``."""
        batch = history.batch
        token_BTF = lookup(self.token_VF, batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
        parts = token_BTF.chunk(len(self.offsets), dim=-1)
        around = [history.token(x, by) for x, by in zip(parts, self.offsets, strict=True)]
        ngrams = self.ngram_BTF(batch)
        around += [history.token(ngrams, 0)] if isinstance(ngrams, Tensor) else []
        return torch.stack(around).sum(0)

    def _correction_step(
        self,
        history: History,
        x_BTD: Tensor,
        above_BTD: Tensor | None,
        around_BF: Tensor,
        point: int,
    ) -> Tensor:
        """One point's own correction of the last token: ``[B, H, E]``."""
        batch, E, H = history.batch, self.experts, self.lookahead
        mixed_BTD = x_BTD
        if self.shift_2PD is not None:
            before = shifted(x_BTD) * self.shift_2PD[0, point]
            mixed_BTD = x_BTD + before + shifted(decayed(x_BTD, SHIFT_DECAY)) * self.shift_2PD[1, point]
        if self.depth_PD is not None and above_BTD is not None:
            mixed_BTD = mixed_BTD + above_BTD * self.depth_PD[point]
        x_BD, mixed_BD = history.token(x_BTD, 0), history.token(mixed_BTD, 0)
        units = F.gelu(self.into.at(mixed_BD, point))
        gate_BE, gate_BER = self._gates_step(history, point)
        own = units[:, : E * self.units].unflatten(-1, (E, self.units)) * gate_BER
        y_BF = self.out.at(torch.cat([own.flatten(1), units[:, E * self.units :]], dim=-1), point)
        y_BF = y_BF + x_BD @ self.linear_PDF[point]
        y_BF = y_BF + self.weight_out.at(torch.cat([gate_BE * E**0.5, around_BF], dim=-1), point)
        if self.heads:
            y_BF = y_BF + self.mixed_out.at(self._look_back_step(history, x_BTD, mixed_BTD, point), point)
        y_BHE = y_BF.unflatten(-1, (H, E)) + self.bias_PHE[point]
        if self.phase == "decode":
            y_BHE = y_BHE + self._past_step(history, point)
        if point == 0:
            ids_B = history.token(batch.token_ids_BT[..., None], 0)[:, 0]
            y_BHE = y_BHE + (lookup(self.entry_VF, ids_B) * ENTRY_GAIN).view_as(y_BHE)
        if self.ahead is not None:
            next_BE = self.corrected_step(batch, point - 1, y_BHE)[:, 0]
            later_BF = self.ahead.at(mixed_BD, next_BE, point)
            y_BHE = torch.cat([y_BHE[:, :1], y_BHE[:, 1:] + later_BF.unflatten(-1, (H - 1, E))], dim=1)
        return y_BHE

    def _gates_step(self, history: History, point: int) -> tuple[Tensor, Tensor]:
        """Router weights of the point's layer ``[B, E]``, and of its units ``[B, E, R]`` (or 1)."""
        batch, rows_B, last_B = history.batch, history.rows_B, history.last_B
        gate_BE = torch.zeros(len(rows_B), self.experts, device=last_B.device)
        limit_BE = torch.zeros_like(gate_BE, dtype=torch.int64)
        if point:
            experts_BK = batch.experts_BTLK[rows_B, last_B, point - 1]
            gate_BE = gate_BE.scatter(1, experts_BK, executed_weights(batch)[rows_B, last_B, point - 1])
            limit_BE = limit_BE.scatter(1, experts_BK, self.limit_K.expand_as(experts_BK))
        gate_BE1 = gate_BE[..., None] * (self.top_k**0.5 if self.top_k > 1 else 1.0)
        if min(self.by_rank) == self.units:
            return gate_BE, gate_BE1
        runs_BER = torch.arange(self.units, device=last_B.device) < limit_BE[..., None]
        return gate_BE, torch.where(runs_BER, gate_BE1, 0.0)

    def _look_back_step(self, history: History, x_BTD: Tensor, mixed_BTD: Tensor, point: int) -> Tensor:
        """:meth:`look_back` of the last token at one point: ``[B, A * C]``."""
        B, A, C = len(history.rows_B), self.heads, self.head_width
        q_BAC = self.query_key.at(history.token(x_BTD, 0), point, 0, A * C).view(B, A, C)
        k_BTC = self.query_key.at(x_BTD.flatten(0, 1), point, A * C).unflatten(0, (B, -1))
        v_BTAC = self.value.at(mixed_BTD.flatten(0, 1), point).unflatten(0, (B, -1)).unflatten(-1, (A, -1))
        age_B1T = history.age_BT[:, None]
        score_BAT = q_BAC @ k_BTC.mT * C**-0.5
        score_BAT = score_BAT - F.softplus(self.slope_PA[point])[:, None] * age_B1T.abs()
        known_B1T = history.batch.valid_BT[:, None] if self.bidirectional else age_B1T >= 0
        if self.span is not None:
            score_BAT = score_BAT.masked_fill(age_B1T.abs() >= self.span, -torch.inf)
        score_BAT = score_BAT.masked_fill(~known_B1T, -1e4 if self.bidirectional else -torch.inf)
        return torch.einsum("bat,btac->bac", score_BAT.softmax(-1), v_BTAC).flatten(1)

    def _past_step(self, history: History, point: int) -> Tensor:
        """What recency says at one point: ``[B, H, E]``."""
        used_BTLE = multi_hot_BTLE(history.batch, self.experts, weighted=False)
        past, found = [used_BTLE, *[decayed(used_BTLE, a) for a in self.decays]], []
        for weight_PHE, seen in zip(self.recent_CPHE, past, strict=True):
            two = torch.stack([history.token(seen.flatten(2), by) for by in (1, 0)], dim=1)
            at_BPHE = at_targets_BTPHE(two.unflatten(-1, seen.shape[2:]), self.lookahead)[:, 1]
            found.append(at_BPHE[:, point] * weight_PHE[point])
        return torch.stack(found).sum(0)
