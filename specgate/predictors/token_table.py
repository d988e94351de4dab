"""P(expert used at the target layer | id of the current token), backing off to popularity.

Letters: B sequences, T tokens, N scored tokens, L MoE layers, P source points, H horizons, E experts per
layer, K experts per token, C target columns (j < L this token's layer j, then the next token's first layers),
R rows of the table, V ids.

Routing follows the token's identity to a large part: Jiang et al., "Mixtral of Experts" (2024,
arXiv:2401.04088, section 5); Xue et al., "OpenMoE" (2024, arXiv:2402.01739), "context-independent
specialisation".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.counting import CountingPredictor, next_valid_BT
from specgate.traces.batch import RoutingBatch, last_valid_B


class TokenTable(CountingPredictor):
    """The ``token_table`` predictor.

    Args:
        rows: ids that get a row, first come first served; further ids back off to popularity (bounds the
            memory: a row takes 4 C E bytes).

    Shapes:
        counts_RCE, seen_RC (buffers): uses of each expert at each column, and tokens that have this column,
        by row. row_V (buffer): row of each id, -1 for none.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``. Wrapped targets belong to a next token whose
            id is not known; they condition on the current one's.
    """

    name: ClassVar[str] = "token_table"
    counts_RCE: Tensor
    seen_RC: Tensor
    row_V: Tensor

    def __init__(self, *, rows: int = 16384, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        wrapped = min(self.lookahead, self.layers) if self.phase == "decode" else 0
        self.width = self.layers + wrapped
        rows = min(rows, self.vocab_size)
        self.register_buffer("counts_RCE", torch.zeros(rows, self.width, self.experts))
        self.register_buffer("seen_RC", torch.zeros(rows, self.width))
        self.register_buffer("row_V", torch.full((self.vocab_size,), -1, dtype=torch.int64))

    def count(self, batch: RoutingBatch) -> None:
        super().count(batch)
        ids_N = batch.token_ids_BT[batch.mask_BT]
        self._give_rows(ids_N)
        row_N = self.row_V[ids_N]
        following = torch.cat([batch.experts_BTLK[:, 1:], torch.zeros_like(batch.experts_BTLK[:, :1])], dim=1)
        experts_NCK = torch.cat([batch.experts_BTLK, following], dim=2)[:, :, : self.width][batch.mask_BT]
        there_NC = torch.ones(len(ids_N), self.width, dtype=torch.bool, device=ids_N.device)
        there_NC[:, self.layers :] = next_valid_BT(batch)[batch.mask_BT][:, None]
        there_NC &= (row_N >= 0)[:, None]
        cell_NC = row_N.clamp(min=0)[:, None] * self.width + torch.arange(self.width, device=ids_N.device)
        self.seen_RC.view(-1).index_add_(0, cell_NC.flatten(), there_NC.flatten().float())
        cell_NCK = cell_NC[..., None] * self.experts + experts_NCK
        weight_NCK = there_NC[..., None].expand_as(cell_NCK).float()
        self.counts_RCE.view(-1).index_add_(0, cell_NCK.flatten(), weight_NCK.flatten())

    def _give_rows(self, ids_N: Tensor) -> None:
        new = ids_N.unique()
        new = new[self.row_V[new] < 0]
        taken = int(self.row_V.max()) + 1
        new = new[: len(self.seen_RC) - taken]
        self.row_V[new] = torch.arange(taken, taken + len(new), device=new.device)

    def forward(self, batch: RoutingBatch) -> Tensor:
        row_BT = self.row_V[batch.token_ids_BT]
        known_BT11 = (row_BT >= 0)[..., None, None]
        row_BT = row_BT.clamp(min=0)
        prior_CE = self.prior_LE()[torch.arange(self.width, device=row_BT.device) % self.layers]
        counts_BTCE = self.counts_RCE[row_BT] * known_BT11
        seen_BTC1 = self.seen_RC[row_BT][..., None] * known_BT11
        p_BTCE = (counts_BTCE + self.smoothing * prior_CE) / (seen_BTC1 + self.smoothing)
        return self.link(p_BTCE)[:, :, self.columns.clamp(max=self.width - 1)]

    def step_logits(self, batch: RoutingBatch, layer: int) -> Tensor:
        """One row of the table."""
        return self.table_step(batch, range(layer + 1, layer + 1 + self.lookahead))

    def table_step(self, batch: RoutingBatch, columns: range) -> Tensor:
        """The last token's row at some target columns: logits ``[B, len(columns), E]``."""
        ids_B = batch.token_ids_BT.gather(1, last_valid_B(batch.valid_BT)[:, None])[:, 0]
        row_B = self.row_V[ids_B]
        known_B11 = (row_B >= 0)[:, None, None]
        first, last = (min(column, self.width - 1) for column in (columns[0], columns[-1]))
        last += 1
        column_C = torch.arange(first, last, device=row_B.device)
        prior_CE = self.prior_LE()[column_C % self.layers]
        counts_BCE = self.counts_RCE[row_B.clamp(min=0), first:last] * known_B11
        seen_BC1 = self.seen_RC[row_B.clamp(min=0), first:last][..., None] * known_B11
        p_BCE = (counts_BCE + self.smoothing * prior_CE) / (seen_BC1 + self.smoothing)
        logits_BCE = self.link(p_BCE)
        if last - first == len(columns):
            return logits_BCE
        wanted_H = torch.arange(columns.start, columns.stop, device=row_B.device)
        return logits_BCE[:, wanted_H.clamp(max=self.width - 1) - first]
