"""Can a predictor learn at all? Memorise one tiny batch to recall 1.0.

Letters: B sequences, T tokens, P source points, H horizons, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from specgate.traces.batch import RoutingBatch, targets
from tests.predictors.support import make_batch, make_predictor

B, T = 2, 6


def tiny_trace(phase: str, K: int, hidden: bool) -> RoutingBatch:
    """Two sequences of random routing in which every token has an id of its own: all can be learnt."""
    batch = make_batch(phase, B=B, T=T, K=K, hidden=hidden, padded=False)
    return replace(batch, token_ids_BT=torch.arange(B * T).view(B, T), dropped_BTL=None)


def overfit(
    name: str, phase: str, K: int, hidden: bool, *, steps: int = 400, lr: float = 5e-3, **kwargs: Any
) -> float:
    """Recall@K over all valid cells of the tiny trace after training on it; stops early once it is 1.0."""
    torch.manual_seed(0)
    batch = tiny_trace(phase, K, hidden)
    predictor = make_predictor(name, phase, K=K, hidden=hidden, vocab_size=B * T, **kwargs).train()
    optimizer = torch.optim.Adam([p for p in predictor.parameters() if p.requires_grad], lr=lr)
    experts_BTPHK, valid_BTPH = targets(batch, predictor.lookahead)
    recall = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        (predictor.training_loss(batch) / valid_BTPH.sum()).backward()
        optimizer.step()
        if step % 20 == 19:
            predictor.eval()
            with torch.no_grad():
                found_BTPH = predictor.hits(predictor(batch), experts_BTPHK) / K
            predictor.train()
            recall = float(found_BTPH[valid_BTPH].mean())
            if recall == 1.0:
                break
    return recall
