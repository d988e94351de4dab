"""Weights of a log-linear mixture of evidence, fitted by Newton's method on held-out cells.

Letters: N cells, I kinds of evidence, E experts per layer.

The logits of a cell are ``base + sum_i w_i x_i``: log-linear interpolation (Klakow, "Log-linear interpolation
of language models", ICSLP 1998), which for counts is deleted interpolation (Jelinek and Mercer, 1980) in the
domain of logits. The log loss is convex in the few weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_loss(logits_NE: Tensor, used_NE: Tensor, top_k: int) -> Tensor:
    """Mean loss of a cell: cross entropy (K = 1) or binary cross entropies summed over experts (K > 1)."""
    if top_k == 1:
        return -(logits_NE.log_softmax(-1) * used_NE).sum(-1).mean()
    return (torch.nn.functional.softplus(logits_NE) - logits_NE * used_NE).sum(-1).mean()


def fit_weights(
    base_NE: Tensor,
    x_NIE: Tensor,
    used_NE: Tensor,
    start_I: Tensor,
    top_k: int,
    ridge: float = 1e-3,
    steps: int = 25,
) -> Tensor:
    """Weights of least log loss plus ``ridge / 2`` times their squared distance from ``start_I``.

    Shapes:
        base_NE: logits without evidence. x_NIE: ``[N, I, E]``. used_NE: 0/1. start_I, output: ``[I]``
            float64.
    """
    base_NE, x_NIE, used_NE, start_I = (x.double() for x in (base_NE, x_NIE, used_NE, start_I))

    def objective(w_I: Tensor) -> Tensor:
        loss = log_loss(base_NE + torch.einsum("nie,i->ne", x_NIE, w_I), used_NE, top_k)
        return loss + ridge / 2 * (w_I - start_I).square().sum()

    w_I, best, N = start_I.clone(), objective(start_I), len(base_NE)
    unit_II = torch.eye(len(start_I), dtype=torch.float64, device=start_I.device)
    for _ in range(steps):
        logits_NE = base_NE + torch.einsum("nie,i->ne", x_NIE, w_I)
        p_NE = logits_NE.softmax(-1) if top_k == 1 else logits_NE.sigmoid()
        gradient_I = torch.einsum("nie,ne->i", x_NIE, p_NE - used_NE) / N + ridge * (w_I - start_I)
        spread_NE = p_NE if top_k == 1 else p_NE * (1 - p_NE)
        hessian_II = torch.einsum("nie,nje->ij", x_NIE * spread_NE[:, None], x_NIE) / N + ridge * unit_II
        if top_k == 1:
            mean_NI = torch.einsum("nie,ne->ni", x_NIE, p_NE)
            hessian_II = hessian_II - mean_NI.T @ mean_NI / N
        step_I = torch.linalg.solve(hessian_II, gradient_I)
        scale, found = 1.0, objective(w_I - step_I)
        while not found < best and scale > 1e-4:
            scale /= 2
            found = objective(w_I - scale * step_I)
        if not found < best:
            break
        done = bool(best - found < 1e-10)
        w_I, best = w_I - scale * step_I, found
        if done:
            break
    return w_I
