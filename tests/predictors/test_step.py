"""What a loader calls at run time equals the whole window's forward there, and looks at nothing unknown.

Letters: B sequences, T tokens, L MoE layers, H horizons, E, K experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specgate.predictors.base import Predictor
from specgate.predictors.mlp import MLP
from specgate.predictors.router_lookahead import RouterLookahead
from specgate.traces.batch import INVALID, RoutingBatch
from tests.predictors.support import LAYERS, fitted, make_batch, make_routers, variants

FAST = (
    *("router_lookahead", "router_mean_expert", "mlp", "router_residual", "token_table", "markov2"),
    "expert_lowrank",
)


def last_point(predictor: Predictor, batch: RoutingBatch, layer: int) -> Tensor:
    """The same picked out of the forward, a loop over sequences."""
    with torch.no_grad():
        logits = predictor(batch)
    rows = [logits[b, int(n) - 1, layer + 1] for b, n in enumerate(batch.valid_BT.sum(1))]
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "phase", "K", "hidden"), variants())
def test_step_equals_forward(name: str, phase: str, K: int, hidden: bool) -> None:
    predictor = fitted(name, phase, K=K, hidden=hidden)
    batch = make_batch(phase, K=K, hidden=hidden, seed=7)
    for layer in range(-1, LAYERS):
        there_H = predictor.kinds[layer + 1] != INVALID
        with torch.no_grad():
            found_BHE = predictor.step_logits(batch, layer)
        assert found_BHE.shape == (3, 3, predictor.experts)
        expected_BHE = last_point(predictor, batch, layer)
        torch.testing.assert_close(found_BHE[:, there_H], expected_BHE[:, there_H], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_step_of_a_deep_mlp_that_looks_past_the_next_token(phase: str, hidden: bool, heads: int) -> None:
    options: dict[str, Any] = {"lookahead": 5, "depth": 2, "heads": heads}
    predictor = fitted("router_residual", phase, hidden=hidden, **options)
    batch = make_batch(phase, hidden=hidden, seed=3)
    for layer in range(-1, LAYERS):
        there_H = predictor.kinds[layer + 1] != INVALID
        with torch.no_grad():
            found_BHE = predictor.step_logits(batch, layer)
        expected_BHE = last_point(predictor, batch, layer)
        torch.testing.assert_close(found_BHE[:, there_H], expected_BHE[:, there_H], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"reuse": False, "by_expert": False},
        {"shift": False, "depth": False, "heads": 0},
        {"units": [4, 2], "ngram_rows": 7, "foresee": None, "span": None},
        {"foresee": [4, 2, 2], "span": 1, "heads": 2},
    ],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_step_of_other_low_rank_forms(phase: str, options: dict[str, Any]) -> None:
    for more in ({}, {"bidirectional": True}) if phase == "prefill" else ({},):
        predictor = fitted("expert_lowrank", phase, lookahead=5, shared=3, **options, **more)
        batch = make_batch(phase, seed=3)
        for layer in range(-1, LAYERS):
            there_H = predictor.kinds[layer + 1] != INVALID
            with torch.no_grad():
                found_BHE = predictor.step_logits(batch, layer)[:, there_H]
            expected_BHE = last_point(predictor, batch, layer)[:, there_H]
            torch.testing.assert_close(found_BHE, expected_BHE, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_the_fast_paths_do_not_run_the_whole_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = fitted(name, "decode")

    def refuse(self: Predictor, batch: RoutingBatch) -> Tensor:
        raise AssertionError("the whole window was computed")

    monkeypatch.setattr(type(predictor), "forward", refuse)
    forecast = predictor.predict_next_experts(make_batch("decode"), layer=0)
    assert forecast.p_HE.shape == (3, predictor.experts)


def test_step_looks_at_nothing_beyond_its_layer_and_token() -> None:
    batch = make_batch("decode", seed=4)
    later = make_batch("decode", seed=5)
    unknown_BTL = torch.arange(LAYERS) > 1
    unknown_BTL = unknown_BTL & (torch.arange(8)[:, None] == (batch.valid_BT.sum(1) - 1)[:, None, None])
    unknown_BTL = unknown_BTL | ~batch.valid_BT[..., None]
    assert batch.hidden_BTLD is not None
    assert later.hidden_BTLD is not None
    other = replace(
        batch,
        experts_BTLK=torch.where(unknown_BTL[..., None], later.experts_BTLK, batch.experts_BTLK),
        weights_BTLK=torch.where(unknown_BTL[..., None], later.weights_BTLK, batch.weights_BTLK),
        hidden_BTLD=torch.where(unknown_BTL[..., None], later.hidden_BTLD, batch.hidden_BTLD),
        token_ids_BT=torch.where(batch.valid_BT, batch.token_ids_BT, later.token_ids_BT),
    )
    for name in FAST:
        predictor = fitted(name, "decode")
        with torch.no_grad():
            assert torch.equal(predictor.step_logits(other, 1), predictor.step_logits(batch, 1)), name


def test_a_changed_forward_does_not_inherit_a_shortcut() -> None:
    class Doubled(MLP):
        def forward(self, batch: RoutingBatch) -> Tensor:
            return 2 * super().forward(batch)

    predictor = Doubled(
        layers=LAYERS, experts=6, top_k=2, vocab_size=11, phase="decode", hidden_size=8, width=8, heads=0
    ).eval()
    batch = make_batch("decode")
    with torch.no_grad():
        torch.testing.assert_close(predictor.step_logits(batch, 0), last_point(predictor, batch, 0))


def test_routers_that_correct_their_choice_are_followed() -> None:
    routers = make_routers()
    for parts in routers.values():
        parts["correction_bias"] = torch.linspace(-0.5, 0.5, 6)
    predictor = fitted("router_lookahead", "prefill", routers=routers)
    assert isinstance(predictor, RouterLookahead)
    batch = make_batch("prefill")
    with torch.no_grad():
        torch.testing.assert_close(
            predictor.step_logits(batch, 0)[:, :2], last_point(predictor, batch, 0)[:, :2]
        )
        plain = fitted("router_lookahead", "prefill")
        assert not torch.allclose(predictor.step_logits(batch, 0), plain.step_logits(batch, 0))
    fresh = fitted("router_lookahead", "prefill")
    fresh.load_state_dict(predictor.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.step_logits(batch, 0), predictor.step_logits(batch, 0))
