"""The target layer's own norm and router on the current hidden state: the strongest forecast that needs no
training.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, D hidden size.

Residual streams change slowly, so today's state is a fair stand-in for the one that the target layer will
see: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading" (2023,
arXiv:2312.17238, "speculative expert loading"). Where there is no hidden state to use (before the first MoE
layer; the next token's layers) it is the token table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.errors import ConfigError
from specgate.predictors.features import points
from specgate.predictors.host_routers import HostRouters
from specgate.predictors.token_table import TokenTable
from specgate.traces.batch import WITHIN, RoutingBatch


class RouterLookahead(TokenTable):
    """The ``router_lookahead`` predictor.

    Args:
        routers: ``RoutingDataModule.routers``; stored in the checkpoint, so loading one needs none.
        norm_eps: of the host's norms.

    Shapes:
        forward: ``RoutingBatch`` with ``hidden_BTLD`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "router_lookahead"
    needs_hidden: ClassVar[bool] = True
    uses_routers: ClassVar[bool] = True

    def __init__(
        self,
        *,
        routers: Mapping[int, Mapping[str, Tensor]] | None = None,
        norm_eps: float = 1e-6,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        assert self.hidden_size is not None
        self.host = HostRouters(self.layers, self.experts, self.top_k, self.hidden_size, norm_eps, routers)

    def on_fit_start(self) -> None:
        """Refuse to run without routers."""
        if not bool(self.host.known):
            raise ConfigError(
                f"{self.name} needs the host's routers and the trace has none: choose model=mlp"
            )

    def forward(self, batch: RoutingBatch) -> Tensor:
        self.check_batch(batch)
        scores_BTPHE = points(self.router_scores(batch))
        within_PH1 = (self.kinds == WITHIN)[..., None]
        return torch.where(within_PH1, scores_BTPHE, super().forward(batch))

    def router_scores(self, batch: RoutingBatch) -> Tensor:
        """Scores from each layer's hidden state: ``[B, T, L, H, E]`` (meaningless outside the token)."""
        assert batch.hidden_BTLD is not None
        return self.host.scores(batch.hidden_BTLD.float(), self.columns[1:].clamp(max=self.layers - 1))
