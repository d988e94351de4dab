"""Attention to both sides against a loop over queries; causal stacks get the features they always had.

Letters: B sequences, T tokens, P source points, F features, A heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from specgate.predictors.both_sides import SequenceFeatures, TwoSidedAttention
from specgate.predictors.features import PointFeatures
from tests.predictors.support import EXPERTS, HIDDEN, LAYERS, VOCAB, make_batch


def test_attention_is_a_softmax_over_the_real_tokens() -> None:
    torch.manual_seed(0)
    B, T, P, size, A, C = 2, 5, 3, 4, 2, 3
    attention = TwoSidedAttention(P, size, A, C)
    x = torch.randn(B, T, P, size)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 3:] = False
    slope = F.softplus(attention.slope_2PA)
    with torch.no_grad():
        found = attention(x, valid)
        for b, t, p, a in [
            (b, t, p, a) for b in range(B) for t in range(3) for p in range(P) for a in range(A)
        ]:
            qkv = attention.query_key_value(x[b, :, p][None].repeat(P, 1, 1))[p].view(T, 3, A, C)[:, :, a]
            score = []
            for s in range(T):
                away = slope[0, p, a] * (t - s) if s <= t else slope[1, p, a] * (s - t)
                score.append(
                    qkv[t, 0] @ qkv[s, 1] / C**0.5 - away if valid[b, s] else torch.tensor(-torch.inf)
                )
            expected = torch.stack(score).softmax(0) @ qkv[:, 2]
            torch.testing.assert_close(found[b, t, p, a * C : (a + 1) * C], expected, rtol=1e-4, atol=1e-5)


def make_features(cls: type[PointFeatures], **kwargs: Any) -> PointFeatures:
    torch.manual_seed(0)
    return cls(
        layers=LAYERS,
        experts=EXPERTS,
        vocab_size=VOCAB,
        horizons=3,
        phase="prefill",
        hidden_size=HIDDEN,
        token_dim=4,
        state_dim=4,
        decays=[0.7],
        **kwargs,
    )


@pytest.mark.parametrize("heads", [0, 2])
def test_a_causal_stack_gets_the_usual_features(heads: int) -> None:
    batch = make_batch("prefill")
    usual = make_features(PointFeatures, heads=heads)
    ours = make_features(SequenceFeatures, heads=heads, bidirectional=False)
    assert ours.size == usual.size
    torch.testing.assert_close(ours(batch)[0], usual(batch)[0])


@pytest.mark.parametrize("heads", [0, 2])
def test_the_size_is_the_width_of_the_features(heads: int) -> None:
    features = make_features(SequenceFeatures, heads=heads, bidirectional=True)
    assert features(make_batch("prefill"))[0].shape[-1] == features.size
