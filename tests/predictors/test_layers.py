"""Attention per source point against a loop over queries, causal and to both sides.

Letters: B sequences, T tokens, P source points, F features, A heads, C width of a head.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specgate.predictors.features import PointFeatures
from specgate.predictors.layers import PointAttention
from tests.predictors.support import EXPERTS, HIDDEN, LAYERS, VOCAB, make_batch


@pytest.mark.parametrize("both_ways", [False, True])
def test_attention_is_a_softmax_over_the_tokens_in_sight(both_ways: bool) -> None:
    torch.manual_seed(0)
    B, T, P, size, A, C = 2, 5, 3, 4, 2, 3
    attention = PointAttention(P, size, A, C, both_ways)
    x = torch.randn(B, T, P, size)
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1, 3:] = False
    back, on = F.softplus(attention.slope_PA), torch.tensor(torch.inf).expand(P, A)
    if attention.later_PA is not None:
        on = F.softplus(attention.later_PA)
    with torch.no_grad():
        found = attention(x, valid)
        for b, t, p, a in [
            (b, t, p, a) for b in range(B) for t in range(3) for p in range(P) for a in range(A)
        ]:
            qkv = attention.query_key_value(x[b, :, p][None].repeat(P, 1, 1))[p].view(T, 3, A, C)[:, :, a]
            score = []
            for s in range(T):
                away = back[p, a] * (t - s) if s <= t else on[p, a] * (s - t)
                score.append(
                    qkv[t, 0] @ qkv[s, 1] / C**0.5 - away if valid[b, s] else torch.tensor(-torch.inf)
                )
            expected = torch.stack(score).softmax(0) @ qkv[:, 2]
            torch.testing.assert_close(found[b, t, p, a * C : (a + 1) * C], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("heads", [0, 2])
def test_the_size_is_the_width_of_the_features(heads: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    features = PointFeatures(
        layers=LAYERS,
        experts=EXPERTS,
        vocab_size=VOCAB,
        horizons=3,
        phase="prefill",
        hidden_size=HIDDEN,
        token_dim=4,
        state_dim=4,
        decays=[0.7],
        heads=heads,
        bidirectional=bidirectional,
    )
    assert features(make_batch("prefill"))[0].shape[-1] == features.size
