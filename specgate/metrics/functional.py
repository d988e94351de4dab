"""Scores of a forecast against what was routed, as pure functions.

Letters: M events, E experts per layer, K experts per token, R ranks, G groups of events, C calibration bins.

An *event* is one forecast: a source point of one token and one horizon, that is, E probabilities of which K
turned out to be used. A *cell* is one (event, expert) pair: a probability and whether the expert was used.
Cell accuracy is deliberately absent: with K of E experts used, "none is used" is right in (E - K) / E of all
cells.

Definitions, per event, averaged over events:

- ``recall_at_k``: share of the K used experts among the K most probable ones.
- ``recall_at_2k``: share of the K used experts among the 2K most probable ones (all experts if 2K > E).
- ``exact_set``: 1 if the K most probable experts are exactly the K used ones.
- ``top1``: 1 if the most probable expert is the host's rank-1 expert (its heaviest).
- ``brier``: mean over the E experts of (p - used)^2.
- ``nll``: for K = 1, -ln p of the used expert (categorical); for K > 1, the mean over the E experts of the
  binary negative log-likelihood -ln p if used, else -ln(1 - p). Probabilities are clamped to
  [1e-7, 1 - 1e-7].
- ``mean_confidence``: mean p of the K most probable experts. The matching accuracy, the share of those K
  experts that was used, equals ``recall_at_k`` because as many are predicted as are used.

Equal probabilities are ranked by the expert's id, the lower first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SCORES = ("n", "recall_at_k", "recall_at_2k", "exact_set", "top1", "brier", "nll", "mean_confidence")
"""Columns of :func:`event_scores`; ``n`` is 1 for every event."""

_CLAMP = 1e-7
_RANKED = {"recall_at_k", "recall_at_2k", "exact_set", "top1"}


def event_scores(p_ME: Tensor, used_MK: Tensor, names: Sequence[str] = SCORES) -> Tensor:
    """Score each event on its own.

    Args:
        p_ME: float32 probabilities in [0, 1] that each expert is used.
        used_MK: int64 ids of the distinct experts that were used, in rank order.
        names: which scores, of :data:`SCORES`.

    Returns:
        ``[M, len(names)]`` float64, columns in the order of ``names``.
    """
    experts, top_k = p_ME.shape[-1], used_MK.shape[-1]
    p_used_MK = p_ME.gather(1, used_MK)
    columns = {"n": torch.ones(len(p_ME), dtype=torch.float64, device=p_ME.device)}
    if _RANKED & set(names):
        columns |= _ranked_scores(p_ME, used_MK, p_used_MK)
    elif "mean_confidence" in names:
        columns["mean_confidence"] = _largest(p_ME, top_k).double().mean(1)
    # Sums over the E experts of one event in float32: off by 1e-7 of their value; all that is added up over
    # events is float64.
    if "brier" in names:
        squares_M = torch.linalg.vector_norm(p_ME, dim=1).double().square()
        columns["brier"] = (squares_M + (1 - 2 * p_used_MK.double()).sum(1)) / experts
    if "nll" in names:
        ln_used_M = p_used_MK.double().clamp(_CLAMP, 1 - _CLAMP).log().sum(1)
        if top_k == 1:
            columns["nll"] = -ln_used_M
        else:
            # Every cell counted as unused, then the used ones corrected: no [M, E] indicator is built.
            ln_unused_ME = p_ME.clamp(_CLAMP, 1 - _CLAMP).neg_().log1p_()
            corrected_M = ln_used_M - ln_unused_ME.gather(1, used_MK).sum(1, dtype=torch.float64)
            columns["nll"] = -(ln_unused_ME.sum(1).double() + corrected_M) / experts
    return torch.stack([columns[name] for name in names], dim=1)


def _largest(p_ME: Tensor, count: int) -> Tensor:
    """The ``count`` largest probabilities of each event, largest first.

    On a CPU NumPy sorts short rows with vector instructions, seven times faster than ``torch.topk`` there.
    """
    count = min(count, p_ME.shape[-1])
    if p_ME.device.type != "cpu":
        return p_ME.topk(count, dim=-1).values
    sorted_ME = np.sort(p_ME.detach().numpy(), axis=1)
    return torch.from_numpy(sorted_ME[:, : -count - 1 : -1].copy())


def _ranked_scores(p_ME: Tensor, used_MK: Tensor, p_used_MK: Tensor) -> dict[str, Tensor]:
    """The scores that rest on the order of the experts, from sorted values alone: an expert is among the K
    best if its probability is at least the K-th largest.

    That leaves open which of equally probable experts belong to the best where the border runs between them;
    such events are ranked once more, the lower id first.
    """
    experts, top_k = p_ME.shape[-1], used_MK.shape[-1]
    best_MR = _largest(p_ME, 2 * top_k + 1)
    hits, open_M = {}, torch.zeros(len(p_ME), dtype=torch.bool, device=p_ME.device)
    for name, count, candidates_MK in (
        ("first", 1, p_used_MK[:, :1]),
        ("k", top_k, p_used_MK),
        ("2k", min(2 * top_k, experts), p_used_MK),
    ):
        border_M1 = best_MR[:, count - 1 : count]
        hits[name] = candidates_MK >= border_M1
        if count < experts:
            tied_M = best_MR[:, count] == border_M1[:, 0]
            open_M |= tied_M & (candidates_MK == border_M1).any(1)
    again_M = open_M.nonzero().flatten()
    if len(again_M):
        order_ME = p_ME[again_M].sort(dim=-1, descending=True, stable=True).indices
        order_MR = order_ME[:, : 2 * top_k]
        found_MKR = used_MK[again_M][:, :, None] == order_MR[:, None, :]
        hits["first"][again_M] = found_MKR[:, :1, 0]
        hits["k"][again_M] = found_MKR[:, :, :top_k].any(-1)
        hits["2k"][again_M] = found_MKR.any(-1)
    return {
        "recall_at_k": hits["k"].double().mean(1),
        "recall_at_2k": hits["2k"].double().mean(1),
        "exact_set": hits["k"].all(1).double(),
        "top1": hits["first"][:, 0].double(),
        "mean_confidence": best_MR[:, :top_k].double().mean(1),
    }


def calibration_bins(p_ME: Tensor, used_MK: Tensor, group_M: Tensor, groups: int, bins: int) -> Tensor:
    """Histogram the cells of each group by probability, in ``bins`` bins of equal width.

    Bin c holds c / bins <= p < (c + 1) / bins; p = 1 falls in the last bin.

    Args:
        group_M: int64 in [0, groups), the group each event belongs to.

    Returns:
        ``[G, C, 3]`` float64: number of cells, sum of their probabilities, number of used cells.
    """
    p64_ME = p_ME.double()
    bin_ME = (p64_ME * bins).int().clamp_(0, bins - 1)  # int32: half the memory traffic of int64
    bin_ME += (group_M * bins).int()[:, None]
    flat, size = bin_ME.flatten(), groups * bins
    columns = (
        _count(flat, None, size),
        _count(flat, p64_ME.flatten(), size),
        _count(bin_ME.gather(1, used_MK).flatten(), None, size),
    )
    return torch.stack(columns, dim=-1).view(groups, bins, 3)


def _count(bin_N: Tensor, weight_N: Tensor | None, size: int) -> Tensor:
    """``torch.bincount`` as float64; on an accelerator without its waiting for the device."""
    if bin_N.device.type == "cpu":
        return torch.bincount(bin_N, weights=weight_N, minlength=size).double()
    total = torch.zeros(size, dtype=torch.float64, device=bin_N.device)
    weight_N = torch.ones_like(bin_N, dtype=total.dtype) if weight_N is None else weight_N
    return total.index_add_(0, bin_N, weight_N)


def calibration_error(bins_C3: Tensor) -> Tensor:
    """Expected calibration error of binned cells: sum over bins of n_c / n x |mean p - share used|.

    The forecast's *marginal* probabilities are judged: every expert's p counts, not only the most probable
    one's (multi-label, "static" calibration; the top-label ECE of Guo et al. 2017 sees one cell per event
    only).

    Shapes:
        bins_C3: ``[..., C, 3]`` from :func:`calibration_bins`; any leading dimensions are kept.

    Returns:
        float64 ``[...]``, NaN where there is no cell.
    """
    return (bins_C3[..., 1] - bins_C3[..., 2]).abs().sum(-1) / bins_C3[..., 0].sum(-1)


def equal_mass_error(fine_C3: Tensor, bins: int) -> Tensor:
    """The same error over about ``bins`` bins that hold equally many cells.

    Whole fine bins are merged, so a fine bin that alone holds more than 1 / bins of the cells stays one bin.

    Shapes:
        fine_C3: ``[C, 3]`` one group's histogram from :func:`calibration_bins` with many bins.
    """
    cells_C = fine_C3[:, 0]
    middle_C = cells_C.cumsum(0) - cells_C / 2
    total = cells_C.sum()
    merged_C = (middle_C / total.clamp(min=1) * bins).long().clamp(max=bins - 1)
    return calibration_error(torch.zeros_like(fine_C3[:bins]).index_add_(0, merged_C, fine_C3))


def threshold_curve(fine_C3: Tensor, steps: int) -> dict[str, list[float | None]]:
    """Precision and recall of "fetch every expert with p >= threshold", exact at ``steps`` thresholds.

    Args:
        fine_C3: ``[C, 3]`` histogram of one group; C must be a multiple of ``steps``.

    Returns:
        ``threshold``, ``precision`` (None where nothing is predicted), ``recall`` (None where nothing is
        used) and ``fetched`` (share of all cells predicted), each of length ``steps``, thresholds i / steps.

    Raises:
        ValueError: if the histogram's bin edges do not contain the thresholds.
    """
    count = fine_C3.shape[0]
    if count % steps:
        raise ValueError(f"{steps} thresholds do not fall on the edges of {count} bins")
    above_C3 = fine_C3.flip(0).cumsum(0).flip(0)[:: count // steps]  # cells at or above each threshold
    cells, _, used = above_C3.unbind(-1)
    all_cells, _, all_used = fine_C3.sum(0)

    def ratio(part: Tensor, whole: Tensor) -> list[float | None]:
        values = (part / whole.expand_as(part)).tolist()
        return [None if value != value else value for value in values]

    return {
        "threshold": [i / steps for i in range(steps)],
        "precision": ratio(used, cells),
        "recall": ratio(used, all_used),
        "fetched": ratio(cells, all_cells),
    }
