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
from specgate.traces.batch import WITHIN, RoutingBatch, last_valid_B


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

    def say_nothing_of_the_rest(self) -> None:
        """Where the routers cannot be asked, every expert gets the least probability, not popularity: for a
        host of which there is no trace."""
        self.row_V.zero_()
        self.counts_RCE.zero_()
        self.seen_RC.fill_(1e9)

    def forward(self, batch: RoutingBatch) -> Tensor:
        self.check_batch(batch)
        scores_BTPHE = points(self.router_scores(batch))
        within_PH1 = (self.kinds == WITHIN)[..., None]
        return torch.where(within_PH1, scores_BTPHE, super().forward(batch))

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """The next layers' routers on one hidden state; the table only where there is none to use."""
        assert batch.hidden_BTLD is not None
        within = min(self.lookahead, self.layers - 1 - layer) if layer >= 0 else 0
        parts = []
        if within:
            last_B = last_valid_B(batch.valid_BT)
            hidden_BCD = self.hidden_step(batch, layer, last_B, within)
            parts.append(self.host.scores_at(hidden_BCD, layer + 1))
        if within < self.lookahead:
            parts.append(self.table_step(batch, range(layer + 1 + within, layer + 1 + self.lookahead)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def hidden_step(self, batch: RoutingBatch, layer: int, last_B: Tensor, count: int) -> Tensor:
        """What the next ``count`` routers are asked about: ``[B, count, D]``."""
        assert batch.hidden_BTLD is not None
        hidden_BD = batch.hidden_BTLD[torch.arange(last_B.shape[0], device=last_B.device), last_B, layer]
        return hidden_BD.float()[:, None].expand(-1, count, -1)

    def router_scores(self, batch: RoutingBatch) -> Tensor:
        """Scores from each layer's hidden state: ``[B, T, L, H, E]`` (meaningless outside the token)."""
        assert batch.hidden_BTLD is not None
        return self.host.scores(batch.hidden_BTLD.float(), self.columns[1:].clamp(max=self.layers - 1))
