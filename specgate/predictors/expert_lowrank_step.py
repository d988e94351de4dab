"""``expert_lowrank`` at run time: one point of the last token alone, at the cost that is stated for it.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, D size of the state looked at, R units per expert, A heads, C width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.predictors.expert_lowrank_parts import ExpertLowRankParts
from specgate.predictors.features import (
    TOKEN_GAIN,
    History,
    at_targets_BTPHE,
    decayed,
    executed_weights,
    multi_hot_BTLE,
    shifted,
)
from specgate.predictors.layers import lookup
from specgate.predictors.mlp import ENTRY_GAIN
from specgate.traces.batch import RoutingBatch, last_valid_B

SHIFT_DECAY = 0.8
"""Of the mean over earlier tokens that ``shift`` adds."""


class ExpertLowRankStep(ExpertLowRankParts):
    """The loader's path; it says what ``forward`` says of the same token.

    Shapes:
        step_logits: ``RoutingBatch``, layer -> ``[B, H, E]``.
    """

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
        if self.linear_own is not None:
            ran_B1 = (gate_BE > 0).any(-1, keepdim=True)
            y_BF = y_BF + self.linear_own.at(x_BD * ran_B1, gate_BE.argmax(-1), point)
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

    def _gates_BTE(self, batch: RoutingBatch, point: int) -> Tensor:
        """Router weights of the point's layer, of all tokens."""
        gate_BTE = torch.zeros(*batch.valid_BT.shape, self.experts, device=batch.valid_BT.device)
        if point == 0:
            return gate_BTE
        weights_BTK = executed_weights(batch)[:, :, point - 1]
        return gate_BTE.scatter(-1, batch.experts_BTLK[:, :, point - 1], weights_BTK)

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
        age_BT, valid_BT = history.age_BT, history.batch.valid_BT
        gate_BTE = None if self.value_own is None else self._gates_BTE(history.batch, point)
        if self.span is not None and self.span < age_BT.shape[1]:  # the others are out of sight
            age_S = torch.arange(self.span, device=age_BT.device)
            index_BS = history.last_B[:, None] - age_S
            seen = history.rows_B[:, None], index_BS.clamp(min=0)
            x_BTD, mixed_BTD, valid_BT = x_BTD[seen], mixed_BTD[seen], valid_BT[seen] & (index_BS >= 0)
            gate_BTE = None if gate_BTE is None else gate_BTE[seen]
            age_BT = torch.where(index_BS >= 0, age_S, -1)
        mixed_NF = mixed_BTD.flatten(0, 1)
        k_BTC = self.query_key.at(x_BTD.flatten(0, 1), point, A * C).unflatten(0, (B, -1))
        v_NF = self.value.at(mixed_NF, point)
        if self.value_own is not None and gate_BTE is not None:
            gate_NE = gate_BTE.flatten(0, 1)
            ran_N1 = (gate_NE > 0).any(-1, keepdim=True)
            v_NF = v_NF + self.value_own.at(mixed_NF * ran_N1, gate_NE.argmax(-1), point)
        v_BTAC = v_NF.unflatten(0, (B, -1)).unflatten(-1, (A, -1))
        age_B1T = age_BT[:, None]
        score_BAT = q_BAC @ k_BTC.mT * C**-0.5
        score_BAT = score_BAT - F.softplus(self.slope_PA[point])[:, None] * age_B1T.abs()
        known_B1T = valid_BT[:, None] if self.bidirectional else age_B1T >= 0
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
