"""Units that belong to experts, of which those of the experts ranked first run.

Letters: N tokens, P source points, D size of the state, E experts per layer, K ranks that run,
R units per expert, F outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.layers import PointLinear


class ExpertUnits(nn.Module):
    """What a layer's experts will add, where which of them run is itself a forecast.

    Every (point, expert) has R units; the expert that the forecast ranks first runs the first ``by_rank[0]``
    of its units, the second ``by_rank[1]``, and so on, each times its probability (Shazeer et al., 2017,
    arXiv:1701.06538).

    Args:
        by_rank: units of the expert at each rank, none of them rising. softmax: the logits are of one choice
            (K = 1), otherwise of E decisions.

    Shapes:
        forward: states ``[P, N, D]``, logits of the experts ``[P, N, E]`` -> ``[P, N, F]``.

    Raises:
        ConfigError: if there are more ranks than experts, or a number is below 1 or above the one before.
    """

    limit_K: Tensor

    def __init__(
        self,
        points: int,
        size_in: int,
        experts: int,
        by_rank: list[int],
        size_out: int,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        if len(by_rank) > experts or min(by_rank) < 1 or by_rank != sorted(by_rank, reverse=True):
            raise ConfigError(
                f"foresee={by_rank} is no list of at most {experts} numbers of units, falling"
                " (or staying): give e.g. [8,4]"
            )
        self.by_rank, self.units, self.softmax = by_rank, by_rank[0], softmax
        self.register_buffer("limit_K", torch.tensor(by_rank), persistent=False)
        self.into = PointLinear(points, size_in, experts * self.units)
        self.out = PointLinear(points, experts * self.units, size_out, zero=True)

    def forward(self, x_PND: Tensor, logits_PNE: Tensor) -> Tensor:
        return self.out(F.gelu(self.into(x_PND)) * self.gates(logits_PNE).flatten(-2))

    def at(self, x_ND: Tensor, logits_NE: Tensor, point: int) -> Tensor:
        """One point's units alone: ``[N, D]``, ``[N, E]`` -> ``[N, F]``."""
        return self.out.at(F.gelu(self.into.at(x_ND, point)) * self.gates(logits_NE).flatten(-2), point)

    def gates(self, logits: Tensor) -> Tensor:
        """The probability of every unit's expert, 0 for units that do not run: ``[..., E]`` -> ``[..., E,
        R]``."""
        first = logits.topk(len(self.by_rank), dim=-1).indices
        limit = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
        limit = limit.scatter(-1, first, self.limit_K.expand_as(first))
        runs = torch.arange(self.units, device=logits.device) < limit[..., None]
        odds = logits.softmax(-1) if self.softmax else logits.sigmoid()
        return torch.where(runs, odds[..., None], 0.0)
