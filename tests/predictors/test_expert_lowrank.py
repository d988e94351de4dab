"""Only the chosen experts' units run, the lighter ones fewer; the cost stated is the cost of those.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specgate.errors import ConfigError
from specgate.predictors.expert_lowrank import ExpertLowRank
from specgate.traces.batch import WITHIN
from tests.predictors.support import EXPERTS, LAYERS, fitted, make_batch, make_predictor


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_untrained_it_says_what_the_router_says(phase: str) -> None:
    batch = make_batch(phase, K=2)
    mine, router = make_predictor("expert_lowrank", phase, K=2).eval(), fitted("router_lookahead", phase, K=2)
    within_PH = mine.kinds == WITHIN
    with torch.no_grad():
        a, b = mine(batch)[:, :, within_PH], router(batch)[:, :, within_PH]
    torch.testing.assert_close(a[batch.valid_BT], b[batch.valid_BT], rtol=1e-4, atol=1e-4)


def test_units_of_other_experts_and_beyond_a_ranks_share_are_silent() -> None:
    model = fitted("expert_lowrank", "prefill", K=2, units=[6, 2], reuse=False, foresee=None)
    assert isinstance(model, ExpertLowRank)
    batch = make_batch("prefill", B=1, T=3, K=2, padded=False)
    batch.experts_BTLK[0, :, 0] = torch.tensor([0, 1])  # 0 the heavier one, of every token at layer 0
    with torch.no_grad():
        before = model(batch)
        weight = model.into.weight[1].view(-1, EXPERTS, 6)  # point 1 reads layer 0
        weight[:, 2:] = 9.0  # experts that were not chosen
        weight[:, 1, 2:] = 9.0  # what the lighter one does not run
        assert torch.equal(model(batch)[:, :, 1], before[:, :, 1])
        for expert, unit in ((0, 5), (1, 1)):  # the last unit that each runs
            kept = weight[:, expert, unit].clone()
            weight[:, expert, unit] = 9.0
            assert not torch.equal(model(batch)[:, :, 1], before[:, :, 1])
            weight[:, expert, unit] = kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": [3, 2, 1]}, r"units=\[3, 2, 1\] is not one number, or 2"),
        ({"foresee": [2, 3]}, r"foresee=\[2, 3\] is no list of at most 6 numbers of units, falling"),
        ({"foresee": [1] * 7}, r"foresee=.* is no list of at most 6 numbers"),
        ({"span": 0}, "span=0 leaves the heads no token to look at"),
        ({"ngram_rows": -1}, "ngram_rows=-1 is no size of a table"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_predictor("expert_lowrank", K=2, **options)


def test_units_of_foreseen_experts_write_beyond_the_layer_that_they_are_foreseen_for() -> None:
    model = fitted("expert_lowrank", "prefill", K=2, reuse=False, foresee=[2])
    assert isinstance(model, ExpertLowRank)
    assert model.ahead is not None
    batch = make_batch("prefill", K=2, padded=False)
    with torch.no_grad():
        before = model(batch)
        first_BT = before[:, :, 1, 0].argmax(-1)  # whom point 1 foresees in layer 1
        model.ahead.out.weight.view(LAYERS + 1, EXPERTS, 2, -1)[1, 0] = 7.0
        after = model(batch)
    changed_BTH = (after != before).any(-1)[:, :, 1]
    assert not changed_BTH[..., 0].any()
    assert torch.equal(changed_BTH[..., 1], first_BT == 0)
    assert bool((first_BT == 0).any())
    assert bool((first_BT != 0).any())


def test_the_heaviest_experts_map_is_the_one_that_counts() -> None:
    model = fitted("expert_lowrank", "prefill", K=2, reuse=False, foresee=None, heads=0)
    assert isinstance(model, ExpertLowRank)
    assert model.linear_own is not None
    batch = make_batch("prefill", K=2, padded=False)
    with torch.no_grad():
        before = model(batch)
        model.linear_own.weight[1, 3] = 0.0  # point 1, after layer 0
        changed_BT = (model(batch) != before)[:, :, 1].flatten(2).any(-1)
    assert torch.equal(changed_BT, batch.experts_BTLK[:, :, 0, 0] == 3)
    assert bool(changed_BT.any())


def test_no_head_looks_further_back_than_its_span() -> None:
    options: dict[str, Any] = {"reuse": False, "shift": False, "depth": False, "foresee": None}
    model = fitted("expert_lowrank", "prefill", K=2, span=3, **options)
    batch = make_batch("prefill", K=2, padded=False)
    assert batch.hidden_BTLD is not None
    other = replace(batch, hidden_BTLD=batch.hidden_BTLD.clone())
    assert other.hidden_BTLD is not None
    other.hidden_BTLD[:, 2] += 1.0
    with torch.no_grad():
        changed_T = (model(batch) - model(other)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert changed_T.tolist() == [t in (2, 3, 4) for t in range(8)]


def test_a_points_correction_goes_on_to_the_next_point() -> None:
    model = fitted("expert_lowrank", "prefill", K=2)
    assert isinstance(model, ExpertLowRank)
    assert model.reuse_PHE is not None
    new = torch.randn(2, 3, LAYERS + 1, 3, EXPERTS)
    out = model.carried(new)
    for p in range(1, LAYERS + 1):
        for h in range(3):
            want = new[:, :, p, h]
            if h + 1 < 3:
                want = want + out[:, :, p - 1, h + 1] * model.reuse_PHE[p, h]
            torch.testing.assert_close(out[:, :, p, h], want)


@pytest.mark.parametrize("foresee", [None, [2] * EXPERTS])
def test_stated_cost_is_the_counted_cost_of_a_dense_copy(foresee: list[int] | None) -> None:
    """With every expert chosen (K = E) nothing is spared, and the products that torch counts are those
    stated: up to points with nothing to foresee, the router prior (folded into the linear map) and what costs
    no product."""
    K, T = EXPERTS, 8
    model = make_predictor(
        "expert_lowrank", "decode", K=K, units=3, heads=2, value_width=8, head_width=4, shift=False,
        foresee=foresee,
    )  # fmt: skip
    assert isinstance(model, ExpertLowRank)
    batch = make_batch("decode", B=2, T=T, K=K, padded=False)
    batch = replace(batch, hidden_BTLD=batch.hidden_BTLD)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(batch)
    prior = 2 * LAYERS * 3 * EXPERTS * 8  # the router's own scores, per token
    recent = 2 * 2 * T * LAYERS * EXPERTS  # the decay matrices of the recency features
    dense = counter.get_total_flops() / (2 * T) - prior - recent
    P = LAYERS + 1
    hidden_at_first_point = dense / P - 2 * (32 + K) * 3 * EXPERTS  # p = 0 is a constant there
    attention_half = 2 * P * (T / 2) * 2 * (4 + 8)  # half of the pairs lie in the future
    stated = model.flops_per_token_layer(T)
    assert stated is not None
    assert stated * LAYERS == pytest.approx(dense - hidden_at_first_point - attention_half, rel=0.1)


def test_fewer_units_cost_less_and_longer_contexts_more() -> None:
    few, many = (make_predictor("expert_lowrank", "prefill", K=2, units=n) for n in ([4, 1], 4))
    costs = [few.flops_per_token_layer(64), many.flops_per_token_layer(64), many.flops_per_token_layer(128)]
    near, own, ahead = (
        make_predictor("expert_lowrank", "prefill", K=2, units=4, **options)
        for options in ({"span": 32}, {"by_expert": True}, {"foresee": [1]})
    )
    full = many.flops_per_token_layer(128)
    assert full is not None
    assert near.flops_per_token_layer(32) == many.flops_per_token_layer(32)
    assert (near.flops_per_token_layer(128) or full) < full
    assert own.flops_per_token_layer(128) == full
    assert (ahead.flops_per_token_layer(128) or 0) > full
    assert None not in costs
    assert costs == sorted(costs, key=float)  # type: ignore[arg-type]
    assert len(set(costs)) == 3
