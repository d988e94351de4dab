"""``mlp`` learns: routing that follows from what it sees is foreseen almost surely after a short training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specgate.predictors.base import Predictor
from specgate.traces.batch import RoutingBatch, targets
from tests.predictors.support import (
    EXPERTS,
    LAYERS,
    VOCAB,
    loader,
    make_batch,
    make_predictor,
    trainer,
)


def lawful_batch(phase: str, K: int, hidden: bool, seed: int) -> RoutingBatch:
    """Experts are a function of the token's id and the layer; ids count upwards, so the next token is known
    too."""
    batch = make_batch(phase, B=8, T=16, K=K, hidden=hidden, seed=seed, padded=False)
    g = torch.Generator().manual_seed(7)
    table_VLK = torch.rand(VOCAB, LAYERS, EXPERTS, generator=g).topk(K, dim=-1).indices
    start = torch.randint(0, VOCAB, (8, 1), generator=torch.Generator().manual_seed(seed))
    batch.token_ids_BT = (start + torch.arange(16)) % VOCAB
    batch.experts_BTLK = table_VLK[batch.token_ids_BT]
    return batch


def recall(predictor: Predictor, batch: RoutingBatch) -> float:
    """Over all valid cells."""
    experts, valid = targets(batch, predictor.lookahead)
    with torch.no_grad():
        return float(predictor.hits(predictor(batch), experts)[valid].float().mean()) / predictor.top_k


@pytest.mark.parametrize("name", ["mlp", "router_residual"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("K", "hidden"), [(1, True), (2, True), (2, False)])
def test_overfits_a_tiny_trace(name: str, phase: str, K: int, hidden: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 48, "token_dim": 16, "state_dim": 8, "lr": 0.01, "dropout": 0.0}
    if name == "router_residual":
        settings["distill"] = 0.0  # this law is not the routers'
    predictor = make_predictor(name, phase, K=K, hidden=hidden, **settings)
    batches = [lawful_batch(phase, K, hidden, seed) for seed in range(4)]
    trainer(tmp_path, max_epochs=30).fit(predictor, loader(batches))
    assert recall(predictor.eval(), lawful_batch(phase, K, hidden, 99)) > 0.99


def test_it_starts_at_the_share_of_used_experts() -> None:
    predictor = make_predictor("mlp")
    p = predictor.eval().probabilities(make_batch())
    torch.testing.assert_close(p, torch.full_like(p, 2 / EXPERTS))
