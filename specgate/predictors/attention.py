"""Attention over the history of hidden states, in a learned stand-in for the layers that lie in between.

Letters: B sequences, T tokens, N = B * T, L MoE layers, P = L + 1 source points, H horizons, E experts per
layer, K experts per token, D hidden size, F features.

What happens between a hidden state and a router some layers on is: experts add something, and attention mixes
in earlier tokens. Both are stood in for by blocks of the same form, one per host layer, trained on traces
alone (:mod:`specgate.predictors.rollout`); the target layer's own router reads the result. Besides, an MLP on
the usual features (this and the previous layer's hidden state, attention over earlier tokens at the same
point) corrects the logits. While training, the stand-in also imitates the hidden states that the trace
recorded (Romero et al., "FitNets", 2015, arXiv:1412.6550). Before the first layer (p = 0) a learned embedding
of the token starts it.

Without hidden states it is ``mlp``, whose features attend over the history of ids and experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.predictors.features import column_PH, multi_hot_BTLE, points
from specgate.predictors.layer_experts import LayerExperts
from specgate.predictors.mlp import MLP
from specgate.predictors.rollout import LayerAttention, unit
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import ENTRY, WITHIN, RoutingBatch, targets

if TYPE_CHECKING:
    from specgate.traces.datamodule import RoutingDataModule

EMBED_GAIN = 4.0
"""Factor on the start embedding (see ``TOKEN_GAIN`` in features.py)."""
FORMS: dict[str, dict[str, Any]] = {
    "switch_transformers": {"activation": "swiglu", "rotary": 0.5, "qk_norm": False},
    "olmoe": {"activation": "swiglu", "rotary": 1.0, "qk_norm": True},
    "qwen3_moe": {"activation": "swiglu", "rotary": 1.0, "qk_norm": True},
}
"""What blocks of a host's family look like; any other family is taken for SwiGLU with rotary positions. For
Switch it is not its own form (ReLU, no rotary positions) but what trained better (docs/LOG.md)."""
USUAL: dict[str, Any] = {"activation": "swiglu", "rotary": 1.0, "qk_norm": False}


class Attention(RouterPrior, MLP):
    """The ``attention`` predictor.

    Args:
        units: per expert, of the experts' stand-in. attention_heads, head_width, span: of the attention's.
        activation, rotary, qk_norm: form of both (see :mod:`specgate.predictors.rollout`); None is what the
            host's family does. block_dropout: on the experts' units.
        regress: weight of imitating the recorded hidden states (0: none); training only.
        width: of the MLP on top (its other arguments: see :class:`MLP`).

    Shapes:
        start_VD (parameter): the residual stream before the first layer, by token id, over ``size``.
        size (buffer): root mean square of the hidden states, measured on the first training batch.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "attention"
    size: Tensor

    def __init__(
        self,
        *,
        units: int = 48,
        attention_heads: int = 4,
        head_width: int = 32,
        span: int = 128,
        activation: str | None = None,
        rotary: float | None = None,
        qk_norm: bool | None = None,
        block_dropout: float = 0.0,
        regress: float = 16.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.regress = regress
        if self.hidden_size is not None:
            L, E, D = self.layers, self.experts, self.hidden_size
            self.start_VD = nn.Embedding(self.vocab_size, D)
            nn.init.normal_(self.start_VD.weight, std=1.0 / EMBED_GAIN)
            self.moe = LayerExperts(
                L, E, self.top_k, D, units, activation or USUAL["activation"], block_dropout
            )
            self.mix = LayerAttention(
                L,
                D,
                attention_heads,
                head_width,
                span=span,
                rotary=float(USUAL["rotary"] if rotary is None else rotary),
                qk_norm=bool(USUAL["qk_norm"] if qk_norm is None else qk_norm),
                bidirectional=self.bidirectional,
            )
            self.register_buffer("size", torch.tensor(0.0))
            with torch.no_grad():  # where the router speaks, the correction starts at zero
                bias_PHE = self.head.last.bias_P1.view(L + 1, self.lookahead, E)
                bias_PHE[self.kinds == WITHIN] = 0.0

    @classmethod
    def resolve(cls, values: dict[str, Any], data: RoutingDataModule) -> dict[str, Any]:
        """Give the blocks the form of the trace's host where the configuration leaves it open."""
        form = FORMS.get(data.readers[0].header.family, USUAL)
        return values | {name: value for name, value in form.items() if values.get(name) is None}

    def forward(self, batch: RoutingBatch) -> Tensor:
        return self._logits(batch, self.rollout(batch))

    def _logits(self, batch: RoutingBatch, ahead: tuple[Tensor, Tensor] | None) -> Tensor:
        correction_BTPHE = MLP.forward(self, batch)
        if ahead is None:
            return correction_BTPHE
        return ahead[1] * (self.trust_PH * self._same_token())[..., None] + correction_BTPHE

    def _same_token(self) -> Tensor:
        """Where the stand-in speaks, ``[P, H]`` bool: at targets of the same token."""
        return (self.kinds == WITHIN) | (self.kinds == ENTRY)

    def rollout(self, batch: RoutingBatch) -> tuple[Tensor, Tensor] | None:
        """The residual stream as it is thought to enter each target's router, over the source's root mean
        square (at p = 0: over ``size``), ``[B, T, P, H, D]``, and what those routers say to it,
        ``[B, T, P, H, E]``, both 0 at targets beyond the stack; None without hidden states."""
        if self.hidden_size is None or batch.hidden_BTLD is None or self.host is None:
            return None
        (B, T), L = batch.valid_BT.shape, self.layers
        rms_BTP1 = self._rms(batch)
        start_BT1D = self.start_VD(batch.token_ids_BT)[:, :, None] * EMBED_GAIN
        x_BTPD = torch.cat([start_BT1D, batch.hidden_BTLD.float() / rms_BTP1[:, :, 1:]], dim=2)
        x_PND, shrink_PN1 = (
            y.flatten(0, 1).transpose(0, 1) for y in (x_BTPD, self.size.clamp(min=1e-6) / rms_BTP1)
        )
        gates_PNE = points(multi_hot_BTLE(batch, self.experts, weighted=True)).flatten(0, 1).transpose(0, 1)
        past_PND, streams, scores = x_PND, [], []
        for j in range(self.lookahead):
            there = max(L - j, 0)  # source points whose target lies within the stack
            x_PND, gates_PNE, shrink_PN1 = x_PND[:there], gates_PNE[:there], shrink_PN1[:there]
            point_P = torch.arange(there, device=x_PND.device)
            x_PND = x_PND + self.moe(unit(x_PND), gates_PNE, (point_P - 1 + j).clamp(min=0)) * shrink_PN1
            entered_PND = unit(x_PND)
            past_PND = past_PND if j else entered_PND
            target_P = point_P + j
            if self.phase == "prefill":
                mixed_PND = self.mix(entered_PND, target_P, batch.positions_BT, batch.valid_BT)
            else:
                mixed_PND = self.mix.onto_past(entered_PND, past_PND, target_P, batch.positions_BT)
            x_PND = x_PND + mixed_PND * shrink_PN1
            by_token = self.host.scores(x_PND.transpose(0, 1)[None, :, :, None], target_P[:, None])
            streams.append(F.pad(x_PND, (0, 0, 0, 0, 0, L + 1 - there)))
            scores.append(F.pad(by_token[0, :, :, 0].transpose(0, 1), (0, 0, 0, 0, 0, L + 1 - there)))
            gates_PNE = self._gates(scores[-1][:there])
        shape = (L + 1, B, T, self.lookahead, -1)
        ahead, said = (torch.stack(y, dim=2).view(shape).permute(1, 2, 0, 3, 4) for y in (streams, scores))
        return ahead, said

    def _gates(self, scores_PNE: Tensor) -> Tensor:
        """The router's softmax, the K largest kept (above 0 in centred scores): ``[P, N, E]``."""
        p_PNE = scores_PNE.softmax(-1)
        if self.top_k == 1:
            return torch.where(p_PNE == p_PNE.amax(-1, keepdim=True), p_PNE, 0.0)
        return torch.where(scores_PNE > 0, p_PNE, 0.0) if self.top_k < self.experts else p_PNE

    def _rms(self, batch: RoutingBatch) -> Tensor:
        """Root mean square of the hidden state at each point, ``size`` at p = 0: ``[B, T, P, 1]``."""
        assert batch.hidden_BTLD is not None
        rms_BTL1 = (batch.hidden_BTLD.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        if self.training:  # on the device, with no wait: the first training batch sets it, later ones do not
            valid_BT11 = batch.valid_BT[:, :, None, None]
            mean = (rms_BTL1.detach() * valid_BT11).sum() / valid_BT11.sum().clamp(min=1) / self.layers
            self.size.copy_(torch.where(self.size == 0, mean, self.size))
        size_BT11 = self.size.clamp(min=1e-6).expand(*rms_BTL1.shape[:2], 1, 1)
        return torch.cat([size_BT11, rms_BTL1], dim=2)

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """The summed loss, the imitation of the routers, and ``regress`` times the mean squared error of the
        residual stream (over its source's root mean square) in every cell of the same token."""
        ahead = self.rollout(batch)
        logits_BTPHE = self._logits(batch, ahead)
        total = self.loss(logits_BTPHE, *targets(batch, self.lookahead))
        total = total + self.imitation_loss(batch, logits_BTPHE)
        if ahead is None or not self.regress or batch.hidden_BTLD is None:
            return total
        target_PH = column_PH(self.layers, self.lookahead, ahead[0].device).clamp(max=self.layers - 1)
        wanted_BTPHD = batch.hidden_BTLD.float()[:, :, target_PH] / self._rms(batch)[..., None, :]
        error_BTPH = F.mse_loss(ahead[0].float(), wanted_BTPHD, reduction="none").mean(-1)
        scored_BTPH = self._same_token() & batch.mask_BT[:, :, None, None]
        return total + self.regress * torch.where(scored_BTPH, error_BTPH, 0.0).sum()
