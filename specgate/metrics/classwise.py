"""Calibration in detail: of each expert on its own (classwise), and of each domain.

Letters: P source points, H horizons, E experts per layer, K experts per token, M events, G domains, J scores,
C calibration bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specgate.metrics.functional import calibration_error
from specgate.metrics.routing import CalibrationMetrics


class DetailedCalibration(CalibrationMetrics):
    """:class:`CalibrationMetrics` with Brier score and recall, and the error per expert and per domain.

    A row of :meth:`compute` has, besides the parent's, ``brier``, ``recall_at_k``, ``mean_accuracy`` (the
    same), ``ece_classwise`` and ``per_domain`` (the scores and ``ece`` by the domain's name).

    Every ``ece`` comes with ``ece_noise``, see :func:`noise_error`.

    ``ece_classwise`` (Kull et al., arXiv:1910.12656): the calibration error of every expert of every target
    layer by itself, averaged. Errors that cancel between experts count here; so does the noise of few cells
    per bin, which makes it larger than ``ece`` even for perfect probabilities.
    """

    scores: ClassVar[tuple[str, ...]] = ("n", "recall_at_k", "brier", "nll", "mean_confidence")
    class_PHEC3: Tensor

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
        shape = (layers + 1, horizons, experts, bins, 3)
        self.add_state("class_PHEC3", torch.zeros(shape, dtype=torch.float64), "sum")

    def _add(self, p_ME: Tensor, used_MK: Tensor, pair_M: Tensor, domain_M: Tensor, domains: Tensor) -> None:
        super()._add(p_ME, used_MK, pair_M, domain_M, domains)
        bin_ME = (p_ME * self.bins).int().clamp_(0, self.bins - 1)
        expert_E = torch.arange(self.experts, device=p_ME.device)
        cell_ME = (pair_M[:, None] * self.experts + expert_E) * self.bins + bin_ME
        flat, size = cell_ME.flatten(), self.class_PHEC3[..., 0].numel()
        ones = torch.ones_like(flat, dtype=torch.float64)
        used = cell_ME.gather(1, used_MK).flatten()
        sums_N3 = torch.zeros(size, 3, dtype=torch.float64, device=p_ME.device)
        sums_N3[:, 0].index_add_(0, flat, ones)
        sums_N3[:, 1].index_add_(0, flat, p_ME.flatten().double())
        sums_N3[:, 2].index_add_(0, used, ones[: len(used)])
        self.class_PHEC3 += sums_N3.view_as(self.class_PHEC3)

    def _means(self, sums_J: Tensor, bins_C3: Tensor) -> dict[str, Any]:
        return super()._means(sums_J, bins_C3) | {"ece_noise": round(float(noise_error(bins_C3)), 6)}

    def _row(self, kind: str, horizon: int, points: list[int]) -> dict[str, Any]:
        row = super()._row(kind, horizon, points)
        of_expert = calibration_error(self.class_PHEC3[points, horizon - 1])
        domains = {
            name: self._means(
                self.sums_GPHJ[g, points, horizon - 1].sum(0), self.bins_GPHC3[g, points, horizon - 1].sum(0)
            )
            for g, name in enumerate(self.domains)
            if float(self.sums_GPHJ[g, points, horizon - 1, 0].sum()) > 0
        }
        return row | {
            "mean_accuracy": row["recall_at_k"],
            "ece_classwise": round(float(of_expert.nanmean()), 6),
            "per_domain": domains,
        }


def noise_error(bins_C3: Tensor) -> Tensor:
    """The calibration error to expect of perfectly honest probabilities on so few cells, if these were
    independent: sum over bins of sqrt(2 / pi) x the standard deviation of the uses, over all cells.

    Shapes:
        bins_C3: ``[..., C, 3]`` from ``calibration_bins``; any leading dimensions are kept.
    """
    cells, mass, _ = bins_C3.unbind(-1)
    mean = mass / cells.clamp(min=1)
    spread = (cells * mean * (1 - mean)).clamp(min=0).sqrt()
    return math.sqrt(2 / math.pi) * spread.sum(-1) / cells.sum(-1)
