"""One checkpoint made for six horizons foresees N+1 to N+6, together and one by one."""

from __future__ import annotations

import pytest
import torch

from specgate.predictors.base import Predictor
from tests.predictors.support import LAYERS, NAMES, NEED_HIDDEN, fitted, make_batch

H = 2 * LAYERS


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_six_horizons_from_one_checkpoint(name: str, hidden: bool) -> None:
    if not hidden and name in NEED_HIDDEN:
        pytest.skip("needs hidden states")
    predictor: Predictor = fitted(name, "decode", hidden=hidden, lookahead=H)
    state = make_batch("decode", B=1, T=6, hidden=hidden, padded=False)
    everything = predictor.predict_next_experts(state, layer=0)
    assert everything.horizon_H.tolist() == list(range(1, H))  # from layer 0: up to layer 2 of the next token
    before = predictor.predict_next_experts(state, layer=-1)
    assert before.horizon_H.tolist() == list(range(1, H + 1))
    for ahead in range(1, LAYERS):
        one = predictor.predict_experts_at_layer(0, ahead, state)
        torch.testing.assert_close(one.p_HE[0], everything.p_HE[ahead - 1], rtol=1e-4, atol=1e-5)
    next_token = predictor.predict_experts_at_layer(2, 0, state)
    assert next_token.horizon_H.tolist() == [1]
    assert bool(next_token.next_token_H.all())
