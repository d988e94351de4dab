"""Training that knows what the weights will be once they are integers.

A weight is rounded before the forward pass and put back after the backward pass, so that the gradient is
that of the rounded weight and the step is the exact weight's: the straight-through estimator (Bengio et al.,
2013, arXiv:1308.3432) of quantisation-aware training (Jacob et al., 2018, arXiv:1712.05877). Nothing about
the predictor changes, so any predictor, optimizer, average of weights and checkpoint works as before.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.quantize import GROUP, fake_quantise, group_of, pack, quantisable


class QuantizationAwareTraining(L.Callback):
    """Train for int8 or int4 weights, and pack them when training is done.

    Validation always sees rounded weights, so the best checkpoint is the best once packed.

    Args:
        bits: 8 or 4.
        start: share of the run's steps after which training rounds; before, it is exact.
        group: inputs per scale of int4.

    Raises:
        ConfigError: for other bits, or a start outside 0..1.
    """

    def __init__(self, bits: int = 8, start: float = 0.5, group: int = GROUP) -> None:
        if bits not in (4, 8):
            raise ConfigError(f"bits={bits} is no precision to train for: choose 8 or 4")
        if not 0 <= start <= 1:
            raise ConfigError(f"start={start} is no share of a run: choose 0 to 1")
        self.bits, self.start, self.group = bits, start, group
        self._exact: list[tuple[Tensor, Tensor]] = []
        self._first = 0.0

    @torch.no_grad()
    def round(self, module: nn.Module) -> None:
        """Replace every quantisable weight's values by what they will be once packed, remembering them."""
        self.restore()
        for _, _, weight, axis in quantisable(module):
            self._exact.append((weight, weight.detach().clone()))
            weight.copy_(
                fake_quantise(weight, self.bits, axis, group_of(self.bits, self.group, weight.shape[axis]))
            )

    @torch.no_grad()
    def restore(self) -> None:
        """Put the exact values back (nothing, if they are there)."""
        for weight, exact in self._exact:
            weight.copy_(exact)
        self._exact = []

    def finish(self, module: nn.Module) -> None:
        """Pack the weights for good; called once the best ones are loaded."""
        pack(module, self.bits, self.group)

    # ------------------------------------------------------------------ Lightning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know when to begin; at once, if the run's length is unknown (a time budget)."""
        steps = float(trainer.estimated_stepping_batches)
        self._first = self.start * steps if math.isfinite(steps) else 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Round, from ``start`` on."""
        if trainer.global_step >= self._first:
            self.round(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The gradient is there: the step is the exact weight's."""
        self.restore()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Of a batch without a loss."""
        self.restore()

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Round whatever weights are validated (an average of them, say)."""
        self.round(pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """As before."""
        self.restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Before anything is saved."""
        self.restore()
