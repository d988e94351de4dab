"""Temperature scaling: honest probabilities from a predictor's logits, per kind of target and per horizon.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, Q kinds
of target (within, wrapped, entry), M events kept for fitting.

K = 1: p = softmax(logits / temperature) (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
K > 1: p = sigmoid(logits / temperature + offset) per expert (Platt, "Probabilistic Outputs for SVMs", 1999).
A forecast further ahead deserves less confidence, hence one parameter per horizon; a forecast across the
token boundary is another problem than one within the token, hence one per kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.traces.batch import KINDS

LINKS = ("softmax", "sigmoid")


class TemperatureScaling(nn.Module):
    """Calibrated probabilities from logits; the identity (the bare link) until :meth:`fit` was called.

    Args:
        horizons: number of horizons H.
        link: ``"softmax"`` (K = 1) or ``"sigmoid"`` (K > 1).

    Buffers (kept in the checkpoint): ``log_temperature_QH``, ``offset_QH`` (zero for softmax), ``events_QH``
    (how many events each pair was fitted on; 0 = identity).

    Raises:
        ConfigError: for an unknown link.
    """

    log_temperature_QH: Tensor
    offset_QH: Tensor
    events_QH: Tensor

    def __init__(self, horizons: int, link: str) -> None:
        super().__init__()
        if link not in LINKS:
            raise ConfigError(f"link {link!r} is unknown: choose one of {', '.join(LINKS)}")
        self.horizons, self.link = horizons, link
        self.register_buffer("log_temperature_QH", torch.zeros(len(KINDS), horizons))
        self.register_buffer("offset_QH", torch.zeros(len(KINDS), horizons))
        self.register_buffer("events_QH", torch.zeros(len(KINDS), horizons, dtype=torch.int64))

    def forward(self, logits_BTPHE: Tensor, kind_PH: Tensor) -> Tensor:
        """Probabilities of the logits' shape, float32 whatever the logits' precision.

        Shapes:
            logits_BTPHE: ``[..., P, H, E]``.
            kind_PH: int64, see ``specgate.traces.batch.kind_PH``; INVALID pairs are scaled like "within"
                (they are never read).
        """
        kind_PH = kind_PH.clamp(min=0).to(self.offset_QH.device)
        horizon_H = torch.arange(self.horizons, device=kind_PH.device)
        inverse_PH1 = (-self.log_temperature_QH[kind_PH, horizon_H]).exp()[..., None]
        scaled = logits_BTPHE.float() * inverse_PH1
        if self.link == "softmax":
            return scaled.softmax(-1)
        return (scaled + self.offset_QH[kind_PH, horizon_H][..., None]).sigmoid()

    def fit(
        self,
        stream: Iterable[tuple[Tensor, Tensor, Tensor]],
        kind_PH: Tensor,
        cells: int = 200_000,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        """Fit every (kind, horizon) by minimising the negative log-likelihood with L-BFGS.

        Args:
            stream: ``(logits_BTPHE, experts_BTPHK, valid_BTPH)`` batches, of validation data: never of data
                the predictor was trained on (it is overconfident there) nor of the locked test split.
            cells: memory bound: a uniform sample of at most ``cells / E`` events is kept per (kind, horizon).
            seed: of the sampling.

        Returns:
            One dict per fitted (kind, horizon): ``kind``, ``horizon``, ``events``, ``temperature``,
            ``offset``, ``nll_before``, ``nll_after`` (per event for softmax, per cell for sigmoid). After is
            never above before.

        Raises:
            ConfigError: if ``cells`` is not positive.
        """
        if cells < 1:
            raise ConfigError(f"calibration cells={cells} keeps nothing to fit on: choose a positive number")
        samples: dict[tuple[int, int], Reservoir] = {}
        generator = torch.Generator().manual_seed(seed)
        for logits_BTPHE, experts_BTPHK, valid_BTPH in stream:
            for kind in KINDS:
                for h0 in range(self.horizons):
                    chosen_BTP = valid_BTPH[..., h0] & (kind_PH[:, h0].to(valid_BTPH.device) == kind)
                    if not bool(chosen_BTP.any()):
                        continue
                    capacity = max(1, cells // logits_BTPHE.shape[-1])
                    sample = samples.setdefault((kind, h0), Reservoir(capacity, generator))
                    sample.add(logits_BTPHE[..., h0, :][chosen_BTP], experts_BTPHK[..., h0, :][chosen_BTP])
        return [self._fit_one(kind, h0, sample) for (kind, h0), sample in sorted(samples.items())]

    def _fit_one(self, kind: int, h0: int, sample: Reservoir) -> dict[str, Any]:
        with torch.inference_mode(False), torch.enable_grad():
            logits_ME, used_MK = sample.logits_ME.clone(), sample.used_MK.clone()
            loss = softmax_nll if self.link == "softmax" else sigmoid_nll
            log_temperature, offset, before, after = minimise(
                loss, logits_ME, used_MK, with_offset=self.link == "sigmoid"
            )
        self.log_temperature_QH[kind, h0] = log_temperature
        self.offset_QH[kind, h0] = offset
        self.events_QH[kind, h0] = sample.seen
        return {
            "kind": KINDS[kind],
            "horizon": h0 + 1,
            "events": sample.seen,
            "temperature": round(float(torch.tensor(log_temperature).exp()), 6),
            "offset": round(offset, 6),
            "nll_before": round(before, 6),
            "nll_after": round(after, 6),
        }


class Reservoir:
    """A uniform sample, without replacement, of at most ``capacity`` events of a stream of unknown length.

    Every event draws a uniform key and the smallest keys stay, so whole batches are sampled at once.
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        self.capacity, self.generator = capacity, generator
        self.seen = 0
        self.key_M, self.logits_ME, self.used_MK = torch.empty(0), torch.empty(0), torch.empty(0)

    def add(self, logits_ME: Tensor, used_MK: Tensor) -> None:
        """Offer the events of one batch."""
        key_M = torch.rand(len(logits_ME), generator=self.generator, dtype=torch.float64)
        full = self.seen >= self.capacity
        better_M = key_M < self.key_M.max() if full else torch.ones(len(key_M), dtype=torch.bool)
        self.seen += len(key_M)
        if not bool(better_M.any()):
            return
        on_device = better_M.to(logits_ME.device)
        offered = (
            key_M[better_M],
            logits_ME[on_device].detach().to("cpu", torch.float32),
            used_MK[on_device].cpu(),
        )
        kept = (self.key_M, self.logits_ME, self.used_MK)
        merged: tuple[Tensor, ...] = offered
        if len(self.key_M):
            merged = tuple(torch.cat(pair) for pair in zip(kept, offered, strict=True))
        if len(merged[0]) > self.capacity:
            stay_M = merged[0].topk(self.capacity, largest=False).indices
            merged = tuple(tensor[stay_M] for tensor in merged)
        self.key_M, self.logits_ME, self.used_MK = merged


def softmax_nll(logits_ME: Tensor, used_MK: Tensor) -> Tensor:
    """Mean categorical negative log-likelihood of the one used expert."""
    return F.cross_entropy(logits_ME, used_MK[:, 0])


def sigmoid_nll(logits_ME: Tensor, used_MK: Tensor) -> Tensor:
    """Mean binary negative log-likelihood over all cells."""
    return (F.softplus(logits_ME).sum() - logits_ME.gather(1, used_MK).sum()) / logits_ME.numel()


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
