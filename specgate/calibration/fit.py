"""Fit a predictor's calibrator on validation data.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from specgate.calibration.temperature import TemperatureScaling
from specgate.predictors.base import Predictor, batch_chunks
from specgate.traces.batch import RoutingBatch, targets

MAX_LOGITS = 20_000_000
"""Batches are cut along B so that no forecast holds more logits than this (80 MB in float32)."""


def link_of(top_k: int) -> str:
    """The link between logits and probabilities: softmax for one expert per token, else a sigmoid per
    expert.
    """
    return "softmax" if top_k == 1 else "sigmoid"


@torch.no_grad()
def forecast_stream(
    predictor: Predictor, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
) -> Iterator[tuple[RoutingBatch, Tensor]]:
    """``(batch, logits_BTPHE)`` for every batch, in evaluation mode, in chunks of bounded size.

    Args:
        predictor: anything with the contract of :class:`Predictor`; it is moved to ``device`` and its
            training mode is restored at the end.
        device: where to compute; default, where the predictor is.
    """
    device = torch.device(device) if device is not None else predictor.device
    predictor.to(device)
    was_training = predictor.training
    predictor.eval()
    per_token = (predictor.layers + 1) * predictor.lookahead * predictor.experts
    for batch in batches:
        sequences = max(1, MAX_LOGITS // (batch.valid_BT.shape[1] * per_token))
        for chunk in batch_chunks(batch, sequences):
            on_device = chunk.to(device)
            yield on_device, predictor(on_device)
    predictor.train(was_training)


class TemperatureFitter:
    """Gives a predictor a :class:`TemperatureScaling` fitted on validation batches.

    Args:
        cells: bound on the (logit, used) cells kept per kind and horizon.
        seed: of their sampling.
    """

    def __init__(self, cells: int = 200_000, seed: int = 0) -> None:
        self.cells, self.seed = cells, seed

    def __call__(
        self, predictor: Predictor, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Fit and install ``predictor.calibrator``; returns what :meth:`TemperatureScaling.fit` returns.

        Args:
            batches: of the validation split.
            device: where the predictor computes; default, where it is.
        """
        scaling = TemperatureScaling(predictor.lookahead, link_of(predictor.top_k))

        def stream() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for batch, logits_BTPHE in forecast_stream(predictor, batches, device):
                yield logits_BTPHE, *targets(batch, predictor.lookahead)

        fitted = scaling.fit(stream(), predictor.kinds.cpu(), self.cells, self.seed)
        predictor.calibrator = scaling.to(predictor.device)
        return fitted


class NoCalibration:
    """Leaves the predictor's probabilities as they are (the bare link)."""

    def __call__(
        self, predictor: Predictor, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Does nothing and fits nothing."""
        return []
