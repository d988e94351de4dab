"""``previous_token`` against loops."""

from __future__ import annotations

import pytest
import torch

from tests.predictors.support import EXPERTS, LAYERS, make_batch, make_predictor


@pytest.mark.parametrize("K", [1, 2])
def test_forecast_matches_loops(K: int) -> None:
    predictor = make_predictor("previous_token", "decode", K=K, smoothing=3.0)
    batches = [make_batch(K=K, seed=s, context=1) for s in range(3)]
    for batch in batches:
        predictor.count(batch)
    used, seen = torch.zeros(LAYERS, EXPERTS, 2), torch.zeros(LAYERS, EXPERTS, 2)
    for batch in batches:
        for b in range(3):
            for t in range(1, 8):
                for layer in range(LAYERS) if batch.mask_BT[b, t] else []:
                    now = batch.experts_BTLK[b, t, layer].tolist()
                    before = batch.experts_BTLK[b, t - 1, layer].tolist()
                    for e in range(EXPERTS):
                        seen[layer, e, int(e in before)] += 1
                        used[layer, e, int(e in before)] += e in now
    prior = predictor.prior_LE()
    new = make_batch(K=K, seed=7)
    logits = predictor(new)
    for t, point, h in ((0, 1, 1), (3, 0, 2), (3, 1, 2), (3, 3, 1), (4, 2, 2), (4, 3, 3)):
        column = point - 1 + h
        layer, following = column % LAYERS, column >= LAYERS
        source = t if following and layer <= point - 1 else t - 1
        for e in range(EXPERTS):
            if source < 0:
                p = float(prior[layer, e])
            else:
                was = int(e in new.experts_BTLK[0, source, layer].tolist())
                p = float((used[layer, e, was] + 3.0 * prior[layer, e]) / (seen[layer, e, was] + 3.0))
            expected = float(predictor.link(torch.tensor(p)))
            assert float(logits[0, t, point, h - 1, e]) == pytest.approx(expected, abs=1e-4)


def test_in_prefill_it_is_popularity() -> None:
    batch = make_batch("prefill")
    ours, popularity = make_predictor("previous_token", "prefill"), make_predictor("popularity", "prefill")
    ours.count(batch), popularity.count(batch)
    torch.testing.assert_close(ours(batch), popularity(batch))
