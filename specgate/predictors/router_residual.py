"""The target layer's router on today's hidden state, plus a trained correction: the default predictor.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, D hidden size.

Starts exactly at ``router_lookahead`` (the correction's last map is zero) and learns what the layers in
between add. Router-initialised predictors with a low-rank correction are the strongest published ones; here
the correction is the wide per-point MLP of ``mlp``, and every (point, horizon) also learns how far to trust
the router. While training it also imitates the target router's own scores (Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015, arXiv:1503.02531): the trace holds the hidden state that the target
layer saw and its router, so the scores of all E experts are known, not just who won. Without hidden states
(``hidden_size=None``) there is no router to start from and it is ``mlp`` under another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.features import column_PH, points
from specgate.predictors.host_routers import HostRouters
from specgate.predictors.mlp import MLP
from specgate.traces.batch import WITHIN, RoutingBatch, targets


class RouterResidual(MLP):
    """The ``router_residual`` predictor.

    Args:
        routers: ``RoutingDataModule.routers``; stored in the checkpoint, so loading one needs none.
        norm_eps: of the host's norms.
        distill: weight of the imitation loss (0: none); training only.
        and those of :class:`MLP`.

    Shapes:
        trust_PH (parameter): factor on the router's scores, 1 at the start.
        scale_PH (parameter): of the logits in the imitation loss, whose scale is the host's softmax's.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "router_residual"
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
            with torch.no_grad():  # where the router speaks, the correction starts at zero
                bias_PHE = self.head.last.bias_P1.view(self.layers + 1, self.lookahead, self.experts)
                bias_PHE[self.kinds == WITHIN] = 0.0

    def on_fit_start(self) -> None:
        """Refuse to run without routers."""
        if self.host is not None and not bool(self.host.known):
            raise ConfigError(
                f"{self.name} needs the host's routers and the trace has none: choose model=mlp"
            )

    def forward(self, batch: RoutingBatch) -> Tensor:
        correction_BTPHE = super().forward(batch)
        if self.host is None or batch.hidden_BTLD is None:
            return correction_BTPHE
        column_LH = column_PH(self.layers, self.lookahead, correction_BTPHE.device)[1:]
        base_BTPHE = points(self.host.scores(batch.hidden_BTLD.float(), column_LH.clamp(max=self.layers - 1)))
        trust_PH1 = torch.where(self.kinds == WITHIN, self.trust_PH, 0.0)[..., None]
        return base_BTPHE * trust_PH1 + correction_BTPHE

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """The summed loss, plus ``distill`` times the cross entropy to the target routers' own softmax."""
        experts_BTPHK, valid_BTPH = targets(batch, self.lookahead)
        logits_BTPHE = self(batch)
        total = self.loss(logits_BTPHE, experts_BTPHK, valid_BTPH)
        if self.host is None or self.distill == 0:
            return total
        teacher_NE = self.teacher_scores(batch)[valid_BTPH].float().softmax(-1)
        student_NE = (logits_BTPHE * self.scale_PH[..., None])[valid_BTPH].float().log_softmax(-1)
        return total - self.distill * (teacher_NE * student_NE).sum()

    @torch.no_grad()
    def teacher_scores(self, batch: RoutingBatch) -> Tensor:
        """What each target layer's router said when it chose: ``[B, T, P, H, E]`` (targets: never an
        input)."""
        assert self.host is not None
        assert batch.hidden_BTLD is not None
        own_L1 = torch.arange(self.layers, device=batch.hidden_BTLD.device)[:, None]
        now_BTLE = self.host.scores(batch.hidden_BTLD.float(), own_L1)[:, :, :, 0]
        next_BTLE = torch.cat([now_BTLE[:, 1:], torch.zeros_like(now_BTLE[:, :1])], dim=1)
        both = torch.cat([now_BTLE, next_BTLE], dim=2)
        return both[:, :, column_PH(self.layers, self.lookahead, both.device)]
