"""torchmetrics classes over routing forecasts: sums of fixed size, whatever the number of tokens.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, M
events, G domains, J scores, C calibration bins, F fine bins.

States are float64 sums per (domain, source point, horizon), so that results of batches, epochs and DDP ranks
merge by addition; the kind of a (source point, horizon) pair (within, wrapped, entry) is kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from specgate.metrics.functional import (
    SCORES,
    calibration_bins,
    calibration_error,
    equal_mass_error,
    event_scores,
    threshold_curve,
)
from specgate.traces.batch import INVALID, KINDS, WITHIN, WRAPPED

FINE_PER_BIN = 50
THRESHOLDS = 50
_CHUNK_CELLS = 1 << 22


def _plain(value: Tensor | float | None) -> float | None:
    """A JSON number: six decimals, None for NaN."""
    number = math.nan if value is None else float(value)
    return None if math.isnan(number) else round(number, 6)


class CalibrationMetrics(Metric):
    """What scaling changes, cheaply: calibration error, NLL and confidence per kind of target and horizon.

    Args:
        layers: MoE layers in the stack; there are ``layers + 1`` source points.
        experts: experts per layer.
        top_k: experts per token.
        horizons: number of horizons, N+1 .. N+horizons.
        domains: names of the domains that ``domain_B`` counts.
        bins: calibration bins of equal width (20).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    scores: ClassVar[tuple[str, ...]] = ("n", "nll", "mean_confidence")
    fine: ClassVar[int] = 1  # bins of the finest histogram per bin
    bins_GPHC3: Tensor
    sums_GPHJ: Tensor
    kind_PH: Tensor

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        horizons: int,
        domains: Sequence[str] = ("all",),
        bins: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers, self.experts, self.top_k, self.horizons = layers, experts, top_k, horizons
        self.domains, self.bins = list(domains), bins
        points, groups = layers + 1, len(self.domains)
        f64 = torch.float64
        self.add_state("bins_GPHC3", torch.zeros(groups, points, horizons, bins, 3, dtype=f64), "sum")
        self.add_state("sums_GPHJ", torch.zeros(groups, points, horizons, len(self.scores), dtype=f64), "sum")
        # A rank that saw no batch holds INVALID (-1) everywhere, hence "max".
        self.add_state("kind_PH", torch.full((points, horizons), INVALID), "max")

    def update(
        self, p_BTPHE: Tensor, experts_BTPHK: Tensor, valid_BTPH: Tensor, kind_PH: Tensor, domain_B: Tensor
    ) -> None:
        """Add one batch (see ``specgate.traces.batch.targets`` for the last four arguments).

        Raises:
            ValueError: if shapes differ from the metric's, a probability lies outside [0, 1] or is NaN, or a
                domain is unknown.
        """
        self.kind_PH = torch.maximum(self.kind_PH, kind_PH.to(self.kind_PH.device))
        points = self.layers + 1
        expected = (*valid_BTPH.shape[:2], points, self.horizons, self.experts)
        if tuple(p_BTPHE.shape) != expected or tuple(experts_BTPHK.shape) != (*expected[:4], self.top_k):
            raise ValueError(
                f"forecast {tuple(p_BTPHE.shape)} and targets {tuple(experts_BTPHK.shape)} do not fit "
                f"[B, T, P={points}, H={self.horizons}, E={self.experts} | K={self.top_k}]"
            )
        # What must be looked at from outside the device is: the domains of the batch, the number of valid
        # events, and (once for all chunks) the range of the probabilities.
        domains, domain_B = domain_B.unique(return_inverse=True)
        present = domains.tolist()
        if present and not 0 <= present[0] <= present[-1] < len(self.domains):
            raise ValueError(f"a domain id lies outside the {len(self.domains)} domains of this metric")
        where_M = valid_BTPH.flatten().nonzero().flatten()
        if not len(where_M):
            return
        p_NE, used_NK = p_BTPHE.reshape(-1, self.experts), experts_BTPHK.reshape(-1, self.top_k)
        per_sequence = valid_BTPH[0].numel()
        ranges = []
        for chunk_M in where_M.split(max(1, _CHUNK_CELLS // self.experts)):
            p_ME = p_NE.index_select(0, chunk_M).float()
            ranges.append(torch.stack(p_ME.aminmax()))
            pair_M = chunk_M % (points * self.horizons)
            used_MK, domain_M = used_NK.index_select(0, chunk_M), domain_B[chunk_M // per_sequence]
            self._add(p_ME.clamp_(0, 1), used_MK, pair_M, domain_M, domains)
        low, high = torch.stack(ranges).T.tolist()
        if not all(a >= 0 and b <= 1 + 1e-5 for a, b in zip(low, high, strict=True)):  # so that NaN fails
            raise ValueError(f"forecast probabilities span [{min(low)}, {max(high)}], not [0, 1]")

    def _add(self, p_ME: Tensor, used_MK: Tensor, pair_M: Tensor, domain_M: Tensor, domains: Tensor) -> None:
        """Add valid events: index of their (point, horizon), and of their domain among ``domains``."""
        pairs = (self.layers + 1) * self.horizons
        group_M, groups = domain_M * pairs + pair_M, len(domains) * pairs
        bins = calibration_bins(p_ME, used_MK, group_M, groups, self.bins * self.fine)
        self._add_bins(bins.view(len(domains), *self.kind_PH.shape, self.bins * self.fine, 3), domains)
        sums_J = torch.zeros(groups, len(self.scores), dtype=torch.float64, device=p_ME.device)
        sums_J.index_add_(0, group_M, event_scores(p_ME, used_MK, self.scores))
        self.sums_GPHJ.index_add_(0, domains, sums_J.view(len(domains), *self.kind_PH.shape, -1))

    def _add_bins(self, bins_GPHF3: Tensor, domains: Tensor) -> None:
        self.bins_GPHC3.index_add_(0, domains, bins_GPHF3)

    def _slices(self) -> Iterator[tuple[str, int, list[int]]]:
        """Every (kind, horizon) with events: kind's name, horizon index, its source points."""
        for kind, name in KINDS.items():
            for h0 in range(self.horizons):
                points = [p for p in range(self.layers + 1) if int(self.kind_PH[p, h0]) == kind]
                if points and float(self.sums_GPHJ[:, points, h0, 0].sum()) > 0:
                    yield name, h0 + 1, points

    def _means(self, sums_J: Tensor, bins_C3: Tensor) -> dict[str, Any]:
        events = float(sums_J[0])
        means: dict[str, Any] = {"n": int(events)}
        means |= {name: _plain(sums_J[j] / events) for j, name in enumerate(self.scores) if j}
        return means | {"ece": _plain(calibration_error(bins_C3))}

    def _row(self, kind: str, horizon: int, points: list[int]) -> dict[str, Any]:
        bins_C3 = self.bins_GPHC3[:, points, horizon - 1].sum((0, 1))
        cells, mass, used = bins_C3.unbind(-1)
        reliability = {
            "cells": [int(value) for value in cells.tolist()],
            "mean_p": [_plain(value) for value in mass / cells],
            "used": [_plain(value) for value in used / cells],
        }
        means = self._means(self.sums_GPHJ[:, points, horizon - 1].sum((0, 1)), bins_C3)
        return means | {"reliability": reliability}

    def compute(self) -> dict[str, dict[int, dict[str, Any]]]:
        """``{kind: {horizon: row}}``; a row has ``n``, the scores, ``ece`` and ``reliability`` (columns per
        bin).

        Only kinds and horizons with at least one event appear. ``None`` stands for "undefined" (no such
        cell).
        """
        result: dict[str, dict[int, dict[str, Any]]] = {}
        for kind, horizon, points in self._slices():
            result.setdefault(kind, {})[horizon] = self._row(kind, horizon, points)
        return result


class RoutingMetrics(CalibrationMetrics):
    """All scores of a forecast (definitions: :mod:`specgate.metrics.functional`).

    Arguments as the parent's. A histogram with 50 times as many bins gives precision and recall against the
    threshold. A row of :meth:`compute` has, besides the parent's, every score, ``mean_accuracy``,
    ``ece_equal_mass``, ``precision_at_half``, ``recall_at_half``, ``thresholds`` (columns per threshold),
    ``per_layer`` (columns, one entry per source point with events: ``source_layer``, -1 before the first;
    ``target_layer``; the scores) and ``per_domain`` (scores by the domain's name).
    """

    scores: ClassVar[tuple[str, ...]] = SCORES
    fine: ClassVar[int] = FINE_PER_BIN
    fine_PHF3: Tensor

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        horizons: int,
        domains: Sequence[str] = ("all",),
        bins: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(layers, experts, top_k, horizons, domains, bins, **kwargs)
        shape = (layers + 1, horizons, bins * self.fine, 3)
        self.add_state("fine_PHF3", torch.zeros(shape, dtype=torch.float64), "sum")

    def _add_bins(self, bins_GPHF3: Tensor, domains: Tensor) -> None:
        self.fine_PHF3 += bins_GPHF3.sum(0)
        super()._add_bins(bins_GPHF3.unflatten(-2, (self.bins, self.fine)).sum(-2), domains)

    def _means(self, sums_J: Tensor, bins_C3: Tensor) -> dict[str, Any]:
        means = super()._means(sums_J, bins_C3)
        return means | {"mean_accuracy": means["recall_at_k"]}

    def _row(self, kind: str, horizon: int, points: list[int]) -> dict[str, Any]:
        sums_GPJ = self.sums_GPHJ[:, points, horizon - 1]
        bins_GPC3 = self.bins_GPHC3[:, points, horizon - 1]
        fine_F3 = self.fine_PHF3[points, horizon - 1].sum(0)
        curve = threshold_curve(fine_F3, THRESHOLDS)
        layers = [
            self._target(point, horizon, kind) | self._means(sums_GPJ[:, i].sum(0), bins_GPC3[:, i].sum(0))
            for i, point in enumerate(points)
            if float(sums_GPJ[:, i, 0].sum()) > 0
        ]
        domains = {
            name: self._means(sums_GPJ[g].sum(0), bins_GPC3[g].sum(0))
            for g, name in enumerate(self.domains)
            if float(sums_GPJ[g, :, 0].sum()) > 0
        }
        return super()._row(kind, horizon, points) | {
            "ece_equal_mass": _plain(equal_mass_error(fine_F3, self.bins)),
            "precision_at_half": _plain(curve["precision"][THRESHOLDS // 2]),
            "recall_at_half": _plain(curve["recall"][THRESHOLDS // 2]),
            "thresholds": {name: [_plain(value) for value in values] for name, values in curve.items()},
            "per_layer": {name: [layer[name] for layer in layers] for name in layers[0]},
            "per_domain": domains,
        }

    def _target(self, point: int, horizon: int, kind: str) -> dict[str, Any]:
        """What a source point sees from which layer: -1 stands for "before the first MoE layer"."""
        target = point - 1 + horizon
        return {"source_layer": point - 1, "target_layer": target - self.layers * (kind == KINDS[WRAPPED])}

    def recall(self, kind: int = WITHIN) -> Tensor:
        """Mean recall@K per horizon of one kind, ``[H]`` float64 (NaN without events); cheap to log."""
        sums_PHJ = self.sums_GPHJ.sum(0) * (self.kind_PH == kind)[..., None]
        return sums_PHJ[..., SCORES.index("recall_at_k")].sum(0) / sums_PHJ[..., 0].sum(0)
