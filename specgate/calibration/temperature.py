"""Temperature scaling: honest probabilities from a predictor's logits, per kind of target and per horizon.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, Q kinds
of target (within, wrapped, entry), M events kept for fitting.

K = 1: p = softmax(logits / temperature) (Guo et al., "On Calibration of Modern Neural Networks",
arXiv:1706.04599). K > 1: p = sigmoid(logits / temperature + offset) per expert (Platt, "Probabilistic Outputs
for SVMs", 1999). A forecast further ahead deserves less confidence, hence one parameter per horizon; a
forecast across the token boundary is another problem than one within the token, hence one per kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specgate.calibration.base import LINKS, Calibrator, Reservoir, sigmoid_nll, softmax_nll
from specgate.traces.batch import KINDS

__all__ = ["LINKS", "Reservoir", "TemperatureScaling", "minimise", "sigmoid_nll", "softmax_nll"]


class TemperatureScaling(Calibrator):
    """Calibrated probabilities from logits; the identity (the bare link) until :meth:`fit` was called.

    Every (kind, horizon) is fitted by minimising the negative log-likelihood with L-BFGS; it is never above
    that of the bare link afterwards.

    Args:
        horizons: number of horizons H.
        link: ``"softmax"`` (K = 1) or ``"sigmoid"`` (K > 1).

    Buffers (kept in the checkpoint): ``log_temperature_QH``, ``offset_QH`` (zero for softmax), ``events_QH``
    (how many events each pair was fitted on; 0 = identity).
    """

    name = "temperature"
    log_temperature_QH: Tensor
    offset_QH: Tensor

    def __init__(self, horizons: int, link: str, points: int = 0, experts: int = 0) -> None:
        super().__init__(horizons, link, points, experts)
        self.register_buffer("log_temperature_QH", torch.zeros(len(KINDS), horizons))
        self.register_buffer("offset_QH", torch.zeros(len(KINDS), horizons))
        self.register_buffer("events_QH", torch.zeros(len(KINDS), horizons, dtype=torch.int64))

    def forward(self, logits_BTPHE: Tensor, kind_PH: Tensor) -> Tensor:
        """Probabilities, see :meth:`Calibrator.forward`."""
        kind_PH, horizon_H = self._pair_PH(kind_PH)
        inverse_PH1 = (-self.log_temperature_QH[kind_PH, horizon_H]).exp()[..., None]
        scaled = logits_BTPHE.float() * inverse_PH1
        if self.link == "softmax":
            return scaled.softmax(-1)
        return (scaled + self.offset_QH[kind_PH, horizon_H][..., None]).sigmoid()

    def _fit_pair(self, kind: int, h0: int, samples: Mapping[int, Reservoir]) -> dict[str, Any]:
        sample = samples[-1]
        with torch.enable_grad():
            log_temperature, offset, before, after = minimise(
                self.nll, sample.logits_ME.clone(), sample.used_MK.clone(), with_offset=self.link == "sigmoid"
            )
        self.log_temperature_QH[kind, h0] = log_temperature
        self.offset_QH[kind, h0] = offset
        return {
            "temperature": round(float(torch.tensor(log_temperature).exp()), 6),
            "offset": round(offset, 6),
            "nll_before": round(before, 6),
            "nll_after": round(after, 6),
        }


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor], logits_ME: Tensor, used_MK: Tensor, with_offset: bool
) -> tuple[float, float, float, float]:
    """Log-temperature and offset of least loss, and the loss before and after; the identity if nothing is
    better.

    The temperature stays within [0.05, 20], so that a forecast that is always right (or noise) stays finite.
    """
    logits_ME = logits_ME.double()
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    bound = torch.tensor(20.0, dtype=torch.float64).log()

    def scaled() -> Tensor:
        shifted = logits_ME * (-parameters[0].clamp(-bound, bound)).exp()
        return shifted + parameters[1] if with_offset else shifted

    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=50, line_search_fn="strong_wolfe", tolerance_change=1e-8
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scaled(), used_MK)
        value.backward()
        return value

    before = float(loss(logits_ME, used_MK))
    optimizer.step(closure)
    with torch.no_grad():
        after = float(loss(scaled(), used_MK))
        if not after < before:  # also when NaN
            return 0.0, 0.0, before, before
        return float(parameters[0].clamp(-bound, bound)), float(parameters[1]) * with_offset, before, after
