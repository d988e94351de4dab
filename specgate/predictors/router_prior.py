"""What the learned predictors share that know the host's routers: where they start, and whom they imitate.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer.

The prior is the target layer's own router on today's hidden state (``router_lookahead``); a subclass learns
what to add to it, and every (point, horizon) learns how far to trust it. While training, the target routers'
own scores are imitated too (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015,
arXiv:1503.02531): the trace holds the hidden state that the target layer saw and its router, so the scores of
all E experts are known, not just who won. Without hidden states (``hidden_size=None``) there is no prior and
nothing to imitate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.base import Predictor
from specgate.predictors.features import column_PH, points
from specgate.predictors.host_routers import HostRouters
from specgate.traces.batch import WITHIN, RoutingBatch, last_valid_B, targets


class RouterPrior(Predictor):
    """Base (or mixin, named before the other base) of predictors that correct the host's routers.

    A subclass computes a correction ``[B, T, P, H, E]`` that starts at zero where :attr:`kinds` is WITHIN,
    and returns :meth:`corrected` of it.

    Args:
        routers: ``RoutingDataModule.routers``; stored in the checkpoint, so loading one needs none.
        norm_eps: of the host's norms.
        distill: weight of the imitation loss (0: none); training only.

    Shapes:
        trust_PH (parameter): factor on the router's scores, 1 at the start.
        scale_PH (parameter): of the logits in the imitation loss, whose scale is the host's softmax's.
    """

    uses_routers: ClassVar[bool] = True

    def __init__(
        self,
        *,
        routers: Mapping[int, Mapping[str, Tensor]] | None = None,
        norm_eps: float = 1e-6,
        distill: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.host: HostRouters | None = None
        self.distill = distill
        if self.hidden_size is not None:
            self.host = HostRouters(
                self.layers, self.experts, self.top_k, self.hidden_size, norm_eps, routers
            )
            self.trust_PH = nn.Parameter(torch.ones(self.layers + 1, self.lookahead))
            self.scale_PH = nn.Parameter(torch.ones(self.layers + 1, self.lookahead))

    def on_fit_start(self) -> None:
        """Refuse to run without routers."""
        if self.host is not None and not bool(self.host.known):
            raise ConfigError(
                f"{self.name} needs the host's routers and the trace has none: choose model=mlp, or collect"
                " the trace again"
            )

    def prior(self, batch: RoutingBatch) -> Tensor | None:
        """The routers' scores where they speak (WITHIN), zero elsewhere: ``[B, T, P, H, E]``; None without
        hidden states."""
        if self.host is None or batch.hidden_BTLD is None:
            return None
        column_LH = column_PH(self.layers, self.lookahead, batch.hidden_BTLD.device)[1:]
        base_BTPHE = points(self.host.scores(batch.hidden_BTLD.float(), column_LH.clamp(max=self.layers - 1)))
        return base_BTPHE * (self.kinds == WITHIN)[..., None]

    def corrected(self, batch: RoutingBatch, correction_BTPHE: Tensor) -> Tensor:
        """Trusted prior plus correction: ``[B, T, P, H, E]``."""
        base_BTPHE = self.prior(batch)
        if base_BTPHE is None:
            return correction_BTPHE
        return base_BTPHE * self.trust_PH[..., None] + correction_BTPHE

    def corrected_step(self, batch: RoutingBatch, layer: int, correction_BHE: Tensor) -> Tensor:
        """:meth:`corrected` of the last token at one point: ``[B, H, E]``."""
        count = min(self.lookahead, self.layers - 1 - layer) if layer >= 0 else 0
        if self.host is None or batch.hidden_BTLD is None or count <= 0:
            return correction_BHE
        last_B = last_valid_B(batch.valid_BT)
        hidden_BD = batch.hidden_BTLD[torch.arange(last_B.shape[0], device=last_B.device), last_B, layer]
        base_BCE = self.host.scores_at(hidden_BD.float()[:, None].expand(-1, count, -1), layer + 1)
        base_BCE = base_BCE * self.trust_PH[layer + 1, :count, None]
        return torch.cat([correction_BHE[:, :count] + base_BCE, correction_BHE[:, count:]], dim=1)

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """The summed loss, plus ``distill`` times the cross entropy to the target routers' own softmax."""
        logits_BTPHE = self(batch)
        total = self.loss(logits_BTPHE, *targets(batch, self.lookahead))
        return total + self.imitation_loss(batch, logits_BTPHE)

    def imitation_loss(self, batch: RoutingBatch, logits_BTPHE: Tensor) -> Tensor:
        """``distill`` times the summed cross entropy of the valid cells to the target routers' own softmax;
        zero without hidden states."""
        if self.host is None or self.distill == 0:
            return logits_BTPHE.new_zeros(())
        _, valid_BTPH = targets(batch, self.lookahead)
        teacher_BTPHE = self.teacher_scores(batch).float().softmax(-1)
        student_BTPHE = (logits_BTPHE * self.scale_PH[..., None]).float().log_softmax(-1)
        agreed_BTPH = (teacher_BTPHE * student_BTPHE).sum(-1)
        return -self.distill * torch.where(valid_BTPH, agreed_BTPH, 0.0).sum()

    @torch.no_grad()
    def teacher_scores(self, batch: RoutingBatch) -> Tensor:
        """What each target layer's router said when it chose, up to a constant: ``[B, T, P, H, E]``
        (targets: never an input)."""
        assert self.host is not None
        assert batch.hidden_BTLD is not None
        own_L1 = torch.arange(self.layers, device=batch.hidden_BTLD.device)[:, None]
        now_BTLE = self.host.scores(batch.hidden_BTLD.float(), own_L1, centre=False)[:, :, :, 0]
        next_BTLE = torch.cat([now_BTLE[:, 1:], torch.zeros_like(now_BTLE[:, :1])], dim=1)
        both = torch.cat([now_BTLE, next_BTLE], dim=2)
        return both[:, :, column_PH(self.layers, self.lookahead, both.device)]
