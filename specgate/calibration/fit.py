"""Fit a predictor's calibrator, and its conformal sets, on validation data.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from specgate.calibration.conformal import ConformalSets
from specgate.calibration.registry import link_of, make_calibrator
from specgate.errors import ConfigError
from specgate.predictors.base import Predictor, batch_chunks
from specgate.traces.batch import RoutingBatch, targets

__all__ = [
    "CalibratorFitter",
    "NoCalibration",
    "TemperatureFitter",
    "fit_conformal",
    "forecast_stream",
    "link_of",
]

MAX_LOGITS = 20_000_000
"""Batches are cut along B so that no forecast holds more logits than this (80 MB in float32)."""


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


class CalibratorFitter:
    """Gives a predictor a calibrator fitted on validation batches, and if wanted conformal sets.

    Args:
        calibrator: name of the calibrator, see ``specgate.calibration.registry``.
        cells: bound on the (logit, used) cells kept per kind and horizon (see :meth:`Calibrator.fit`).
        seed: of their sampling.
        conformal: also fit :class:`ConformalSets` and keep them as ``predictor.conformal`` (they go into the
            checkpoint).
    """

    def __init__(
        self, calibrator: str = "temperature", cells: int = 200_000, seed: int = 0, conformal: bool = False
    ) -> None:
        self.calibrator, self.cells, self.seed, self.conformal = calibrator, cells, seed, conformal

    def __call__(
        self, predictor: Predictor, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Fit and install ``predictor.calibrator``; returns what :meth:`Calibrator.fit` returns.

        Args:
            batches: of the validation split; read once, and once more for conformal sets.
            device: where the predictor computes; default, where it is.
        """
        calibrator = make_calibrator(self.calibrator, predictor)
        fitted = calibrator.fit(
            logit_stream(predictor, batches, device), predictor.kinds.cpu(), self.cells, self.seed
        )
        predictor.calibrator = calibrator.to(predictor.device)
        if self.conformal:
            fit_conformal(predictor, batches, device)
        return [{"calibrator": self.calibrator, **row} for row in fitted]


class TemperatureFitter(CalibratorFitter):
    """Gives a predictor a :class:`TemperatureScaling` fitted on validation batches."""

    def __init__(self, cells: int = 200_000, seed: int = 0, conformal: bool = False) -> None:
        super().__init__("temperature", cells, seed, conformal)


class NoCalibration:
    """Leaves the predictor's probabilities as they are (the bare link)."""

    def __call__(
        self, predictor: Predictor, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Does nothing and fits nothing."""
        return []


def logit_stream(
    predictor: Predictor, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(logits_BTPHE, experts_BTPHK, valid_BTPH)`` for every batch."""
    for batch, logits_BTPHE in forecast_stream(predictor, batches, device):
        yield logits_BTPHE, *targets(batch, predictor.lookahead)


def fit_conformal(
    predictor: Predictor,
    batches: Iterable[RoutingBatch],
    device: torch.device | str | None = None,
    seed: int = 0,
) -> ConformalSets:
    """Fit conformal sets on the predictor's (calibrated) probabilities and keep them as
    ``predictor.conformal``.

    Where the calibrator maps all experts of a forecast by one increasing function (temperature and isotonic
    for K > 1), the sets are what they would be without it, so that both may be fitted on the same documents.
    Otherwise the guarantee is exact for calibrators fitted on other documents; here it is off by what a few
    parameters can adapt to thousands of events.

    Args:
        batches: of the validation split.
        seed: of the sample from which set sizes are measured.
    """
    sets = ConformalSets(predictor.lookahead, predictor.experts)

    def stream() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for logits_BTPHE, *truth in logit_stream(predictor, batches, device):
            yield predictor.calibrator(logits_BTPHE, predictor.kinds), truth[0], truth[1]

    if not sets.fit(stream(), predictor.kinds.cpu(), seed=seed):
        raise ConfigError("no forecast of the validation split is scored: conformal sets need some")
    predictor.add_module("conformal", sets.to(predictor.device))
    return sets
