"""Exponentially decayed use of each expert within the sequence, mixed with popularity.

Letters: B sequences, T tokens, L MoE layers, P source points, H horizons, E experts per layer, K experts per
token, A decays on the grid, M mixtures on the grid.

A least-recently/least-frequently-used cache as a forecast; its decayed form after Lee et al., "LRFU: A
Spectrum of Policies" (IEEE Trans. Computers 2001), as admission gates of expert caches use it. In prefill the
target layers of earlier tokens are not routed yet, so there it is popularity, exactly.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.predictors.counting import CountingPredictor, used_BTCE
from specgate.predictors.features import at_targets_BTPHE, decayed, shifted
from specgate.traces.batch import RoutingBatch


class Recency(CountingPredictor):
    """The ``recency`` predictor: p = mix_l r_e + (1 - mix_l m) popularity_e, with r the decayed mean use
    ``(1 - a) sum a^age``, m = 1 - a^tokens its mass (so that with no past it is popularity).

    The decay (one) and the mixture (one per layer) are those of least binary log-loss on a grid, over the
    first ``fit_batches`` training batches and the final popularity.

    Args:
        decays: grid of a. mixes: grid of the mixture weight. fit_batches: training batches kept for the fit.

    Shapes:
        mix_L (buffer): mixture per layer. decay (buffer): scalar.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "recency"
    mix_L: Tensor
    decay: Tensor

    def __init__(
        self,
        *,
        decays: list[float] | None = None,
        mixes: list[float] | None = None,
        fit_batches: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.decays = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98] if decays is None else [float(a) for a in decays]
        self.mixes = [i / 10 for i in range(11)] if mixes is None else [float(m) for m in mixes]
        self.fit_batches = fit_batches
        self.kept: list[RoutingBatch] = []
        self.register_buffer("mix_L", torch.full((self.layers,), 0.5))
        self.register_buffer("decay", torch.tensor(0.9))

    def count(self, batch: RoutingBatch) -> None:
        super().count(batch)
        if self.phase == "decode" and len(self.kept) < self.fit_batches:
            self.kept.append(batch)

    def finish(self) -> None:
        """Choose decay and mixtures on the grid."""
        if not self.kept:
            return
        loss_AML = torch.zeros(len(self.decays), len(self.mixes), self.layers, device=self.mix_L.device)
        for batch in self.kept:
            batch = batch.to(self.mix_L.device)
            used_BTLE = used_BTCE(batch, self.experts, self.layers)
            used_NLE = used_BTLE[batch.mask_BT]
            for i, decay in enumerate(self.decays):
                for j, mix in enumerate(self.mixes):
                    after_BTLE = self.after(batch, used_BTLE, decay, self.mix_L.new_full((self.layers,), mix))
                    p_NLE = (shifted(after_BTLE) + self.prior_LE())[batch.mask_BT].clamp(1e-4, 1 - 1e-4)
                    terms = used_NLE * p_NLE.log() + (1 - used_NLE) * (1 - p_NLE).log()
                    loss_AML[i, j] -= terms.sum((0, 2))
        best_AL, mix_AL = loss_AML.min(1)
        chosen = int(best_AL.sum(1).argmin())
        self.decay.fill_(self.decays[chosen])
        self.mix_L.copy_(torch.tensor(self.mixes, device=self.mix_L.device)[mix_AL[chosen]])

    def on_train_end(self) -> None:
        """The batches kept for the fit are no longer needed."""
        self.kept = []

    def after(self, batch: RoutingBatch, used_BTLE: Tensor, decay: float, mix_L: Tensor) -> Tensor:
        """What the next token's probability adds to popularity, after token t: ``[B, T, L, E]``."""
        recent_BTLE = decayed(used_BTLE, decay)
        mass_BT11 = decayed(batch.valid_BT[..., None].float(), decay)[..., None]
        return mix_L[:, None] * (recent_BTLE - mass_BT11 * self.prior_LE())

    def forward(self, batch: RoutingBatch) -> Tensor:
        B, T = batch.valid_BT.shape
        prior_PHE = self.prior_PHE()
        if self.phase == "prefill":
            return self.link(prior_PHE).expand(B, T, *prior_PHE.shape)
        used_BTLE = used_BTCE(batch, self.experts, self.layers)
        after_BTLE = self.after(batch, used_BTLE, float(self.decay), self.mix_L)
        return self.link(at_targets_BTPHE(after_BTLE, self.lookahead) + prior_PHE)
