"""Counted operations against hand-counted ones, and what predictors declare against what is counted.

Letters: B sequences, T tokens, L MoE layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specgate.metrics.flops import count_flops
from specgate.predictors.base import Predictor
from specgate.predictors.layers import PointAttention, PointLinear
from tests.predictors.support import LAYERS, fitted, make_batch
from tests.predictors.test_shadow import random_shadow


def test_a_multiply_add_is_two() -> None:
    linear, x = nn.Linear(30, 20), torch.randn(7, 30)
    assert count_flops(lambda: linear(x)) == 2 * 7 * 30 * 20
    points = PointLinear(3, 30, 20)
    assert count_flops(lambda: points(torch.randn(3, 7, 30))) == 2 * 3 * 7 * 30 * 20
    assert count_flops(lambda: torch.einsum("ab,bc->ac", x, torch.randn(30, 4))) == 2 * 7 * 30 * 4
    assert count_flops(lambda: x + 1) == 0


def test_attention_is_counted_whatever_kernel_runs() -> None:
    q = torch.randn(2, 3, 5, 8)
    counted = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted == 2 * (2 * 3 * 5 * 5 * 8) * 2
    attention, x = PointAttention(4, 10, 2, 8), torch.randn(1, 6, 4, 10)
    valid_BT = torch.ones(1, 6, dtype=torch.bool)
    assert count_flops(lambda: attention(x, valid_BT)) == 4 * 2 * (6 * 10 * 48 + 2 * 2 * 6 * 6 * 8)


@pytest.mark.parametrize(("run", "K"), [("all", 6), ("none", 2)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_shadow_declares_what_is_counted_where_it_is_dense(phase: str, run: str, K: int) -> None:
    """With all experts used (or none) nothing is computed in vain, apart from queries of earlier tokens."""
    shadow, batch = random_shadow(phase, K), make_batch(phase, B=2, T=6, K=K, padded=False)
    shadow.shadow.experts = run
    counted = count_flops(lambda: shadow(batch)) / (2 * 6 * LAYERS)
    declared = shadow.flops_per_token_layer(6)
    assert declared is not None
    asked = sum(min(3, LAYERS - p) for p in range(LAYERS))
    heads = 8
    spare = asked * 2 * 8 * heads / LAYERS if phase == "decode" else 0.0
    # The routers that are asked for the forecast are the host's own; a decision asks them once more.
    assert counted == pytest.approx(declared + spare, rel=1e-6)


@pytest.mark.parametrize("name", ["router_lookahead", "mlp", "router_residual"])
def test_the_run_time_call_costs_less_than_a_token_of_the_window(name: str) -> None:
    predictor, batch = fitted(name), make_batch(padded=False)
    step = count_flops(lambda: predictor.step_logits(batch, 0)) / 3
    window = count_flops(lambda: predictor(batch)) / 3
    assert 0 < step < window / 4


def test_the_default_is_what_is_counted() -> None:
    class Plain(Predictor):
        def forward(self, batch: Any) -> Tensor:
            return torch.zeros(1)

    assert Plain(layers=3, experts=6, top_k=2, vocab_size=11, phase="decode").flops_per_token_layer(8) is None
