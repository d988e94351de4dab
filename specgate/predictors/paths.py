"""Routing paths: sets of experts of several layers in a row, their joint probability, and whether a path was
right.

Letters: N states, W paths kept per state (beams), H horizons, E experts, K experts per token, C candidate
experts, S sets of K candidates.

K = 1: a set is one expert, its probability the softmax's. K > 1: experts enter independently with their
sigmoids' probabilities, given that exactly K do (the conditional Poisson design: Chen, Dempster and Liu,
"Weighted finite population sampling to maximize entropy", Biometrika 81, 1994): the probability of a set is
the product of its experts' odds over the sum of those products over all sets of K.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from specgate.errors import ConfigError

MAX_SETS = 20_000
"""More sets of candidates than this per step are refused."""


@dataclass(frozen=True)
class PathForecast:
    """The most probable routing paths from one point, best first.

    Shapes:
        experts_BWHK: int64, the experts of each step, ascending. log_p_BW: float32, joint log-probability of
            the whole path (natural logarithm). target_layer_H: int64. next_token_H: bool.
    """

    experts_BWHK: Tensor
    log_p_BW: Tensor
    target_layer_H: Tensor
    next_token_H: Tensor
    source_layer: int


@lru_cache(maxsize=32)
def _combinations(candidates: int, top_k: int) -> Tensor:
    return torch.tensor(list(itertools.combinations(range(candidates), top_k)), dtype=torch.int64)


def candidate_sets(candidates: int, top_k: int) -> Tensor:
    """All sets of K of C candidates: ``[S, K]`` int64, S = C over K.

    Raises:
        ConfigError: for fewer candidates than K, or more sets than :data:`MAX_SETS`.
    """
    if candidates < top_k:
        raise ConfigError(
            f"candidates={candidates} cannot fill a set of {top_k} experts: take at least {top_k}"
        )
    if math.comb(candidates, top_k) > MAX_SETS:
        raise ConfigError(
            f"candidates={candidates} make {math.comb(candidates, top_k)} sets of {top_k} experts, above"
            f" {MAX_SETS}: take fewer"
        )
    return _combinations(candidates, top_k)


def log_normaliser(logits: Tensor, top_k: int) -> Tensor:
    """Logarithm of the sum over all sets of K experts of the product of their odds.

    The elementary symmetric polynomial of degree K, one expert after the other in O(E K). For K = 1 this is
    the softmax's log-sum-exp.

    Shapes:
        logits: ``[..., E]``; output: ``[...]``, float64 inside and float32 out.
    """
    if top_k == 1:
        return logits.float().logsumexp(-1)
    z = logits.double()
    largest = z.amax(-1, keepdim=True)
    odds = (z - largest).exp()
    sums = torch.zeros(*z.shape[:-1], top_k + 1, dtype=torch.float64, device=z.device)
    sums[..., 0] = 1.0
    for expert in range(z.shape[-1]):
        sums[..., 1:] = sums[..., 1:] + sums[..., :-1] * odds[..., expert, None]
    return (sums[..., top_k].log() + top_k * largest[..., 0]).float()


def set_log_p(logits: Tensor, experts: Tensor) -> Tensor:
    """Log-probability of sets of experts.

    Shapes:
        logits: ``[..., E]``. experts: ``[..., K]`` int64, distinct. output: ``[...]`` float32.
    """
    return logits.float().gather(-1, experts).sum(-1) - log_normaliser(logits, experts.shape[-1])


Step = Callable[[int, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""``step(h0, state, experts) -> (state, logits)``: what follows the set of the step before.

Shapes:
    state: ``[n, ...]`` or None at the first step. experts: ``[n, K]`` int64 or None. logits: ``[n, E]``; n is
    N at the first step and N * (paths kept) afterwards.
"""


@torch.no_grad()
def search_paths(step: Step, horizons: int, top_k: int, beams: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Beam search over joint paths.

    Args:
        step: see :data:`Step`. beams: paths kept. candidates: at each step the sets of K of the C most
            probable experts are tried; their probabilities are relative to all sets of all E experts.

    Shapes:
        output: experts ``[N, W, H, K]`` int64 (each set ascending) and joint log-probabilities ``[N, W]``
            float32, falling; W = min(beams, number of paths).

    Raises:
        ConfigError: for beams or candidates that make no sense.
    """
    if beams < 1:
        raise ConfigError(f"beams={beams} keeps no path: take at least 1")
    sets_SK = candidate_sets(candidates, top_k)
    state: Tensor | None = None
    last: Tensor | None = None
    paths = log_p = torch.empty(0)
    for h0 in range(horizons):
        state, logits = step(h0, state, last)
        sets_SK = sets_SK.to(logits.device)
        S = len(sets_SK)
        best = logits.float().topk(min(candidates, logits.shape[-1]), dim=-1)
        sets_nSK = best.indices[:, sets_SK].sort(-1).values
        gain_nS = best.values[:, sets_SK].sum(-1) - log_normaliser(logits, top_k)[:, None]
        if h0 == 0:
            N, kept = len(logits), 1
            paths = sets_nSK.new_zeros(N, 1, 0, top_k)
            log_p = gain_nS.new_zeros(N, 1)
        total = (log_p[..., None] + gain_nS.view(N, kept, S)).flatten(1)
        log_p, chosen = total.topk(min(beams, total.shape[1]), dim=-1)
        parent, rows = chosen // S, torch.arange(N, device=chosen.device)[:, None]
        new = sets_nSK.view(N, kept, S, top_k)[rows, parent, chosen % S]
        paths = torch.cat([paths[rows, parent], new[:, :, None]], dim=2)
        state = state.view(N, kept, *state.shape[1:])[rows, parent].flatten(0, 1)
        last, kept = new.flatten(0, 1), log_p.shape[1]
    return paths, log_p


def path_hits(paths_NWHK: Tensor, experts_NHK: Tensor) -> Tensor:
    """Which of the paths is the one taken, in all its experts at all its steps: ``[N, W]`` bool (order within
    a set does not count)."""
    taken_N1HK = experts_NHK.sort(-1).values[:, None]
    return (paths_NWHK.sort(-1).values == taken_N1HK).flatten(2).all(-1)


def joint_hit_rates(paths_NWHK: Tensor, experts_NHK: Tensor, widths: tuple[int, ...]) -> dict[int, float]:
    """Share of states whose taken path is among the first b paths, for each b of ``widths``."""
    hit_NW = path_hits(paths_NWHK, experts_NHK).double()
    return {b: float(hit_NW[:, :b].amax(1).mean()) for b in widths}
