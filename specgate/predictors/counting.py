"""What the free predictors share: they are fitted by counting over the training windows once, without
gradients.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K
experts per token, C target columns (j < L is this token's layer j, j >= L the next token's layer j - L).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.base import Predictor
from specgate.predictors.features import column_PH
from specgate.traces.batch import RoutingBatch


class CountingPredictor(Predictor):
    """Base of the free predictors. A subclass implements :meth:`count` and :meth:`forward`, and may implement
    :meth:`finish`.

    One pass over the training windows (``python train.py`` runs one epoch and no optimizer); what is counted
    lies in buffers and travels in the checkpoint. A learned predictor's hyperparameters (lr, ...) are
    accepted and unused.

    Args:
        smoothing: pseudo-counts with which a frequency is drawn towards what is known without the condition.
    """

    learned: ClassVar[bool] = False
    columns: Tensor
    popularity_LE: Tensor
    tokens_L: Tensor

    def __init__(self, *, smoothing: float = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.smoothing = smoothing
        self.register_buffer("columns", column_PH(self.layers, self.lookahead), persistent=False)
        self.register_buffer("popularity_LE", torch.zeros(self.layers, self.experts))
        self.register_buffer("tokens_L", torch.zeros(self.layers))

    # ------------------------------------------------------------------ to implement

    def count(self, batch: RoutingBatch) -> None:
        """Add one training batch to the counts (the base counts popularity; call it first)."""
        used_NLE = used_BTCE(batch, self.experts, self.layers)[batch.mask_BT]
        self.popularity_LE += used_NLE.sum(0)
        self.tokens_L += batch.mask_BT.sum()

    def finish(self) -> None:
        """Called once everything is counted, before the first use (nothing to do by default)."""

    # ------------------------------------------------------------------ shared pieces

    def prior_LE(self) -> Tensor:
        """P(expert e is used at layer l): ``[L, E]``, K / E before anything was counted."""
        uniform = self.top_k / self.experts
        pseudo = self.smoothing
        return (self.popularity_LE + pseudo * uniform) / (self.tokens_L[:, None] + pseudo)

    def prior_PHE(self) -> Tensor:
        """The popularity of each target layer: ``[P, H, E]``."""
        return self.prior_LE()[self.columns % self.layers]

    def link(self, p: Tensor) -> Tensor:
        """Logits of probabilities: log p (K = 1, softmax gives p back) or logit p (K > 1, sigmoid does)."""
        p = p.clamp(1e-6, 1 - 1e-6)
        return p.log() if self.top_k == 1 else torch.logit(p)

    # ------------------------------------------------------------------ Lightning

    @torch.no_grad()
    def training_step(self, batch: RoutingBatch, batch_idx: int) -> None:
        """Count the batch (first epoch only: later epochs hold the same windows)."""
        if batch_idx == 0:
            self.check_batch(batch)
        if self.current_epoch == 0:
            self.count(batch)

    @torch.no_grad()
    def on_validation_start(self) -> None:
        """Lightning validates before it ends the epoch."""
        if not self.trainer.sanity_checking:
            self.finish()

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Everything is counted."""
        self.finish()

    def configure_optimizers(self) -> None:
        """Nothing is optimised."""
        return None


def used_BTCE(batch: RoutingBatch, experts: int, columns: int) -> Tensor:
    """0/1 use of each expert at target columns 0..columns-1, of this token and, from L on, of the next:
    float32.

    Columns of a next token that does not exist are zero; :func:`next_valid_BT` says which.
    """
    layers = batch.experts_BTLK.shape[2]
    used = torch.zeros((*batch.experts_BTLK.shape[:3], experts), device=batch.experts_BTLK.device)
    used = used.scatter_(-1, batch.experts_BTLK, 1.0) * batch.valid_BT[:, :, None, None]
    if columns <= layers:
        return used[:, :, :columns]
    following = torch.cat([used[:, 1:], torch.zeros_like(used[:, :1])], dim=1)
    return torch.cat([used, following], dim=2)[:, :, :columns]


def next_valid_BT(batch: RoutingBatch) -> Tensor:
    """Whether token t has a successor in the window."""
    return torch.cat([batch.valid_BT[:, 1:], torch.zeros_like(batch.valid_BT[:, :1])], dim=1)
