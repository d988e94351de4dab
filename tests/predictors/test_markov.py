"""``markov`` against loops over tokens, points and horizons."""

from __future__ import annotations

import math

import pytest
import torch

from specgate.traces.batch import RoutingBatch
from tests.predictors.support import EXPERTS, LAYERS, make_batch, make_predictor


def target(batch: RoutingBatch, b: int, t: int, layer: int, h: int) -> list[int] | None:
    """Experts at horizon h from ``layer``, None where there is nothing to score."""
    column = layer + h
    if column < LAYERS:
        return batch.experts_BTLK[b, t, column].tolist()
    if batch.phase == "prefill" or t + 1 >= batch.valid_BT.shape[1] or not batch.valid_BT[b, t + 1]:
        return None
    return batch.experts_BTLK[b, t + 1, column - LAYERS].tolist()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("K", [1, 2])
def test_counts_and_forecast_match_loops(phase: str, K: int) -> None:
    predictor = make_predictor("markov", phase, K=K, smoothing=2.0, shrink=0.7)
    batches = [make_batch(phase, K=K, seed=s, context=1) for s in range(3)]
    for batch in batches:
        predictor.count(batch)
    new = make_batch(phase, K=K, seed=9)
    logits = predictor(new).double()
    prior = predictor.prior_LE().double()
    link = (lambda p: math.log(p)) if K == 1 else (lambda p: math.log(p / (1 - p)))
    for layer in range(LAYERS):
        for h in (1, 2, 3):
            joint = torch.zeros(EXPERTS, EXPERTS, dtype=torch.float64)
            source = torch.zeros(EXPERTS, dtype=torch.float64)
            for batch in batches:
                for b in range(3):
                    for t in range(8):
                        found = target(batch, b, t, layer, h) if batch.mask_BT[b, t] else None
                        for e in batch.experts_BTLK[b, t, layer].tolist() if found is not None else []:
                            source[e] += 1
                            for f in found or []:
                                joint[e, f] += 1
            torch.testing.assert_close(predictor.joint_LHEE[layer, h - 1].double(), joint)
            torch.testing.assert_close(predictor.source_LHE[layer, h - 1].double(), source)
            if layer + h >= LAYERS and phase == "prefill":
                continue
            b, t, goal = 1, 3, (layer + h) % LAYERS
            for f in range(EXPERTS):
                base = link(float(prior[goal, f]))
                expected = base
                for e in new.experts_BTLK[b, t, layer].tolist():
                    p = (float(joint[e, f]) + 2.0 * float(prior[goal, f])) / (float(source[e]) + 2.0)
                    expected += 0.7 * (link(p) - base)
                assert float(logits[b, t, layer + 1, h - 1, f]) == pytest.approx(expected, abs=1e-4)


def test_with_one_expert_it_is_the_exact_chain() -> None:
    predictor = make_predictor("markov", "prefill", K=1, smoothing=0.5)
    batch = make_batch("prefill", K=1, B=8, seed=2)
    batch.experts_BTLK[:, :, 1] = (batch.experts_BTLK[:, :, 0] + 1) % EXPERTS
    predictor.count(batch)
    p = predictor.probabilities(batch)[:, :, 1, 0]
    used = p.gather(-1, batch.experts_BTLK[:, :, 1])[batch.valid_BT]
    assert float(used.min()) > 0.8
    torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))


def test_before_the_first_layer_it_is_popularity() -> None:
    batch = make_batch()
    markov, popularity = make_predictor("markov"), make_predictor("popularity")
    markov.count(batch), popularity.count(batch)
    torch.testing.assert_close(markov(batch)[:, :, 0], popularity(batch)[:, :, 0])
