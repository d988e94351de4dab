"""Isotonic calibration: the best monotone map from a forecast's probability to the share used.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, Q kinds
of target (within, wrapped, entry), M events and N cells kept for fitting, G groups of cells, I knots.

Zadrozny & Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates" (KDD 2002):
pool adjacent violators on (marginal probability, used) pairs of all experts; for K = 1 the mapped
probabilities of an event are divided by their sum. A checkpoint must hold tensors of fixed size, so the pairs
are first put into at most I groups of neighbours (exactly the pairs themselves if these have no more than I
different values), and the map is linear between the groups, in log-odds on both sides.

The plain isotonic map is flat in pieces and would tie experts that the predictor tells apart. A thousandth of
the bare log-odds is mixed in, so that the map is strictly increasing and the ranking stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgate.calibration.base import Calibrator, Reservoir
from specgate.traces.batch import KINDS

KNOTS = 128
SLOPE = 1e-3
"""Share of the bare log-odds in the result; also its slope beyond the first and last knot."""
_LIMIT = 30.0
Float = NDArray[np.float64]


class IsotonicCalibration(Calibrator):
    """A monotone map of the log-odds per kind and horizon; the bare link until :meth:`fit` was called.

    Args:
        horizons: number of horizons H.
        link: ``"softmax"`` (K = 1) or ``"sigmoid"`` (K > 1).
        knots: I, the size of the map.

    Buffers (kept in the checkpoint): ``knot_QHI`` (log-odds forecast, increasing), ``value_QHI`` (log-odds
    given), ``events_QH``.
    """

    name = "isotonic"
    knot_QHI: Tensor
    value_QHI: Tensor

    def __init__(
        self, horizons: int, link: str, points: int = 0, experts: int = 0, knots: int = KNOTS
    ) -> None:
        super().__init__(horizons, link, points, experts)
        line_I = torch.linspace(-_LIMIT, _LIMIT, knots).expand(len(KINDS), horizons, knots)
        self.register_buffer("knot_QHI", line_I.clone())
        self.register_buffer("value_QHI", line_I.clone())
        self.register_buffer("events_QH", torch.zeros(len(KINDS), horizons, dtype=torch.int64))

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], horizons: int, link: str, points: int, experts: int
    ) -> Calibrator:
        """An unfitted map with as many knots as the state has."""
        return cls(horizons, link, points, experts, knots=state["knot_QHI"].shape[-1])

    def forward(self, logits_BTPHE: Tensor, kind_PH: Tensor) -> Tensor:
        """Probabilities, see :meth:`Calibrator.forward`."""
        kind_PH, horizon_H = self._pair_PH(kind_PH)
        odds = log_odds(logits_BTPHE, self.link)
        odds_PHN = odds.movedim((-3, -2), (0, 1)).contiguous()
        shape = odds_PHN.shape
        mapped_PHN = interpolate(
            odds_PHN.flatten(2), self.knot_QHI[kind_PH, horizon_H], self.value_QHI[kind_PH, horizon_H]
        )
        p = mapped_PHN.view(shape).movedim((0, 1), (-3, -2)).sigmoid()
        return p / p.sum(-1, keepdim=True) if self.link == "softmax" else p

    def _fit_pair(self, kind: int, h0: int, samples: Mapping[int, Reservoir]) -> dict[str, Any]:
        logits_ME, used_MK = samples[-1].logits_ME, samples[-1].used_MK
        odds_ME = log_odds(logits_ME, self.link)
        used_ME = torch.zeros_like(odds_ME).scatter_(1, used_MK, 1.0)
        odds_G, share_G, cells_G = group(
            odds_ME.flatten().double().numpy(), used_ME.flatten().double().numpy(), self.knot_QHI.shape[-1]
        )
        level_G = pool_adjacent_violators(share_G, cells_G)
        knot_I, value_I = self._knots(odds_G, level_G, float(cells_G.sum()))
        self.knot_QHI[kind, h0] = torch.from_numpy(knot_I).float()
        self.value_QHI[kind, h0] = torch.from_numpy(value_I).float()
        curve = (self.knot_QHI[kind, h0][None, None], self.value_QHI[kind, h0][None, None])
        mapped_ME = interpolate(odds_ME.flatten()[None, None], *curve).view_as(odds_ME)
        # softmax of ln p is p / sum p: what forward gives for K = 1
        after_ME = torch.nn.functional.logsigmoid(mapped_ME) if self.link == "softmax" else mapped_ME
        return {
            "blocks": len(np.unique(level_G)),
            "nll_before": round(float(self.nll(logits_ME.double(), used_MK)), 6),
            "nll_after": round(float(self.nll(after_ME.double(), used_MK)), 6),
        }

    def _knots(self, odds_G: Float, level_G: Float, cells: float) -> tuple[Float, Float]:
        """I knots: the groups, and beyond the last one as many as are missing, of slope :data:`SLOPE`."""
        least = 0.5 / (cells + 1)  # no share of zero or one: half an observation
        level_G = np.clip(level_G, least, 1 - least)
        value_G = (1 - SLOPE) * (np.log(level_G) - np.log1p(-level_G)) + SLOPE * odds_G
        missing = np.arange(1.0, self.knot_QHI.shape[-1] - len(odds_G) + 1)
        return np.append(odds_G, odds_G[-1] + missing), np.append(value_G, value_G[-1] + SLOPE * missing)


def log_odds(logits: Tensor, link: str) -> Tensor:
    """Log-odds of the marginal probability of each expert, float32 within ±30: the logit itself for
    sigmoid.
    """
    logits = logits.float()
    if link == "softmax":
        ln_p = logits.log_softmax(-1)
        logits = ln_p - torch.log1p(-ln_p.exp()).clamp(min=-_LIMIT)
    return logits.clamp(-_LIMIT, _LIMIT)


def interpolate(x_PHN: Tensor, knot_PHI: Tensor, value_PHI: Tensor) -> Tensor:
    """Piecewise linear through the knots of each (point, horizon); slope :data:`SLOPE` beyond them.

    Shapes:
        x_PHN: ``[P, H, N]``; knot_PHI: ``[P, H, I]``, increasing; value_PHI: the same.
    """
    inner_PHN = x_PHN.clamp(knot_PHI[..., :1], knot_PHI[..., -1:])
    right_PHN = torch.searchsorted(knot_PHI.contiguous(), inner_PHN).clamp_(1, knot_PHI.shape[-1] - 1)
    x0, x1 = knot_PHI.gather(-1, right_PHN - 1), knot_PHI.gather(-1, right_PHN)
    y0, y1 = value_PHI.gather(-1, right_PHN - 1), value_PHI.gather(-1, right_PHN)
    share_PHN = (inner_PHN - x0) / (x1 - x0).clamp(min=1e-12)
    return y0 + (y1 - y0) * share_PHN + SLOPE * (x_PHN - inner_PHN)


def group(x_N: Float, y_N: Float, most: int) -> tuple[Float, Float, Float]:
    """At most ``most`` groups of neighbours in x: x of the mean probability, mean y, number of cells of each.

    Half of the resolution goes to where the cells are, half to where the used ones are (most probabilities
    are small, the large ones matter). Equal x stay together.
    """
    value_U, first_N, count_U = np.unique(x_N, return_inverse=True, return_counts=True)
    used_U = np.bincount(first_N, weights=y_N)
    # Neighbours that float32 (in which knots are kept) cannot tell apart are one.
    value_U, merged_U = np.unique(value_U.astype(np.float32), return_inverse=True)
    used_U, count_U = np.bincount(merged_U, weights=used_U), np.bincount(merged_U, weights=count_U)
    group_U = np.arange(len(value_U))
    if len(value_U) > most:
        mass_U = count_U / count_U.sum() + used_U / max(used_U.sum(), 1.0)
        before_U = np.cumsum(mass_U) - mass_U
        group_U = np.minimum((before_U / mass_U.sum() * most).astype(np.int64), most - 1)
        group_U = np.unique(group_U, return_inverse=True)[1]
    cells_G = np.bincount(group_U, weights=count_U).astype(np.float64)
    p_G = np.bincount(group_U, weights=count_U / (1 + np.exp(-value_U.astype(np.float64)))) / cells_G
    return np.log(p_G) - np.log1p(-p_G), np.bincount(group_U, weights=used_U) / cells_G, cells_G


def pool_adjacent_violators(y_G: Float, weight_G: Float) -> Float:
    """The non-decreasing sequence nearest to ``y_G`` in weighted squares, ``[G]`` (Ayer et al. 1955)."""
    means: list[float] = []
    weights: list[float] = []
    counts: list[int] = []
    for y, weight in zip(y_G.tolist(), weight_G.tolist(), strict=True):
        means.append(y)
        weights.append(weight)
        counts.append(1)
        while len(means) > 1 and means[-2] >= means[-1]:
            y1, w1, c1 = means.pop(), weights.pop(), counts.pop()
            total = weights[-1] + w1
            means[-1] = (means[-1] * weights[-1] + y1 * w1) / total
            weights[-1], counts[-1] = total, counts[-1] + c1
    return np.repeat(np.array(means), counts)
