"""``token_table`` against loops."""

from __future__ import annotations

import pytest
import torch

from specgate.predictors.token_table import TokenTable
from tests.predictors.support import EXPERTS, LAYERS, VOCAB, make_batch, make_predictor


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_forecast_matches_loops(phase: str, K: int) -> None:
    predictor = make_predictor("token_table", phase, K=K, smoothing=2.0)
    batches = [make_batch(phase, K=K, seed=s, context=1) for s in range(3)]
    for batch in batches:
        predictor.count(batch)
    width = LAYERS + (3 if phase == "decode" else 0)
    counts, seen = torch.zeros(VOCAB, width, EXPERTS), torch.zeros(VOCAB, width)
    for batch in batches:
        for b in range(3):
            for t in range(8):
                for column in range(width) if batch.mask_BT[b, t] else []:
                    s = t + column // LAYERS
                    if s < 8 and batch.valid_BT[b, s]:
                        seen[batch.token_ids_BT[b, t], column] += 1
                        for e in batch.experts_BTLK[b, s, column % LAYERS].tolist():
                            counts[batch.token_ids_BT[b, t], column, e] += 1
    prior = predictor.prior_LE()
    new = make_batch(phase, K=K, seed=5)
    logits = predictor(new)
    for t, point, h in ((0, 0, 1), (2, 0, 3), (2, 1, 1), (3, 2, 1), (4, 3, 1), (4, 3, 3)):
        column = point - 1 + h
        if column >= width:
            continue
        token = int(new.token_ids_BT[1, t])
        p = (counts[token, column] + 2.0 * prior[column % LAYERS]) / (seen[token, column] + 2.0)
        torch.testing.assert_close(logits[1, t, point, h - 1], predictor.link(p), rtol=1e-4, atol=1e-5)


def test_unseen_ids_and_a_full_table_back_off_to_popularity() -> None:
    predictor = make_predictor("token_table", rows=2)
    popularity = make_predictor("popularity")
    batch = make_batch()
    predictor.count(batch), popularity.count(batch)
    assert isinstance(predictor, TokenTable)
    assert int((predictor.row_V >= 0).sum()) == 2
    without = (predictor.row_V[batch.token_ids_BT] < 0) & batch.valid_BT
    assert without.any()
    torch.testing.assert_close(predictor(batch)[without], popularity(batch)[without])
    assert not torch.allclose(predictor(batch)[~without], popularity(batch)[~without])
