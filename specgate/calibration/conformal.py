"""Split-conformal prefetch sets: with a chosen probability what is used is among the experts fetched.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, Q kinds
of target (within, wrapped, entry), J modes, C coverage levels, S sizes, M events, N calibration events.

An expert is in the set if its probability reaches a threshold, found per kind and horizon on N calibration
events that the predictor was not trained on. Coverage of a level 1 - a is meant in one of two ways:

- ``all``: P(all K used experts are in the set) >= 1 - a. The conformity score of an event is the smallest
  probability among its used experts; the threshold is the floor(a (N + 1))-th smallest score (split
  conformal prediction: Vovk et al. 2005; Angelopoulos & Bates, arXiv:2107.07511).
- ``each``: E(share of the K used experts in the set) >= 1 - a: the largest threshold at which the share
  missed on calibration data, R, keeps N/(N+1) R + 1/(N+1) <= a (conformal risk control: Angelopoulos et al.,
  arXiv:2208.02814).

For K = 1 both are the same. Thresholding the probability gives the smallest sets on average of all that have
the coverage, if the probabilities are honest (Sadinle et al., arXiv:1609.00451), and that is what a
prefetcher pays for; adaptive scores (RAPS, arXiv:2009.14193) spread the coverage more evenly over easy and
hard events and pay for it with larger sets.

What the guarantee rests on: a new event is exchangeable with the calibration events. Tokens of one document
are alike, documents are not, so the guarantee holds on average over documents, and the coverage measured on a
few documents scatters more than its number of tokens suggests: :mod:`specgate.calibration.coverage` states
the interval from resampled documents. It does not survive a change of domain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specgate.calibration.base import Reservoir, Stream, slices
from specgate.errors import ConfigError
from specgate.traces.batch import INVALID, KINDS

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
MODES = ("all", "each")


@dataclass(frozen=True)
class BudgetedSets:
    """Prefetch sets that fit into a byte budget, and what they are worth.

    Shapes:
        mask_BTPHE: bool, no more than ``slots`` experts in any set.
        level_PH: float32, the level chosen for each (source point, horizon); 1 means no threshold at all.
        coverage_PH, size_PH: float32, coverage (of the mode asked for) and mean number of experts that sets
            chosen like this have on the calibration data; NaN for pairs without events.
    """

    mask_BTPHE: Tensor
    level_PH: Tensor
    coverage_PH: Tensor
    size_PH: Tensor
    slots: int


class ConformalSets(nn.Module):
    """Thresholds per mode, kind, horizon and level; until :meth:`fit` every expert is in every set.

    Args:
        horizons: number of horizons H.
        experts: experts per layer E.

    Buffers (kept in the checkpoint): ``threshold_JQHC``; ``coverage_JQHCS`` and ``size_JQHCS``, coverage and
    mean size on calibration data of sets cut to their S = 1..E most probable experts, the last level being
    "no threshold"; ``events_QH``.
    """

    threshold_JQHC: Tensor
    coverage_JQHCS: Tensor
    size_JQHCS: Tensor
    events_QH: Tensor

    def __init__(self, horizons: int, experts: int) -> None:
        super().__init__()
        self.horizons, self.experts = horizons, experts
        pairs, levels = (len(MODES), len(KINDS), horizons), len(LEVELS)
        self.register_buffer("threshold_JQHC", torch.zeros(*pairs, levels))
        self.register_buffer("coverage_JQHCS", torch.full((*pairs, levels + 1, experts), math.nan))
        self.register_buffer("size_JQHCS", torch.full((*pairs, levels + 1, experts), math.nan))
        self.register_buffer("events_QH", torch.zeros(len(KINDS), horizons, dtype=torch.int64))

    @torch.no_grad()
    def fit(
        self, stream: Stream, kind_PH: Tensor, cells: int = 400_000, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Find all thresholds.

        Args:
            stream: ``(p_BTPHE, experts_BTPHK, valid_BTPH)`` batches of probabilities on documents that the
                predictor was not trained on. Two numbers per used expert are kept of every event.
            cells: set sizes are measured on a uniform sample of at most ``cells / E`` events per kind and
                horizon (thresholds and coverage come from all events).
            seed: of that sample.

        Returns:
            One dict per kind, horizon, mode and level: these, ``events``, ``threshold`` and ``mean_size``.
        """
        found: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        samples: dict[tuple[int, int], Reservoir] = {}
        generator = torch.Generator().manual_seed(seed)
        for p_BTPHE, experts_BTPHK, valid_BTPH in stream:
            for kind, h0, points in slices(kind_PH, self.horizons):
                chosen_BTP = valid_BTPH[..., points, h0]
                if not bool(chosen_BTP.any()):
                    continue
                p_ME = p_BTPHE[..., points, h0, :][chosen_BTP].float()
                used_MK = experts_BTPHK[..., points, h0, :][chosen_BTP]
                found.setdefault((kind, h0), []).append(
                    (p_ME.gather(1, used_MK).cpu(), ranks(p_ME).gather(1, used_MK).to(torch.int16).cpu())
                )
                capacity = max(1, cells // self.experts)
                samples.setdefault((kind, h0), Reservoir(capacity, generator)).add(p_ME, used_MK)
        report = []
        for (kind, h0), parts in sorted(found.items()):
            p_MK = torch.cat([p for p, _ in parts])
            rank_MK = torch.cat([rank for _, rank in parts]).long()
            self.events_QH[kind, h0] = len(p_MK)
            for j, mode in enumerate(MODES):
                threshold_C = torch.tensor([threshold(p_MK, level, mode) for level in LEVELS])
                self.threshold_JQHC[j, kind, h0] = threshold_C
                for c, limit in enumerate([*threshold_C.tolist(), 0.0]):
                    self.coverage_JQHCS[j, kind, h0, c] = covered_by_size(
                        p_MK >= limit, rank_MK, self.experts, mode
                    )
                    size_M = (samples[kind, h0].logits_ME >= limit).sum(1)
                    self.size_JQHCS[j, kind, h0, c] = mean_cut_size(size_M, self.experts)
                sizes_C = self.size_JQHCS[j, kind, h0, :-1, -1].tolist()
                report += [
                    {
                        "kind": KINDS[kind],
                        "horizon": h0 + 1,
                        "mode": mode,
                        "level": level,
                        "events": len(p_MK),
                        "threshold": round(limit, 8),
                        "mean_size": round(size, 4),
                    }
                    for level, limit, size in zip(LEVELS, threshold_C.tolist(), sizes_C, strict=True)
                ]
        return report

    def sets(self, p_BTPHE: Tensor, kind_PH: Tensor, level: float, mode: str = "all") -> Tensor:
        """The prefetch sets of a level: bool ``[..., P, H, E]``; empty where there is nothing to foresee.

        Args:
            p_BTPHE: probabilities of the calibrator that the thresholds were fitted with.
            level: one of :data:`LEVELS`, e.g. 0.9.
            mode: ``all`` or ``each``.

        Raises:
            ConfigError: for a level or mode that has no thresholds.
        """
        kind_PH, horizon_H = self._pair_PH(kind_PH)
        limit_PH = self.threshold_JQHC[_mode(mode), kind_PH.clamp(min=0), horizon_H, _level(level)]
        return (p_BTPHE >= limit_PH[..., None]) & (kind_PH != INVALID)[..., None]

    def within_budget(
        self,
        p_BTPHE: Tensor,
        kind_PH: Tensor,
        budget_bytes: int,
        bytes_per_expert: int,
        mode: str = "all",
        fill: bool = False,
        rank_BTPHE: Tensor | None = None,
    ) -> BudgetedSets:
        """Sets of at most ``budget_bytes`` each, of the largest coverage that fits.

        The level is the largest whose sets fit on average (over calibration data); a set that is larger than
        the budget is cut to its most probable experts. With ``fill`` every set is filled up to the budget
        with the next most probable experts instead: more coverage, and every byte is always spent.

        Args:
            budget_bytes: for the experts of one target layer.
            bytes_per_expert: size of one expert.
            mode: what coverage means, ``all`` or ``each``.
            rank_BTPHE: what :func:`ranks` gives for ``p_BTPHE``, if that is known already.

        Raises:
            ConfigError: if a size makes no sense, or for an unknown mode.
        """
        if bytes_per_expert < 1 or budget_bytes < 0:
            raise ConfigError(
                f"a budget of {budget_bytes} bytes for experts of {bytes_per_expert} bytes makes no sense: "
                "give the size of one expert and a budget of 0 or more"
            )
        kind_PH, horizon_H = self._pair_PH(kind_PH)
        slots, j = min(budget_bytes // bytes_per_expert, self.experts), _mode(mode)
        size_PHCS = self.size_JQHCS[j, kind_PH.clamp(min=0), horizon_H]
        coverage_PHCS = self.coverage_JQHCS[j, kind_PH.clamp(min=0), horizon_H]
        last = len(LEVELS)
        if fill:
            choice_PH = torch.full_like(kind_PH, last)
        else:
            fits_PHC = size_PHCS[..., -1] * bytes_per_expert <= budget_bytes
            number_C = torch.arange(last + 1, device=kind_PH.device)
            choice_PH = (fits_PHC * number_C).amax(-1)
        limits_PHC = self.threshold_JQHC[j, kind_PH.clamp(min=0), horizon_H]
        limits_PHC = torch.cat([limits_PHC, torch.zeros_like(limits_PHC[..., :1])], -1)
        limit_PH1 = limits_PHC.gather(-1, choice_PH[..., None])
        mask = (
            (p_BTPHE >= limit_PH1)
            & ((ranks(p_BTPHE) if rank_BTPHE is None else rank_BTPHE) < slots)
            & (kind_PH != INVALID)[..., None]
        )
        level_C = torch.tensor([*LEVELS, 1.0], device=kind_PH.device)
        if slots == 0:
            zero_PH = torch.zeros_like(limit_PH1[..., 0])
            return BudgetedSets(mask, level_C[choice_PH], zero_PH, zero_PH, slots)
        pick = choice_PH[..., None, None].expand(*choice_PH.shape, 1, self.experts)
        coverage_PH = coverage_PHCS.gather(-2, pick)[..., 0, slots - 1]
        size_PH = size_PHCS.gather(-2, pick)[..., 0, slots - 1]
        return BudgetedSets(mask, level_C[choice_PH], coverage_PH, size_PH, slots)

    def _pair_PH(self, kind_PH: Tensor) -> tuple[Tensor, Tensor]:
        place = self.events_QH.device
        return kind_PH.to(place), torch.arange(self.horizons, device=place)


def threshold(p_MK: Tensor, level: float, mode: str) -> float:
    """The largest threshold on p that keeps the level's coverage; 0, everything, if N events cannot give it.

    Shapes:
        p_MK: float32 probabilities of the experts used in N = M calibration events.
    """
    events, top_k = p_MK.shape
    allowed = (1 - level) * (events + 1) + 1e-9  # 0.1 is a little less than a tenth
    if allowed < 1:
        return 0.0
    if mode == "all":
        return float(p_MK.amin(1).kthvalue(int(allowed)).values)
    missed = int(top_k * (allowed - 1) + 1e-9)  # so many of the N K used experts may lie below
    return float(p_MK.flatten().kthvalue(missed + 1).values)


def ranks(p: Tensor) -> Tensor:
    """Place of every expert by probability, 0 for the most probable; equal ones in the order of their ids."""
    order = p.argsort(stable=True, dim=-1, descending=True)
    place = torch.arange(p.shape[-1], device=p.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


def covered_by_size(in_MK: Tensor, rank_MK: Tensor, experts: int, mode: str) -> Tensor:
    """Coverage of sets cut to their 1..E most probable experts, ``[S]``.

    Shapes:
        in_MK: whether each used expert is in the uncut set; rank_MK: its place by probability.
    """
    if mode == "all":
        in_MK, rank_MK = in_MK.all(1, keepdim=True), rank_MK.amax(1, keepdim=True)
    found_S = torch.bincount(rank_MK[in_MK], minlength=experts)
    return (found_S.cumsum(0) / in_MK.numel()).float()


def mean_cut_size(size_M: Tensor, experts: int) -> Tensor:
    """Mean of min(size, S) for S = 1..E, ``[S]``."""
    larger_S = len(size_M) - torch.bincount(size_M, minlength=experts + 1).cumsum(0)[:experts]
    return (larger_S.cumsum(0) / len(size_M)).float()


def levels_named(levels: Iterator[float] | tuple[float, ...]) -> list[int]:
    """Indices of levels in :data:`LEVELS`.

    Raises:
        ConfigError: for a level that has no thresholds.
    """
    return [_level(level) for level in levels]


def _level(level: float) -> int:
    near = [i for i, known in enumerate(LEVELS) if abs(known - level) < 1e-6]
    if not near:
        known = ", ".join(map(str, LEVELS))
        raise ConfigError(f"level {level} has no conformal threshold: choose one of {known}")
    return near[0]


def _mode(mode: str) -> int:
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} of conformal sets is unknown: choose one of {', '.join(MODES)}")
    return MODES.index(mode)
