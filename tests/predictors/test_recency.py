"""``recency`` against a loop over tokens, and its fit."""

from __future__ import annotations

import pytest
import torch

from specgate.predictors.recency import Recency
from tests.predictors.support import EXPERTS, LAYERS, make_batch, make_predictor


@pytest.mark.parametrize("K", [1, 2])
def test_forecast_matches_a_loop(K: int) -> None:
    predictor = make_predictor("recency", "decode", K=K, decays=[0.8], mixes=[0.6])
    batches = [make_batch(K=K, seed=s) for s in range(2)]
    for batch in batches:
        predictor.count(batch)
    predictor.finish()
    prior = predictor.prior_LE()
    new = make_batch(K=K, seed=3)
    logits = predictor(new)
    for b in range(2):
        recent, mass = torch.zeros(LAYERS, EXPERTS), 0.0
        for t in range(8):
            for point in range(LAYERS + 1):
                for h in (1, 2, 3):
                    column = point - 1 + h
                    if column >= LAYERS:
                        continue
                    p = 0.6 * recent[column] + (1 - 0.6 * mass) * prior[column]
                    torch.testing.assert_close(
                        logits[b, t, point, h - 1], predictor.link(p), rtol=1e-4, atol=1e-4
                    )
            recent, mass = recent * 0.8, mass * 0.8 + 0.2
            for layer in range(LAYERS):
                recent[layer, new.experts_BTLK[b, t, layer]] += 0.2
            # Past the last layer the next token's first layers are read with this token included.
            p = 0.6 * recent[0] + (1 - 0.6 * mass) * prior[0]
            torch.testing.assert_close(logits[b, t, LAYERS, 0], predictor.link(p), rtol=1e-4, atol=1e-4)


def test_fit_finds_sticky_layers() -> None:
    predictor = make_predictor("recency", "decode")
    assert isinstance(predictor, Recency)
    for seed in range(4):
        batch = make_batch(seed=seed, B=8, T=24, padded=False)
        batch.experts_BTLK[:, 1:, 0] = batch.experts_BTLK[
            :, :1, 0
        ]  # layer 0 never changes, layers 1, 2 are random
        predictor.count(batch)
    predictor.finish()
    assert float(predictor.mix_L[0]) >= 0.9
    assert float(predictor.mix_L[1:].max()) <= 0.3
    predictor.on_train_end()
    assert predictor.kept == []


def test_in_prefill_it_is_popularity() -> None:
    batch = make_batch("prefill")
    ours, popularity = make_predictor("recency", "prefill"), make_predictor("popularity", "prefill")
    ours.count(batch), popularity.count(batch)
    ours.finish()
    torch.testing.assert_close(ours(batch), popularity(batch))
