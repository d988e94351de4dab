"""``router_lookahead`` against the router applied by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specgate.errors import ConfigError, TraceError
from tests.predictors.support import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    loader,
    make_batch,
    make_predictor,
    make_routers,
    trainer,
)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_scores_are_the_target_routers(phase: str, K: int) -> None:
    predictor = make_predictor("router_lookahead", phase, K=K, norm_eps=1e-3)
    batch, routers = make_batch(phase, K=K), make_routers()
    logits = predictor(batch)
    for t, layer, h in ((0, 0, 1), (3, 0, 2), (4, 1, 1)):
        assert batch.hidden_BTLD is not None
        x = batch.hidden_BTLD[1, t, layer].double()
        parts = {name: value.double() for name, value in routers[layer + h].items()}
        normed = x / (x.pow(2).mean() + 1e-3).sqrt() * parts["norm_weight"]
        z = parts["router_weight"] @ normed + parts["router_bias"]
        if K > 1:
            ordered = z.sort(descending=True).values
            z = z - (ordered[K - 1] + ordered[K]) / 2
            assert int((logits[1, t, layer + 1, h - 1] > 0).sum()) == K  # 0 is the threshold of membership
        torch.testing.assert_close(logits[1, t, layer + 1, h - 1].double(), z, rtol=1e-4, atol=1e-4)


def test_where_no_hidden_state_helps_it_is_the_token_table() -> None:
    ours, table = make_predictor("router_lookahead"), make_predictor("token_table")
    for seed in range(3):
        ours.count(make_batch(seed=seed)), table.count(make_batch(seed=seed))
    batch = make_batch(seed=8)
    a, b = ours(batch), table(batch)
    torch.testing.assert_close(a[:, :, 0], b[:, :, 0])  # before the first layer
    torch.testing.assert_close(a[:, :, LAYERS], b[:, :, LAYERS])  # the next token
    assert not torch.allclose(a[:, :, 1, 0], b[:, :, 1, 0])


def test_a_selection_bias_counts_for_the_choice() -> None:
    routers = make_routers()
    for parts in routers.values():
        parts["correction_bias"] = torch.zeros(EXPERTS)
        parts["correction_bias"][4] = 10.0
    logits = make_predictor("router_lookahead", routers=routers)(make_batch())
    assert (logits[:, :, 1, 0].argmax(-1) == 4).all()


def test_errors_say_what_to_do(tmp_path) -> None:
    with pytest.raises(ConfigError, match="needs hidden states"):
        make_predictor("router_lookahead", hidden=False)
    with pytest.raises(ConfigError, match="routers of MoE layers"):
        make_predictor("router_lookahead", routers={0: make_routers()[0]})
    wrong = make_routers()
    wrong[1]["router_weight"] = torch.zeros(EXPERTS, HIDDEN + 1)
    with pytest.raises(ConfigError, match="router 1 is"):
        make_predictor("router_lookahead", routers=wrong)
    with pytest.raises(ConfigError, match="the trace has none"):
        trainer(tmp_path, max_epochs=1).fit(
            make_predictor("router_lookahead", routers=None), loader([make_batch()])
        )
    with pytest.raises(TraceError, match="the trace has none"):
        make_predictor("router_lookahead")(replace(make_batch(), hidden_BTLD=None))
