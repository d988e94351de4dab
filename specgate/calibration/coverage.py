"""How often conformal sets cover what was used, per document: events of one document are not independent.

Letters: B sequences, P source points, H horizons, E experts per layer, K experts per token, Q kinds of
target, J modes, C coverage levels, M events, D documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgate.calibration.base import slices
from specgate.calibration.conformal import MODES, ConformalSets, levels_named, ranks
from specgate.traces.batch import KINDS, WITHIN

Float = NDArray[np.float64]
NAMED = (0.8, 0.9, 0.95)


class CoverageByDocument:
    """Sums of coverage and set size per document, for any number of batches.

    Args:
        sets: fitted thresholds.
        documents: how many documents ``document_B`` counts.
        levels: the levels to look at.
    """

    def __init__(self, sets: ConformalSets, documents: int, levels: Sequence[float] = NAMED) -> None:
        self.sets, self.levels = sets, tuple(levels)
        self.limits_JQHC = sets.threshold_JQHC[..., levels_named(self.levels)]
        shape = (documents, len(MODES), len(KINDS), sets.horizons, len(self.levels), 2)
        self.sums_DJQHC2 = torch.zeros(shape, dtype=torch.float64)
        self.events_DQH = torch.zeros(documents, len(KINDS), sets.horizons, dtype=torch.float64)
        self.domain_D = torch.full((documents,), -1, dtype=torch.int64)

    @torch.no_grad()
    def update(
        self,
        p_BTPHE: Tensor,
        experts_BTPHK: Tensor,
        valid_BTPH: Tensor,
        kind_PH: Tensor,
        document_B: Tensor,
        domain_B: Tensor | None = None,
    ) -> None:
        """Add one batch (see ``specgate.traces.batch.targets``); domains only matter to ``same_mix``."""
        if domain_B is not None:
            self.domain_D[document_B.cpu()] = domain_B.cpu()
        for kind, h0, points in slices(kind_PH, self.sets.horizons):
            chosen_BTP = valid_BTPH[..., points, h0]
            if not bool(chosen_BTP.any()):
                continue
            p_ME = p_BTPHE[..., points, h0, :][chosen_BTP]
            p_MK = p_ME.gather(1, experts_BTPHK[..., points, h0, :][chosen_BTP])
            document_M = document_B[:, None, None].expand_as(chosen_BTP)[chosen_BTP].cpu()
            self.events_DQH[:, kind, h0] += torch.bincount(document_M, minlength=len(self.events_DQH))
            for j, mode in enumerate(MODES):
                for c in range(len(self.levels)):
                    limit = self.limits_JQHC[j, kind, h0, c]
                    in_MK = p_MK >= limit
                    covered_M = in_MK.all(1).double() if mode == "all" else in_MK.double().mean(1)
                    two_M2 = torch.stack([covered_M, (p_ME >= limit).sum(1).double()], 1).cpu()
                    self.sums_DJQHC2[:, j, kind, h0, c].index_add_(0, document_M, two_M2)

    def rows(
        self, resamples: int = 1000, seed: int = 0, fitted: CoverageByDocument | None = None
    ) -> list[dict[str, Any]]:
        """One dict per mode, kind, horizon and level: ``n``, ``documents``, ``coverage``, ``low``, ``high``
        (95 % interval from resampled documents), ``gap`` (coverage - level) and ``mean_size``.

        Args:
            fitted: the same sets' coverage of the documents that they were fitted on. The thresholds depend
                on which documents these were as much as the coverage depends on which are scored; with it
                rows have ``gap_low`` and ``gap_high``, an interval of the gap from resampled documents of
                both, ``fit_documents``, and, if domains are known, ``same_mix``: coverage with every domain
                weighing as much as it did among the documents fitted on.
        """
        found = []
        for j, mode in enumerate(MODES):
            for q, kind in KINDS.items():
                for h0 in range(self.sets.horizons):
                    events_D = self.events_DQH[:, q, h0].numpy()
                    if not events_D.any():
                        continue
                    for c, level in enumerate(self.levels):
                        covered_D, size_D = self.sums_DJQHC2[:, j, q, h0, c].numpy().T
                        coverage = float(covered_D.sum() / events_D.sum())
                        low, high = ratio_interval(covered_D, events_D, resamples, seed)
                        row = {
                            "mode": mode,
                            "kind": kind,
                            "horizon": h0 + 1,
                            "level": level,
                            "n": int(events_D.sum()),
                            "documents": int((events_D > 0).sum()),
                            "coverage": round(coverage, 5),
                            "low": round(low, 5),
                            "high": round(high, 5),
                            "gap": round(coverage - level, 5),
                            "mean_size": round(float(size_D.sum() / events_D.sum()), 4),
                        }
                        if fitted is not None:
                            row |= self.against(fitted, (j, q, h0, c), level, resamples, seed)
                        found.append(row)
        return found

    def against(
        self,
        fitted: CoverageByDocument,
        place: tuple[int, int, int, int],
        level: float,
        resamples: int,
        seed: int,
    ) -> dict[str, Any]:
        """What :meth:`rows` adds with ``fitted``."""
        j, q, h0, c = place
        (part_D, whole_D), (old_part_D, old_whole_D) = (
            (x.sums_DJQHC2[:, j, q, h0, c, 0].numpy(), x.events_DQH[:, q, h0].numpy()) for x in (self, fitted)
        )
        change_R = ratios(part_D, whole_D, resamples, seed) - ratios(
            old_part_D, old_whole_D, resamples, seed + 1
        )
        usual = float(old_part_D.sum() / old_whole_D.sum()) - level  # the threshold's grid, at most ties
        low, high = np.quantile(change_R + usual, [0.025, 0.975])
        row = {
            "gap_low": round(float(low), 5),
            "gap_high": round(float(high), 5),
            "fit_documents": int((old_whole_D > 0).sum()),
        }
        domain_D, old_domain_D = self.domain_D.numpy(), fitted.domain_D.numpy()
        share = {g: old_whole_D[old_domain_D == g].sum() for g in np.unique(old_domain_D) if g >= 0}
        share = {g: n for g, n in share.items() if whole_D[domain_D == g].sum() > 0}
        if share:
            of = {g: part_D[domain_D == g].sum() / whole_D[domain_D == g].sum() for g in share}
            mixed = sum(share[g] * of[g] for g in share) / sum(share.values())
            row["same_mix"] = round(float(mixed), 5)
        return row


class BudgetCheck:
    """Coverage and size, on scored documents, of sets under byte budgets, next to what was promised."""

    def __init__(self, sets: ConformalSets, budgets: Sequence[int]) -> None:
        self.sets, self.budgets = sets, [b for b in budgets if b <= sets.experts]
        self.sums: dict[tuple[int, str, bool, int], Float] = {}
        self.promised: dict[tuple[int, str, bool, int], tuple[float, float]] = {}

    def update(self, p_BTPHE: Tensor, experts_BTPHK: Tensor, valid_BTPH: Tensor, kind_PH: Tensor) -> None:
        """Add one batch; only targets within the token are looked at."""
        within_PH, rank_BTPHE = kind_PH == WITHIN, ranks(p_BTPHE)
        for budget in self.budgets:
            for mode in MODES:
                for fill in (False, True):
                    found = self.sets.within_budget(p_BTPHE, kind_PH, budget, 1, mode, fill, rank_BTPHE)
                    in_BTPHK = found.mask_BTPHE.gather(-1, experts_BTPHK)
                    hit_BTPH = in_BTPHK.all(-1).double() if mode == "all" else in_BTPHK.double().mean(-1)
                    size_BTPH = found.mask_BTPHE.sum(-1)
                    for h0 in range(kind_PH.shape[1]):
                        points = within_PH[:, h0].nonzero().flatten().tolist()
                        ok = valid_BTPH[..., points, h0]
                        if not points or not bool(ok.any()):
                            continue
                        key = (budget, mode, fill, h0 + 1)
                        size = size_BTPH[..., points, h0][ok]
                        sums = [
                            float(hit_BTPH[..., points, h0][ok].sum()),
                            float(size.sum()),
                            float(ok.sum()),
                        ]
                        old = self.sums.get(key, np.zeros(4))
                        self.sums[key] = np.array([*(old[:3] + sums), max(old[3], int(size.max()))])
                        level = float(found.level_PH[points[0], h0])
                        self.promised[key] = (level, float(found.coverage_PH[points[0], h0]))

    def rows(self) -> list[dict[str, Any]]:
        """One dict per budget, mode, filled or not, and horizon."""
        return [
            {
                "budget": budget,
                "mode": mode,
                "fill": fill,
                "horizon": horizon,
                "level": round(self.promised[key][0], 4),
                "promised": round(self.promised[key][1], 5),
                "coverage": round(hit / n, 5),
                "mean_size": round(size / n, 4),
                "largest": int(largest),
            }
            for key, (hit, size, n, largest) in self.sums.items()
            for budget, mode, fill, horizon in [key]
        ]


def ratio_interval(
    part_D: Float, whole_D: Float, resamples: int = 1000, seed: int = 0, share: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of sum(part) / sum(whole) when whole documents are drawn anew with replacement."""
    ratio_R = ratios(part_D, whole_D, resamples, seed)
    low, high = np.quantile(ratio_R, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def ratios(part_D: Float, whole_D: Float, resamples: int, seed: int) -> Float:
    """sum(part) / sum(whole) of documents drawn anew with replacement, ``[R]``."""
    there_D = whole_D > 0
    part_D, whole_D = part_D[there_D], whole_D[there_D]
    draws_RD = np.random.default_rng(seed).multinomial(
        len(part_D), np.full(len(part_D), 1 / len(part_D)), size=resamples
    )
    return np.asarray((draws_RD @ part_D) / (draws_RD @ whole_D))
