"""The building blocks of features against loops."""

from __future__ import annotations

import pytest
import torch

from specgate.predictors.features import PointFeatures, at_targets_BTPHE, decayed, multi_hot_BTLE, shifted
from tests.predictors.support import EXPERTS, HIDDEN, LAYERS, VOCAB, make_batch


def test_decayed_is_the_running_mean() -> None:
    x = torch.randn(2, 9, 3, 4)
    state = torch.zeros(2, 3, 4)
    out = decayed(x, 0.8)
    for t in range(9):
        state = 0.8 * state + 0.2 * x[:, t]
        torch.testing.assert_close(out[:, t], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", [-9, -2, -1, 0, 1, 3, 9])
def test_shifted(by: int) -> None:
    x = torch.randn(2, 5, 3)
    out = shifted(x, by)
    for t in range(5):
        expected = x[:, t - by] if 0 <= t - by < 5 else torch.zeros(2, 3)
        assert torch.equal(out[:, t], expected)


def test_state_at_targets_is_the_latest_that_is_known() -> None:
    after = torch.arange(1.0, 6.0)[None, :, None] * 100 + torch.arange(
        3.0
    )  # [1, T, L]: token number and layer
    out = at_targets_BTPHE(after, horizons=5)
    for t in range(5):
        for p in range(4):
            for h in range(1, 6):
                column = p - 1 + h
                layer, following = column % 3, column >= 3
                token = t if following and layer <= p - 1 else t - 1
                if column < 6:
                    expected = 0.0 if token < 0 else (token + 1) * 100 + layer
                    assert float(out[0, t, p, h - 1]) == expected


def test_multi_hot() -> None:
    batch = make_batch()
    out = multi_hot_BTLE(batch, EXPERTS, weighted=True)
    for k in range(2):
        e = int(batch.experts_BTLK[1, 2, 0, k])
        assert float(out[1, 2, 0, e]) == float(batch.weights_BTLK[1, 2, 0, k])
    assert float(out[2, 7].abs().sum()) == 0  # padding
    assert float(multi_hot_BTLE(batch, EXPERTS, weighted=False)[0].sum()) == 8 * LAYERS * 2


def test_a_dropped_token_did_not_execute() -> None:
    batch = make_batch(K=1)
    assert batch.dropped_BTL is not None
    assert bool(batch.dropped_BTL.any())
    weight_BTL = multi_hot_BTLE(batch, EXPERTS, weighted=True).sum(-1)
    assert float(weight_BTL[batch.dropped_BTL].abs().sum()) == 0
    used_BTL = multi_hot_BTLE(batch, EXPERTS, weighted=False).sum(-1)
    torch.testing.assert_close(used_BTL, batch.valid_BT[..., None].expand_as(used_BTL).float())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("heads", [0, 2])
def test_size_is_what_comes_out(phase: str, hidden: bool, heads: int) -> None:
    features = PointFeatures(
        layers=LAYERS,
        experts=EXPERTS,
        vocab_size=VOCAB,
        horizons=3,
        phase=phase,
        hidden_size=HIDDEN if hidden else None,
        token_dim=4,
        state_dim=5,
        decays=[0.5],
        heads=heads,
    )
    batch = make_batch(phase)
    out, routed = features(batch)
    assert out.shape == (3, 8, LAYERS + 1, features.size)
    weighted = multi_hot_BTLE(batch, EXPERTS, weighted=True) * EXPERTS**0.5
    torch.testing.assert_close(routed[:, :, 1:], weighted)
    assert float(routed[:, :, 0].abs().max()) == 0
    assert bool(out.isfinite().all())
