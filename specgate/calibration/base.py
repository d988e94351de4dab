"""What all calibrators share: their contract, and a bounded uniform sample of forecasts to fit them on.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, Q kinds
of target (within, wrapped, entry), M events kept for fitting.

A calibrator turns a predictor's logits into honest probabilities: of all experts given 30 %, 30 % should be
used. It is an ``nn.Module`` whose state is buffers only, so that a checkpoint of tensors and plain values
keeps it, and it is the bare link (softmax for K = 1, a sigmoid per expert for K > 1) until it was fitted.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.traces.batch import KINDS

LINKS = ("softmax", "sigmoid")
Stream = Iterable[tuple[Tensor, Tensor, Tensor]]
"""``(logits_BTPHE, experts_BTPHK, valid_BTPH)`` batches of validation data."""


class Calibrator(nn.Module):
    """Base of every calibrator: a subclass sets ``name``, implements :meth:`forward` and :meth:`_fit_pair`.

    Args:
        horizons: number of horizons H.
        link: ``"softmax"`` (K = 1) or ``"sigmoid"`` (K > 1).
        points: number of source points P (only some calibrators need it).
        experts: experts per layer E (only some calibrators need it).

    Buffers (kept in the checkpoint): ``events_QH``, how many events each pair of kind and horizon was fitted
    on; 0 = identity.

    Raises:
        ConfigError: for an unknown link.
    """

    name: ClassVar[str] = ""
    by_point: ClassVar[bool] = False
    events_QH: Tensor

    def __init__(self, horizons: int, link: str, points: int = 0, experts: int = 0) -> None:
        super().__init__()
        if link not in LINKS:
            raise ConfigError(f"link {link!r} is unknown: choose one of {', '.join(LINKS)}")
        self.horizons, self.link, self.points, self.experts = horizons, link, points, experts

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], horizons: int, link: str, points: int, experts: int
    ) -> Calibrator:
        """An unfitted calibrator into which ``state`` fits (a checkpoint's part below ``calibrator.``)."""
        return cls(horizons, link, points, experts)

    @property
    def fitted(self) -> bool:
        """Whether anything was fitted yet."""
        return bool(self.events_QH.any())

    @abstractmethod
    def forward(self, logits_BTPHE: Tensor, kind_PH: Tensor) -> Tensor:
        """Probabilities of the logits' shape, float32 whatever the logits' precision.

        Shapes:
            logits_BTPHE: ``[..., P, H, E]``.
            kind_PH: int64, see ``specgate.traces.batch.kind_PH``; INVALID pairs are treated like "within"
                (they are never read).
        """

    def fit(
        self, stream: Stream, kind_PH: Tensor, cells: int = 200_000, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Fit every (kind, horizon) that has events.

        Args:
            stream: of validation data: never of data the predictor was trained on (it is overconfident
                there) nor of the locked test split.
            cells: memory bound: a uniform sample of at most ``cells / E`` events is kept per (kind, horizon),
                or per (source point, horizon) by a calibrator that has parameters for each.
            seed: of the sampling.

        Returns:
            One dict per fitted (kind, horizon): ``kind``, ``horizon``, ``events``, what was fitted, and
            ``nll_before``, ``nll_after`` on the sample (per event for softmax, per cell for sigmoid).

        Raises:
            ConfigError: if ``cells`` is not positive.
        """
        samples = sample_events(stream, kind_PH, self.horizons, cells, seed, self.by_point)
        pairs: dict[tuple[int, int], dict[int, Reservoir]] = {}
        for (kind, h0, point), sample in sorted(samples.items()):
            pairs.setdefault((kind, h0), {})[point] = sample
        report = []
        with torch.inference_mode(False), torch.no_grad():
            for (kind, h0), found in pairs.items():
                events = sum(sample.seen for sample in found.values())
                fitted = self._fit_pair(kind, h0, found)
                self.events_QH[kind, h0] = events
                report.append({"kind": KINDS[kind], "horizon": h0 + 1, "events": events, **fitted})
        return report

    @abstractmethod
    def _fit_pair(self, kind: int, h0: int, samples: Mapping[int, Reservoir]) -> dict[str, Any]:
        """Fit one kind and horizon on its samples by source point (all under key -1 unless ``by_point``)."""

    def _pair_PH(self, kind_PH: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into buffers ``[Q, H, ...]`` that give what each (source point, horizon) needs."""
        place = self.events_QH.device
        return kind_PH.clamp(min=0).to(place), torch.arange(self.horizons, device=place)

    def nll(self, logits_ME: Tensor, used_MK: Tensor) -> Tensor:
        """Mean negative log-likelihood of logits after scaling: per event for softmax, per cell for
        sigmoid.
        """
        return (softmax_nll if self.link == "softmax" else sigmoid_nll)(logits_ME, used_MK)


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


def sample_events(
    stream: Stream, kind_PH: Tensor, horizons: int, cells: int, seed: int, by_point: bool = False
) -> dict[tuple[int, int, int], Reservoir]:
    """A uniform sample of at most ``cells / E`` events per (kind, horizon index, source point).

    The point is -1, for "all of them", unless ``by_point``.

    Raises:
        ConfigError: if ``cells`` is not positive.
    """
    if cells < 1:
        raise ConfigError(f"calibration cells={cells} keeps nothing to fit on: choose a positive number")
    samples: dict[tuple[int, int, int], Reservoir] = {}
    generator = torch.Generator().manual_seed(seed)
    for logits_BTPHE, experts_BTPHK, valid_BTPH in stream:
        capacity = max(1, cells // logits_BTPHE.shape[-1])
        for kind, h0, points in slices(kind_PH, horizons, by_point):
            chosen_BTP = valid_BTPH[..., points, h0]
            if not bool(chosen_BTP.any()):
                continue
            key = (kind, h0, points[0] if by_point else -1)
            sample = samples.setdefault(key, Reservoir(capacity, generator))
            logits_ME = logits_BTPHE[..., points, h0, :][chosen_BTP]
            sample.add(logits_ME, experts_BTPHK[..., points, h0, :][chosen_BTP])
    return samples


def slices(kind_PH: Tensor, horizons: int, by_point: bool = False) -> Iterator[tuple[int, int, list[int]]]:
    """Every (kind, horizon index) with its source points; with ``by_point`` a triple for each point."""
    for kind in KINDS:
        for h0 in range(horizons):
            points = (kind_PH[:, h0] == kind).nonzero().flatten().tolist()
            if by_point:
                yield from ((kind, h0, [point]) for point in points)
            elif points:
                yield kind, h0, points


def softmax_nll(logits_ME: Tensor, used_MK: Tensor) -> Tensor:
    """Mean categorical negative log-likelihood of the one used expert."""
    return F.cross_entropy(logits_ME, used_MK[:, 0])


def sigmoid_nll(logits_ME: Tensor, used_MK: Tensor) -> Tensor:
    """Mean binary negative log-likelihood over all cells."""
    return (F.softplus(logits_ME).sum() - logits_ME.gather(1, used_MK).sum()) / logits_ME.numel()
