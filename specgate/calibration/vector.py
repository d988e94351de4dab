"""Vector scaling: a scale and an offset for every expert, drawn towards one temperature.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, Q kinds
of target (within, wrapped, entry), M events kept for fitting.

Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2: z_e = x_e / s_e + b_e,
then softmax (K = 1); for K > 1 the same map before a sigmoid, Platt scaling of each expert. Expert e of one
layer has nothing to do with expert e of another, so the experts are told apart by their layer too: the
parameters belong to a (source point, horizon), which fixes the kind and the target layer.

With E scales and E offsets per target, maximum likelihood alone would fit noise. A Gaussian prior around the
temperature and offset of the (kind, horizon) holds them back: an expert that was hardly seen keeps these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specgate.calibration.base import Calibrator, Reservoir
from specgate.calibration.temperature import minimise
from specgate.traces.batch import KINDS

PRIOR = 0.1
"""Standard deviation, in nats, of an expert's log-scale and offset around those of its kind and horizon."""
_BOUND = 3.0


class VectorScaling(Calibrator):
    """Per-expert scales and offsets; the bare link until :meth:`fit` was called.

    Args:
        horizons: number of horizons H.
        link: ``"softmax"`` (K = 1) or ``"sigmoid"`` (K > 1).
        points: number of source points P = L + 1.
        experts: experts per layer E.
        prior: see :data:`PRIOR`; 0 would be temperature scaling.

    Buffers (kept in the checkpoint): ``log_scale_PHE``, ``expert_offset_PHE``, ``events_QH``.
    """

    name = "vector"
    by_point = True
    log_scale_PHE: Tensor
    expert_offset_PHE: Tensor

    def __init__(
        self, horizons: int, link: str, points: int = 0, experts: int = 0, prior: float = PRIOR
    ) -> None:
        super().__init__(horizons, link, points, experts)
        self.prior = prior
        self.register_buffer("log_scale_PHE", torch.zeros(points, horizons, experts))
        self.register_buffer("expert_offset_PHE", torch.zeros(points, horizons, experts))
        self.register_buffer("events_QH", torch.zeros(len(KINDS), horizons, dtype=torch.int64))

    def forward(self, logits_BTPHE: Tensor, kind_PH: Tensor) -> Tensor:
        """Probabilities, see :meth:`Calibrator.forward`."""
        scaled = logits_BTPHE.float() * (-self.log_scale_PHE).exp() + self.expert_offset_PHE
        return scaled.softmax(-1) if self.link == "softmax" else scaled.sigmoid()

    def _fit_pair(self, kind: int, h0: int, samples: Mapping[int, Reservoir]) -> dict[str, Any]:
        share = len(samples)  # every point gives its part, so that all together are as many as one keeps
        logits_ME = torch.cat([sample.logits_ME[::share] for sample in samples.values()])
        used_MK = torch.cat([sample.used_MK[::share] for sample in samples.values()])
        with torch.enable_grad():
            log_temperature, offset, _, _ = minimise(
                self.nll, logits_ME, used_MK, with_offset=self.link == "sigmoid"
            )
        before, after, events = 0.0, 0.0, 0
        for point, sample in samples.items():
            scale_E, offset_E, mine, fitted = self._fit_point(sample, log_temperature, offset)
            self.log_scale_PHE[point, h0] = scale_E.float()
            self.expert_offset_PHE[point, h0] = offset_E.float()
            before, after, events = (
                before + mine * sample.seen,
                after + fitted * sample.seen,
                events + sample.seen,
            )
        points = list(samples)
        return {
            "temperature": round(float(torch.tensor(log_temperature).exp()), 6),
            "offset": round(offset, 6),
            "scale_spread": round(float(self.log_scale_PHE[points, h0].std()), 6),
            "offset_spread": round(float(self.expert_offset_PHE[points, h0].std()), 6),
            "nll_before": round(before / events, 6),
            "nll_after": round(after / events, 6),
        }

    def _fit_point(
        self, sample: Reservoir, log_temperature: float, offset: float
    ) -> tuple[Tensor, Tensor, float, float]:
        """Log-scales and offsets ``[E]`` of greatest posterior probability, and the loss of the bare link
        and theirs; the temperature's if nothing is better.
        """
        logits_ME, used_MK = sample.logits_ME.double(), sample.used_MK
        experts = logits_ME.shape[1]
        centre_2E = torch.tensor([[log_temperature], [offset]], dtype=torch.float64).expand(2, experts)
        # The loss is a mean: over events for softmax, over cells for sigmoid. The prior counts once in all.
        observations = len(logits_ME) * (1 if self.link == "softmax" else experts)
        weight = 0.5 / (max(self.prior, 1e-6) ** 2 * observations)

        def posterior(change_2E: Tensor) -> Tensor:
            scale_E, offset_E = (centre_2E + change_2E.clamp(-_BOUND, _BOUND)).unbind(0)
            loss = self.nll(logits_ME * (-scale_E).exp() + offset_E, used_MK)
            return loss + weight * change_2E.square().sum()

        with torch.enable_grad():
            change_2E = torch.zeros(2, experts, dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS(
                [change_2E], max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-9
            )

            def closure() -> Tensor:
                optimizer.zero_grad()
                value = posterior(change_2E)
                value.backward()
                return value

            optimizer.step(closure)
        best_2E = change_2E.detach().clamp(-_BOUND, _BOUND)
        zero_2E = torch.zeros_like(best_2E)
        if not float(posterior(best_2E)) < float(posterior(zero_2E)):  # also when NaN
            best_2E = zero_2E
        scale_E, offset_E = (centre_2E + best_2E).unbind(0)
        fitted = float(self.nll(logits_ME * (-scale_E).exp() + offset_E, used_MK))
        return scale_E, offset_E, float(self.nll(logits_ME, used_MK)), fitted
