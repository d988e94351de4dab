"""How sure a set of forecasts is, what its doubt is made of, and whether that doubt finds errors and shifts.

Letters: M members of an ensemble, E experts per layer, N scored things (tokens, sequences, events).

For members m with weights w and probabilities p_m, the entropy of the averaged forecast splits in two
(Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", 2011,
arXiv:1112.5745):

    total H(sum_m w_m p_m)  =  aleatoric sum_m w_m H(p_m)  +  epistemic I(member; outcome)

Aleatoric is the doubt that every member has: more training does not remove it. Epistemic, the mutual
information between the member and what is routed, is their disagreement: large where they were not trained.
Entropies are in nats. One expert per token: that of the categorical forecast. Several: the Bernoulli
entropies of the experts, summed, which is what independent sigmoids state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

PARTS = ("total", "aleatoric", "epistemic")


def forecast_entropy(p_E: Tensor, top_k: int) -> Tensor:
    """Entropy of forecasts in nats: categorical (``top_k`` = 1), or summed over the experts' Bernoullis.

    Shapes:
        p_E: ``[..., E]`` probabilities in [0, 1].
        output: ``[...]``; 0 where the forecast is certain.
    """
    if top_k == 1:
        return torch.special.entr(p_E).sum(-1)
    return (torch.special.entr(p_E) + torch.special.entr(1 - p_E)).sum(-1)


def decompose(p_ME: Tensor, top_k: int, weight_M: Tensor | None = None) -> dict[str, Tensor]:
    """Total, aleatoric and epistemic uncertainty of an ensemble's forecasts.

    Args:
        weight_M: weights of the members, ``[M]`` or ``[M, ...]`` as broadcasts against all but the last axis
            of ``p_ME``, adding up to 1 over M; None: equal ones.

    Shapes:
        p_ME: ``[M, ..., E]`` the members' probabilities.
        output: each of :data:`PARTS` ``[...]``, none below 0, total = aleatoric + epistemic.
    """
    members = p_ME.shape[0]
    weight = p_ME.new_full((members,), 1 / members) if weight_M is None else weight_M.to(p_ME)
    weight = weight.reshape(*weight.shape, *[1] * (p_ME.dim() - 1 - weight.dim()))
    mean_E = (weight[..., None] * p_ME).sum(0)
    aleatoric = (weight * forecast_entropy(p_ME, top_k)).sum(0)
    return parts_of(forecast_entropy(mean_E, top_k), aleatoric)


def parts_of(total: Tensor, aleatoric: Tensor) -> dict[str, Tensor]:
    """The three parts from two; what rounding takes below zero is zero, and they still add up."""
    epistemic = (total - aleatoric).clamp(min=0)
    return {"total": aleatoric + epistemic, "aleatoric": aleatoric, "epistemic": epistemic}


def auroc(score_N: Tensor, positive_N: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties counting half.

    From mid-ranks (Mann and Whitney, "On a Test of Whether one of Two Random Variables is Stochastically
    Larger than the Other", 1947).

    Shapes:
        score_N: any real dtype. positive_N: bool.

    Returns:
        The area, or NaN if there are no positives or no negatives.
    """
    positives = int(positive_N.sum())
    negatives = positive_N.numel() - positives
    if not positives or not negatives:
        return math.nan
    _, place_N, count_U = score_N.unique(return_inverse=True, return_counts=True)
    last_U = count_U.cumsum(0).double()  # 1-based rank of the last of each group of equals
    rank_N = (last_U - (count_U.double() - 1) / 2)[place_N]
    above = float(rank_N[positive_N].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


class AreaUnderROC(Metric):
    """:func:`auroc` over batches and ranks. It keeps every score: the area is exact, memory grows with N."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    score: list[Tensor]
    positive: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("score", [], "cat")
        self.add_state("positive", [], "cat")

    def update(self, score_N: Tensor, positive_N: Tensor) -> None:
        """Add scores of things that are positive or not (any equal shapes).

        Raises:
            ValueError: if the shapes differ or a score is NaN.
        """
        if score_N.shape != positive_N.shape:
            raise ValueError(f"scores {tuple(score_N.shape)} and labels {tuple(positive_N.shape)} differ")
        if bool(score_N.isnan().any()):
            raise ValueError("a score is NaN: nothing can be ranked by it")
        self.score.append(score_N.flatten())
        self.positive.append(positive_N.flatten().bool())

    def compute(self) -> Tensor:
        """The area, float64; NaN without positives or negatives."""
        if not self.score:
            return torch.tensor(math.nan, dtype=torch.float64)
        area = auroc(dim_zero_cat(self.score), dim_zero_cat(self.positive))
        return torch.tensor(area, dtype=torch.float64)
