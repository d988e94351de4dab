"""``popularity`` against a count by hand."""

from __future__ import annotations

import pytest
import torch

from specgate.predictors.popularity import Popularity
from tests.predictors.support import EXPERTS, LAYERS, loader, make_batch, make_predictor, trainer


@pytest.mark.parametrize("K", [1, 2])
def test_probability_is_the_smoothed_frequency(K: int) -> None:
    predictor = make_predictor("popularity", K=K, smoothing=4.0)
    batches = [make_batch(K=K, seed=s, context=2) for s in range(3)]
    for batch in batches:
        predictor.count(batch)
    p = predictor.probabilities(batches[0]).double()
    for point, horizon in ((0, 1), (1, 1), (2, 3), (3, 2)):
        layer = (point - 1 + horizon) % LAYERS
        uses, tokens = [0.0] * EXPERTS, 0
        for batch in batches:
            for b in range(3):
                for t in range(8):
                    if batch.mask_BT[b, t]:
                        tokens += 1
                        for e in batch.experts_BTLK[b, t, layer].tolist():
                            uses[e] += 1
        expected = torch.tensor([(u + 4.0 * K / EXPERTS) / (tokens + 4.0) for u in uses], dtype=torch.float64)
        torch.testing.assert_close(p[1, 4, point, horizon - 1], expected, rtol=1e-5, atol=1e-6)


def test_one_epoch_of_the_trainer_counts_each_window_once(tmp_path) -> None:
    batches = [make_batch(seed=s) for s in range(3)]
    by_hand = make_predictor("popularity")
    for batch in batches:
        by_hand.count(batch)
    predictor = make_predictor("popularity")
    trainer(tmp_path, max_epochs=2).fit(predictor, loader(batches), loader(batches))
    assert isinstance(predictor, Popularity)
    torch.testing.assert_close(predictor.popularity_LE, by_hand.popularity_LE)
    assert float(predictor.tokens_L[0]) == sum(int(b.mask_BT.sum()) for b in batches)


def test_before_counting_every_expert_is_as_likely() -> None:
    p = make_predictor("popularity").probabilities(make_batch())
    torch.testing.assert_close(p, torch.full_like(p, 2 / EXPERTS))
