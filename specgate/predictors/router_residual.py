"""The target layer's router on today's hidden state, plus a trained correction: the default predictor.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, D hidden size.

Starts exactly at ``router_lookahead`` (the correction's last map is zero) and learns what the layers in
between add. Router-initialised predictors with a low-rank correction are the strongest published ones; here
the correction is the wide per-point MLP of ``mlp``, and every (point, horizon) also learns how far to trust
the router. Without hidden states (``hidden_size=None``) there is no router to start from and it is ``mlp``
under another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.features import points
from specgate.predictors.host_routers import HostRouters
from specgate.predictors.mlp import MLP
from specgate.traces.batch import WITHIN, RoutingBatch


class RouterResidual(MLP):
    """The ``router_residual`` predictor.

    Args:
        routers: ``RoutingDataModule.routers``; stored in the checkpoint, so loading one needs none.
        norm_eps: of the host's norms.
        and those of :class:`MLP`.

    Shapes:
        trust_PH (parameter): factor on the router's scores, 1 at the start.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "router_residual"
    uses_routers: ClassVar[bool] = True

    def __init__(
        self,
        *,
        routers: Mapping[int, Mapping[str, Tensor]] | None = None,
        norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.host: HostRouters | None = None
        if self.hidden_size is not None:
            self.host = HostRouters(
                self.layers, self.experts, self.top_k, self.hidden_size, norm_eps, routers
            )
            self.trust_PH = nn.Parameter(torch.ones(self.layers + 1, self.lookahead))
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
        columns_LH = torch.arange(self.layers)[:, None] + 1 + torch.arange(self.lookahead)
        columns_LH = columns_LH.clamp(max=self.layers - 1).to(correction_BTPHE.device)
        base_BTPHE = points(self.host.scores(batch.hidden_BTLD.float(), columns_LH))
        trust_PH1 = torch.where(self.kinds == WITHIN, self.trust_PH, 0.0)[..., None]
        return base_BTPHE * trust_PH1 + correction_BTPHE
