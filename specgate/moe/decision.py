"""Routing decisions by hand: residual stream -> router input -> experts and weights.

Pure functions of plain numbers and tensors, written independently of the hosts' own router code, in the
same order of operations, so that on the same input they give the same bits. :mod:`specgate.moe.families`
fills in the numbers.

Letters: B sequences, T tokens, N flat tokens, E experts of a layer, K experts per token, D hidden size, G
groups of experts, M experts of a group. ``...`` in a shape stands for ``N`` or ``B, T``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RoutingRule:
    """How the residual stream becomes experts and weights (plain values; written to the trace header).

    Attributes:
        score: ``softmax`` (over all experts), ``sigmoid``, ``softmax_of_top_k`` (over the chosen) or
            ``switch`` (top-1 with a capacity).
        top_k: experts per token.
        norm: ``rms`` (weight applied after casting back), ``rms_float32`` (before) or ``t5``.
        norm_eps: added to the mean square.
        renormalise: weights of the chosen experts are divided by their sum.
        scale: factor on the weights.
        groups: number of expert groups of which ``groups_kept`` compete, or None.
        groups_kept: groups that stay in the choice.
        group_score: ``max`` or ``top2`` (sum of the two best), how a group is rated.
        float32_logits: the router multiplies in float32 whatever the model's dtype.
        capacity: tokens per expert and sequence, later ones are dropped (Switch); None = no limit.
    """

    score: str
    top_k: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    renormalise: bool = False
    scale: float = 1.0
    groups: int | None = None
    groups_kept: int | None = None
    group_score: str = "max"
    float32_logits: bool = False
    capacity: int | None = None


class Decision(NamedTuple):
    """A routing decision.

    Shapes:
        experts: ``[..., K]`` int64 in descending order of weight.
        weights: ``[..., K]``.
        dropped: ``[...]`` bool, or None where the family drops nothing.
        scores: ``[..., E]`` what the choice was made by (the K best of these are the decision).
    """

    experts: Tensor
    weights: Tensor
    dropped: Tensor | None
    scores: Tensor


def normalise(rule: RoutingRule, weight_D: Tensor, hidden: Tensor) -> Tensor:
    """The router's input from the residual stream (root mean square norm, Zhang & Sennrich 2019).

    Shapes:
        hidden: ``[..., D]`` -> ``[..., D]``.
    """
    factor = torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + rule.norm_eps)
    if rule.norm == "t5":  # the product is float32 and is cast only for half-precision weights
        normed = hidden * factor
        return weight_D * (normed.to(weight_D.dtype) if weight_D.dtype in _HALF else normed)
    if rule.norm == "rms_float32":
        return (weight_D * (hidden.float() * factor)).to(hidden.dtype)
    return weight_D * (hidden.float() * factor).to(hidden.dtype)


def decide(rule: RoutingRule, tensors: Mapping[str, Tensor], normed: Tensor) -> Decision:
    """The routing decision for a router input.

    Switch counts capacity along T, so its input must be ``[B, T, D]``; for the others any leading shape
    will do.

    Args:
        rule: the family's rule.
        tensors: ``router_weight [E, D]`` and where the family has them ``router_bias [E]``,
            ``correction_bias [E]``.
        normed: output of the layer's norm.

    Shapes:
        normed: ``[..., D]``.
    """
    weight, bias = tensors["router_weight"], tensors.get("router_bias")
    shape = normed.shape[:-1]
    x = normed if rule.score == "switch" else normed.reshape(-1, normed.shape[-1])
    if rule.float32_logits:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    logits = F.linear(x, weight, bias)
    if rule.score == "switch":
        return _switch(logits, normed.dtype, rule)
    if rule.score == "sigmoid":
        scores = logits.sigmoid()
    elif rule.score == "softmax":
        scores = logits.softmax(-1, dtype=torch.float32)
    else:
        scores = logits
    chosen_by = scores + tensors["correction_bias"] if "correction_bias" in tensors else scores
    if rule.groups:
        # Experts of losing groups are out; zero is the least softmax score, a biased sigmoid score may be
        # below it.
        lost = ~_kept_groups(chosen_by, rule)
        chosen_by = chosen_by.masked_fill(lost, 0.0 if rule.score == "softmax" else -torch.inf)
    experts = chosen_by.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if rule.score == "softmax_of_top_k":
        weights = weights.softmax(-1)
    if rule.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if rule.score == "sigmoid" else 0.0))
    weights, order = (weights * rule.scale).sort(dim=-1, descending=True, stable=True)
    experts = experts.gather(-1, order)
    k_shape, e_shape = (*shape, rule.top_k), (*shape, logits.shape[-1])
    return Decision(experts.reshape(k_shape), weights.reshape(k_shape), None, chosen_by.reshape(e_shape))


def _switch(logits_BTE: Tensor, dtype: torch.dtype, rule: RoutingRule) -> Decision:
    """Top-1; the tokens after an expert's capacity in their sequence are dropped (Fedus et al. 2021)."""
    probs_BTE = logits_BTE.softmax(-1).to(dtype)
    weights_BT1, experts_BT1 = probs_BTE.max(-1, keepdim=True)
    if rule.capacity is None:
        dropped_BT = torch.zeros_like(experts_BT1[..., 0], dtype=torch.bool)
    else:
        one_hot_BTE = torch.zeros_like(probs_BTE, dtype=torch.int32).scatter_(-1, experts_BT1, 1)
        place_BT = one_hot_BTE.cumsum(-2).gather(-1, experts_BT1).squeeze(-1)
        dropped_BT = place_BT > rule.capacity
    return Decision(experts_BT1, weights_BT1, dropped_BT, probs_BTE)


def _kept_groups(scores_NE: Tensor, rule: RoutingRule) -> Tensor:
    """``[N, E]`` bool: the expert's group is among the best ``groups_kept``."""
    groups, kept = int(rule.groups or 1), int(rule.groups_kept or 1)
    scores_NGM = scores_NE.reshape(len(scores_NE), groups, -1)
    rating_NG = scores_NGM.topk(1 if rule.group_score == "max" else 2, dim=-1).values.sum(-1)
    kept_NG = torch.zeros_like(rating_NG, dtype=torch.bool)
    kept_NG.scatter_(1, rating_NG.topk(kept, dim=-1, sorted=False).indices, True)
    return kept_NG[:, :, None].expand_as(scores_NGM).reshape_as(scores_NE)


def agrees(decision: Decision, experts: Tensor, dropped: Tensor | None = None) -> Tensor:
    """Where what was executed is a valid outcome of the decision's scores.

    Equal scores have no right order: the executed set counts when its scores are the K best ones.

    Shapes:
        experts: ``[..., K]`` executed; dropped: ``[...]`` bool executed, or None to leave it out.
        output: ``[...]`` bool.
    """
    if experts.shape[-1] == 1:
        same = (
            decision.scores.gather(-1, experts).eq(decision.scores.gather(-1, decision.experts)).squeeze(-1)
        )
    else:
        best = decision.scores.gather(-1, decision.experts).sort(-1).values
        same = decision.scores.gather(-1, experts).sort(-1).values.eq(best).all(-1)
    if dropped is not None and decision.dropped is not None:
        same = same & dropped.eq(decision.dropped)
    return same
