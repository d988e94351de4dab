"""The contract: forecasts, their errors, the loss, metrics, chunks, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from specgate.errors import ConfigError, SpecgateError, TraceError
from specgate.forecast import Forecast
from specgate.predictors import predictor_class
from specgate.predictors.base import WarmupCosine, batch_chunks
from specgate.traces.batch import RoutingBatch, targets
from tests.predictors.support import (
    EXPERTS,
    LAYERS,
    fitted,
    loader,
    make_batch,
    make_predictor,
    trainer,
    variants,
)


def one(batch: RoutingBatch, b: int, tokens: int) -> RoutingBatch:
    """The first tokens of one sequence."""
    parts = {k: v[b : b + 1] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(batch, **{k: v[:, :tokens] if v.dim() > 1 else v for k, v in parts.items()})


# --- forecasts ---


@pytest.mark.parametrize("name", ["markov", "router_residual"])
@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_next_experts_are_the_rows_of_the_last_token(name: str, layer: int) -> None:
    predictor, batch = fitted(name), make_batch()
    state = one(batch, 0, 5)
    forecast = predictor.predict_next_experts(state, layer)
    with torch.no_grad():
        p = predictor.probabilities(batch)[0, 4, layer + 1]
    torch.testing.assert_close(forecast.p_HE, p)
    assert forecast.source_layer == layer
    assert forecast.horizon_H.tolist() == [1, 2, 3]
    assert forecast.target_layer_H.tolist() == [(layer + h) % LAYERS for h in (1, 2, 3)]
    assert forecast.next_token_H.tolist() == [layer + h >= LAYERS for h in (1, 2, 3)]


def test_while_decoding_the_default_is_the_finished_token() -> None:
    predictor, state = fitted("mlp"), one(make_batch(), 1, 4)
    a, b = predictor.predict_next_experts(state), predictor.predict_next_experts(state, LAYERS - 1)
    torch.testing.assert_close(a.p_HE, b.p_HE)
    assert bool(a.next_token_H.all())


def test_padding_does_not_count_as_the_last_token() -> None:
    predictor, batch = fitted("mlp"), make_batch()
    padded, bare = one(batch, 2, 8), one(batch, 2, 5)  # the third sequence has 5 tokens
    torch.testing.assert_close(
        predictor.predict_next_experts(padded, 0).p_HE, predictor.predict_next_experts(bare, 0).p_HE
    )


def test_several_sequences_merge_into_any_of_them() -> None:
    predictor, batch = fitted("mlp"), make_batch(padded=False)
    merged = predictor.predict_next_experts(batch, 1)
    parts = [predictor.predict_next_experts(one(batch, b, 8), 1) for b in range(3)]
    torch.testing.assert_close(merged.p_HE, Forecast.merge(parts).p_HE)


@pytest.mark.parametrize("name", ["recency", "mlp"])
def test_a_single_layer_is_the_row_of_the_whole_forecast(name: str) -> None:
    predictor, state = fitted(name), one(make_batch(), 0, 6)
    for current in range(-1, LAYERS):
        whole = predictor.predict_next_experts(state, current)
        for target in set(range(LAYERS)) - {current}:
            ahead = target - current if target > current else target - current + LAYERS
            got = predictor.predict_experts_at_layer(current, target, state)
            torch.testing.assert_close(got.p_HE, whole.p_HE[ahead - 1 : ahead])
            assert got.target_layer_H.tolist() == [target]
            assert got.next_token_H.tolist() == [target < current]
            assert got.horizon_H.tolist() == [ahead]


def test_prefill_leaves_out_what_lies_behind_the_last_layer() -> None:
    predictor, state = fitted("mlp", "prefill"), one(make_batch("prefill"), 0, 6)
    assert predictor.predict_next_experts(state, 1).target_layer_H.tolist() == [2]
    with pytest.raises(SpecgateError, match="nothing to foresee"):
        predictor.predict_next_experts(state, 2)
    with pytest.raises(SpecgateError, match="say layer="):
        predictor.predict_next_experts(state)
    with pytest.raises(SpecgateError, match="does not come back"):
        predictor.predict_experts_at_layer(1, 0, state)


def test_impossible_targets_are_refused_in_one_sentence() -> None:
    predictor, state = fitted("mlp", lookahead=1), one(make_batch(), 0, 6)
    with pytest.raises(SpecgateError, match="layer 1 is being routed now"):
        predictor.predict_experts_at_layer(1, 1, state)
    with pytest.raises(SpecgateError, match="2 ahead of layer 0, the predictor foresees 1"):
        predictor.predict_experts_at_layer(0, 2, state)
    with pytest.raises(SpecgateError, match=r"target_layer 3 is outside 0\.\.2"):
        predictor.predict_experts_at_layer(0, 3, state)
    with pytest.raises(SpecgateError, match=r"current_layer -2 is outside -1\.\.2"):
        predictor.predict_experts_at_layer(-2, 1, state)
    with pytest.raises(SpecgateError, match="layer 7 is outside"):
        predictor.predict_next_experts(state, 7)
    with pytest.raises(SpecgateError, match="no token yet"):
        predictor.predict_next_experts(replace(state, valid_BT=torch.zeros_like(state.valid_BT)), 0)


def test_another_trace_is_refused() -> None:
    predictor = fitted("mlp", "decode")
    with pytest.raises(TraceError, match="phase=prefill"):
        predictor.predict_next_experts(make_batch("prefill"), 0)
    with pytest.raises(TraceError, match="K=1"):
        predictor.predict_next_experts(make_batch(K=1), 0)
    with pytest.raises(TraceError, match="hidden states of 8 values"):
        predictor.predict_next_experts(make_batch(hidden=False), 0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"phase": "both"}, "phase 'both'"),
        ({"lookahead": 0}, "lookahead 0"),
        ({"lookahead": 7}, "lookahead 7"),
        ({"predictor": "markov"}, "checkpoint of 'markov'"),
    ],
)
def test_senseless_settings_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_predictor("mlp", **kwargs)


# --- probabilities, loss, recall ---


def test_links() -> None:
    batch = make_batch(K=1)
    torch.testing.assert_close(fitted("mlp", K=1).probabilities(batch).sum(-1), torch.ones(3, 8, 4, 3))
    predictor = fitted("mlp")
    logits = predictor(make_batch())
    torch.testing.assert_close(predictor.probabilities(make_batch()) > 0.5, logits > 0)


@pytest.mark.parametrize("K", [1, 2])
def test_loss_is_the_mean_over_valid_cells(K: int) -> None:
    predictor, batch = fitted("mlp", K=K), make_batch(K=K, context=2)
    logits, (experts, valid) = predictor(batch), targets(batch, 3)
    total = 0.0
    for b, t, p, h in valid.nonzero().tolist():
        z = logits[b, t, p, h]
        if K == 1:
            total += float(F.cross_entropy(z, experts[b, t, p, h, 0]))
        else:
            used = torch.zeros(EXPERTS).index_fill_(0, experts[b, t, p, h], 1.0)
            total += float(F.binary_cross_entropy_with_logits(z, used, reduction="sum"))
    assert float(predictor.loss(logits, experts, valid)) == pytest.approx(total, rel=1e-4)


def test_hits_count_the_used_among_the_largest() -> None:
    predictor, batch = fitted("mlp"), make_batch()
    logits, (experts, valid) = predictor(batch), targets(batch, 3)
    hits = predictor.hits(logits, experts)
    for b, t, p, h in valid.nonzero()[::7].tolist():
        top = set(logits[b, t, p, h].topk(2).indices.tolist())
        assert int(hits[b, t, p, h]) == len(top & set(experts[b, t, p, h].tolist()))


def test_chunks_change_neither_loss_nor_gradient(tmp_path: Path) -> None:
    gradients = []
    for max_logits in (10**9, 1):
        predictor = fitted("mlp", max_logits=max_logits, dropout=0.0)
        predictor.log = lambda *a, **k: None  # type: ignore[method-assign]
        predictor.train()
        loss = predictor.training_step(make_batch(), 0)
        assert loss is not None
        loss.backward()
        gradients.append((float(loss), predictor.head.first.weight.grad))  # type: ignore[union-attr,operator]
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-5)
    assert [len(c.valid_BT) for c in batch_chunks(make_batch(), 2)] == [2, 1]


def test_validation_logs_recall_per_horizon(tmp_path: Path) -> None:
    predictor, batches = fitted("markov"), [make_batch(seed=s) for s in range(3)]
    found = trainer(tmp_path).validate(predictor, loader(batches), verbose=False)[0]
    assert set(found) == {"val/loss", "val/recall", "val/recall_n1", "val/recall_n2"}  # N+3 never lies within
    hit, cells = 0.0, 0
    for batch in batches:
        experts, valid = targets(batch, 3)
        hit += float(predictor.hits(predictor(batch), experts)[valid].sum()) / 2
        cells += int(valid.sum())
    assert found["val/recall"] == pytest.approx(hit / cells, rel=1e-5)


def test_learning_rate_rises_then_falls() -> None:
    rate = WarmupCosine(100, 0.1)
    values = [rate(step) for step in range(100)]
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert max(values) == 1.0
    assert values[-1] < 0.05
    assert WarmupCosine(float("inf"), 0.1)(10**6) == 1.0


# --- checkpoints ---


@pytest.mark.parametrize(("name", "phase", "K", "hidden"), variants())
def test_checkpoint_is_plain_and_complete(
    name: str, phase: str, K: int, hidden: bool, tmp_path: Path
) -> None:
    predictor = make_predictor(name, phase, K=K, hidden=hidden)
    batches = [make_batch(phase, K=K, hidden=hidden, seed=s) for s in range(2)]
    run = trainer(tmp_path, max_epochs=1)
    run.fit(predictor, loader(batches), loader(batches))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["predictor"] == name
    again = predictor_class(name)(**saved["hyper_parameters"])
    again.load_state_dict(saved["state_dict"])
    predictor.eval(), again.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(batches[0]), predictor(batches[0]))
