"""``meta_moe``: the gate chooses and weighs, branches keep to their evidence, it says what it went by.

Letters: B sequences, T tokens, P source points, H horizons, E experts, K experts per token, J branches.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specgate.errors import ConfigError
from specgate.predictors.meta_moe import MetaMoE, entropy, imbalance
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch, targets
from tests.predictors.support import (
    EXPERTS,
    LAYERS,
    SMALL,
    VOCAB,
    fitted,
    loader,
    make_batch,
    make_predictor,
    trainer,
)


def make_meta(phase: str = "decode", **kwargs: Any) -> MetaMoE:
    """One with every parameter random."""
    predictor = fitted("meta_moe", phase, **kwargs)
    assert isinstance(predictor, MetaMoE)
    return predictor


# --- the gate ---


@pytest.mark.parametrize("active", [1, 2, 5])
def test_so_many_branches_are_in_use_and_their_weights_add_up(active: int) -> None:
    model = make_meta(active=active)
    with torch.no_grad():
        _, weight, scores = model.mixed(make_batch())
    assert weight.shape[-1] == 5
    assert bool(((weight > 0).sum(-1) == active).all())
    torch.testing.assert_close(weight.sum(-1), torch.ones(weight.shape[:-1]))
    best = scores.topk(active, dim=-1).indices
    torch.testing.assert_close(weight.gather(-1, best), scores.gather(-1, best).softmax(-1))


def test_noise_moves_the_choice_in_training_only() -> None:
    model = make_meta(noise=3.0, dropout=0.0)
    batch = make_batch()
    with torch.no_grad():
        calm = [model.mixed(batch)[1] for _ in range(2)]
        model.train()
        torch.manual_seed(0)
        noisy = [model.mixed(batch)[1] for _ in range(2)]
    assert torch.equal(calm[0], calm[1])
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_the_mixture_is_the_weighted_mean_of_what_the_branches_say(K: int, combine: str) -> None:
    model, batch = make_meta(K=K, combine=combine), make_batch(K=K)
    with torch.no_grad():
        logits, weight, _ = model.mixed(batch)
        opinions = model.opinions(model.seen(batch))
        found = model.probabilities(batch)
    for b, t, p, h in [(0, 3, 0, 0), (1, 5, 1, 2), (2, 1, 3, 1), (0, 0, 2, 0)]:
        total = torch.zeros(EXPERTS)
        for j, z in enumerate(opinions):
            said = z[b, t, p, h]
            if combine == "probabilities":
                said = said.softmax(-1) if K == 1 else said.sigmoid()
            total += weight[b, t, p, h, j] * said
        if combine == "probabilities":
            torch.testing.assert_close(found[b, t, p, h], total, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(logits[b, t, p, h], total, rtol=1e-4, atol=1e-5)


def test_a_certain_branch_does_not_overflow() -> None:
    model = make_meta()
    with torch.no_grad():
        for branch in model.branches.values():
            for parameter in branch.parameters():
                parameter.mul_(100)
    logits = model(make_batch())
    logits.sum().backward()
    assert bool(torch.isfinite(logits).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("K", [1, 2])
def test_at_the_start_it_is_the_router(phase: str, K: int) -> None:
    batch = make_batch(phase, K=K)
    ours = make_predictor("meta_moe", phase, K=K, **SMALL["meta_moe"]).eval()
    within = ours.kinds == WITHIN
    router = make_predictor("router_lookahead", phase, K=K)
    found, expected = ours.probabilities(batch), router.probabilities(batch)
    torch.testing.assert_close(found[:, :, within], expected[:, :, within], rtol=1e-4, atol=1e-5)
    others = found[:, :, (ours.kinds != WITHIN) & (ours.kinds != INVALID)]
    torch.testing.assert_close(others, torch.full_like(others, K / EXPERTS if K > 1 else 1 / EXPERTS))


# --- load balance ---


def test_imbalance_is_one_when_even_and_the_number_of_branches_when_one_does_all() -> None:
    J = 4
    even = torch.eye(J).repeat(3, 1)
    assert float(imbalance(even, torch.zeros(3 * J, J))) == pytest.approx(1.0)
    alone = torch.zeros(6, J)
    alone[:, 2] = 1.0
    assert float(imbalance(alone, alone * 50)) == pytest.approx(J)


def test_imbalance_is_switchs_sum() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 3, generator=g)
    best = scores.topk(2, dim=-1).indices
    weight = torch.zeros(50, 3).scatter(-1, best, 0.5)
    share = [sum(1 for n in range(50) if weight[n, j] > 0) / 100 for j in range(3)]
    mean = [sum(float(scores[n].softmax(0)[j]) for n in range(50)) / 50 for j in range(3)]
    assert float(imbalance(weight, scores)) == pytest.approx(
        3 * sum(a * b for a, b in zip(share, mean, strict=True))
    )


def test_training_with_the_term_spreads_the_load(tmp_path: Path) -> None:
    loads = []
    for balance in (0.0, 3.0):
        torch.manual_seed(0)
        model = make_predictor("meta_moe", "prefill", balance=balance, lr=0.02, **SMALL["meta_moe"])
        assert isinstance(model, MetaMoE)
        with torch.no_grad():  # it begins with a favourite
            model.gate_out.bias_P1.view(LAYERS + 1, 3, -1)[..., 4] += 2.0
        batches = [make_batch("prefill", B=4, T=12, seed=s) for s in range(4)]
        trainer(tmp_path, max_epochs=15).fit(model, loader(batches))
        trainer(tmp_path).validate(model, loader(batches[:1]), verbose=False)
        loads.append(model.report()["gate"]["load_entropy"])
    assert loads[1] > loads[0] + 0.1


# --- branches ---


def changed(batch: RoutingBatch, what: str, t: int) -> RoutingBatch:
    """The batch with one kind of evidence of token t replaced."""
    other = replace(
        batch,
        experts_BTLK=batch.experts_BTLK.clone(),
        token_ids_BT=batch.token_ids_BT.clone(),
        hidden_BTLD=None if batch.hidden_BTLD is None else batch.hidden_BTLD.clone(),
    )
    if what == "id":
        other.token_ids_BT[:, t] = (batch.token_ids_BT[:, t] + 1) % VOCAB
    elif what == "hidden":
        assert other.hidden_BTLD is not None
        other.hidden_BTLD[:, t] += torch.randn(other.hidden_BTLD[:, t].shape)
    else:
        other.experts_BTLK[:, t] = (batch.experts_BTLK[:, t] + 1) % EXPERTS
    return other


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_branches_keep_to_their_own_evidence(phase: str) -> None:
    model, batch = make_meta(phase), make_batch(phase, padded=False)
    t, p = 4, 1
    expected = {
        "hidden": {"hidden"},
        "transition": {"experts"},
        "token": {"id"},
        "history": {"past experts"},
        "deep": {"hidden", "experts", "id", "past experts", "past id"},
    }
    changes = [("hidden", t), ("experts", t), ("id", t), ("experts", t - 3), ("id", t - 3)]
    found: dict[str, set[str]] = {name: set() for name in model.branches}
    with torch.no_grad():
        for what, where in changes:
            other = changed(batch, what, where)
            for name, branch in model.branches.items():
                was, now = (branch(model.seen(x))[:, t, p, 0] for x in (batch, other))
                if not torch.allclose(was, now, atol=1e-6):
                    found[name].add(what if where == t else f"past {what}")
    assert found == expected


def test_branches_without_hidden_states() -> None:
    assert list(make_meta(hidden=False).branches) == ["transition", "token", "history", "deep"]


# --- what it went by ---


def tallied(model: MetaMoE, batches: list[RoutingBatch], p: int, h: int) -> tuple[Tensor, float]:
    """Mean weights and entropy at one (point, horizon), by loops over cells."""
    total, nats, n = torch.zeros(len(model.branches)), 0.0, 0
    for batch in batches:
        with torch.no_grad():
            weight = model.mixed(batch)[1]
        for b, t in targets(batch, 3)[1][:, :, p, h].nonzero().tolist():
            total += weight[b, t, p, h]
            nats -= sum(w * math.log(w) for w in weight[b, t, p, h].tolist() if w > 0)
            n += 1
    return total / n, nats / n


def test_validation_logs_and_reports_the_gate(tmp_path: Path) -> None:
    model, batches = make_meta(max_logits=1), [make_batch(seed=s) for s in range(3)]  # in chunks
    assert model.report() == {}
    run = trainer(tmp_path)
    run.validate(model, loader(batches[:1]), verbose=False)  # forgotten by the next validation
    logged = run.validate(model, loader(batches), verbose=False)[0]
    gate = model.report()["gate"]
    assert json.loads(json.dumps(gate)) == gate
    assert {f"val/gate_{name}" for name in model.branches} < set(logged)
    assert logged["val/gate_entropy"] == pytest.approx(gate["entropy"], abs=1e-4)
    for name, share in gate["usage"].items():
        assert logged[f"val/gate_{name}"] == pytest.approx(share, abs=1e-4)
    assert sum(gate["usage"].values()) == pytest.approx(1, abs=1e-4)
    rows = {(row["layer"], row["horizon"]): row for row in gate["by_layer_and_horizon"]}
    assert set(rows) == {(p - 1, h + 1) for p in range(4) for h in range(3) if model.kinds[p, h] != INVALID}
    for layer, horizon in [(-1, 1), (0, 3), (2, 2)]:
        usage, nats = tallied(model, batches, layer + 1, horizon - 1)
        row = rows[layer, horizon]
        assert list(row["usage"].values()) == pytest.approx(usage.tolist(), abs=1e-4)
        assert row["entropy"] == pytest.approx(nats, abs=1e-4)


def test_the_report_travels_in_the_state(tmp_path: Path) -> None:
    model = make_meta()
    trainer(tmp_path).validate(model, loader([make_batch()]), verbose=False)
    again = make_meta()
    again.load_state_dict(model.state_dict())
    assert again.report() == model.report() != {}


def test_entropy_of_a_sure_gate_is_zero() -> None:
    assert float(entropy(torch.tensor([0.0, 1.0, 0.0]))) == 0.0
    assert float(entropy(torch.full((4,), 0.25))) == pytest.approx(math.log(4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"combine": "votes"}, "combine='votes'"), ({"active": 6}, r"active=6 is outside 1\.\.5")],
)
def test_senseless_settings_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_predictor("meta_moe", **kwargs)


def test_every_parameter_is_trained_and_under_bfloat16() -> None:
    model = make_predictor("meta_moe", active=5, **SMALL["meta_moe"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_loss(make_batch())
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
