"""Ensembles against their members: every combination by plain loops, the contract, uncertainty, mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specgate import load_predictor
from specgate.calibration.registry import make_calibrator
from specgate.calibration.temperature import TemperatureScaling
from specgate.calibration.vector import VectorScaling
from specgate.errors import ConfigError
from specgate.metrics.functional import event_scores
from specgate.metrics.uncertainty import PARTS, decompose
from specgate.predictors.base import Predictor
from specgate.predictors.ensemble import COMBINE, Ensemble
from specgate.traces.batch import INVALID, WITHIN, targets
from specgate.training import save_predictor
from tests.predictors.support import EXPERTS, LAYERS, fitted, loader, make_batch, trainer
from tests.predictors.test_causality import T, known, scrambled

MODES = [(phase, K, hidden) for phase in ("prefill", "decode") for K in (1, 2) for hidden in (True, False)]


def calibrated(name: str, phase: str, K: int, hidden: bool, seed: int, **kwargs: Any) -> Predictor:
    """A predictor with random content and a random calibrator."""
    predictor = fitted(name, phase, K=K, hidden=hidden, **kwargs)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    scaling = TemperatureScaling(predictor.lookahead, "softmax" if K == 1 else "sigmoid")
    mild = 2.0 + 0.3 * torch.randn(
        scaling.log_temperature_QH.shape, generator=g
    )  # no probability rounds to 1
    scaling.log_temperature_QH.copy_(mild)
    scaling.events_QH.fill_(1)
    predictor.calibrator = scaling
    return predictor


def ensemble_of(
    combine: str = "mean",
    phase: str = "decode",
    K: int = 2,
    hidden: bool = True,
    third: str = "markov",
    **kwargs: Any,
) -> Ensemble:
    """Two learned predictors and a counted one, one of them foreseeing further than the others."""
    members = [
        calibrated("mlp", phase, K, hidden, 1),
        calibrated("router_residual", phase, K, hidden, 2, lookahead=4),
        calibrated(third, phase, K, hidden, 3),
    ]
    ensemble = Ensemble.of(members, combine=combine, **kwargs).eval()
    if combine == "stacking":
        g = torch.Generator().manual_seed(4)
        ensemble.weight_QHM.copy_(torch.rand(ensemble.weight_QHM.shape, generator=g).softmax(-1))
    return ensemble


def said(ensemble: Ensemble, batch: Any) -> torch.Tensor:
    """What every member says on its own: ``[M, B, T, P, H, E]``."""
    with torch.no_grad():
        return torch.stack(
            [one.probabilities(batch)[..., : ensemble.lookahead, :] for one in ensemble._each()]
        )


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("combine", ["mean", "stacking"])
def test_averages_are_averages_of_calibrated_probabilities(combine: str, K: int) -> None:
    ensemble, batch = ensemble_of(combine, K=K), make_batch(K=K)
    p = said(ensemble, batch)
    with torch.no_grad():
        got = ensemble.probabilities(batch)
    for point, h0 in (ensemble.kinds != INVALID).nonzero().tolist():
        w = ensemble.weight_QHM[int(ensemble.kinds[point, h0]), h0]
        want = sum(float(w[m]) * p[m, :, :, point, h0] for m in range(3))
        torch.testing.assert_close(got[:, :, point, h0], want, rtol=1e-4, atol=1e-6)
    if combine == "mean":
        assert torch.equal(ensemble.weight_QHM, torch.full((3, 3, 3), 1 / 3))
    else:
        assert float(ensemble.weight_QHM.std()) > 0.01


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("combine", ["majority", "borda"])
def test_more_votes_are_larger_logits_and_the_mean_breaks_ties(combine: str, K: int) -> None:
    ensemble, batch = ensemble_of(combine, K=K, third="mlp"), make_batch(K=K, B=1, T=4, padded=False)
    p = said(ensemble, batch)
    with torch.no_grad():
        logits = ensemble(batch)
    places = [(0, t, q, h) for t in range(4) for q in range(LAYERS + 1) for h in range(3)]
    ties = 0
    for place in places:
        votes = [0.0] * EXPERTS
        for m in range(3):
            best = sorted(range(EXPERTS), key=lambda e: -float(p[m][place][e]))
            for rank, e in enumerate(best):
                votes[e] += float(rank < K) if combine == "majority" else EXPERTS - 1 - rank
        mean = [float(p[:, *place, e].mean()) for e in range(EXPERTS)]
        wanted = sorted(range(EXPERTS), key=lambda e: (votes[e], mean[e]))
        assert logits[place].argsort().tolist() == wanted
        ties += EXPERTS - len(set(votes))
    assert ties > 0
    assert bool(logits.isfinite().all())
    if combine == "majority" and K == 2:  # logit 0 is half of the votes, the threshold of membership
        members = (logits > 0).sum(-1)
        assert 1 <= int(members.max()) < EXPERTS


@pytest.mark.parametrize("combine", COMBINE)
def test_members_that_are_one_are_that_one(combine: str) -> None:
    twins = [calibrated("mlp", "decode", 2, True, 1) for _ in range(3)]
    ensemble, batch = Ensemble.of(twins, combine=combine), make_batch()
    with torch.no_grad():
        p, alone = ensemble.probabilities(batch), twins[0].probabilities(batch)
    assert torch.equal(p.topk(2).indices, alone.topk(2).indices)
    if combine in ("mean", "stacking"):
        torch.testing.assert_close(p, alone, rtol=1e-4, atol=1e-6)
    assert float(ensemble.uncertainty(batch)["epistemic"].max()) < 1e-5


@pytest.mark.parametrize("K", [1, 2])
def test_the_average_is_never_worse_than_its_members_on_average(K: int) -> None:
    """Jensen: -ln is convex."""
    ensemble, batch = ensemble_of(K=K), make_batch(K=K)
    experts, valid = targets(batch, 3)
    p = said(ensemble, batch)
    alone = [float(event_scores(one[valid], experts[valid], ["nll"]).mean()) for one in p]
    with torch.no_grad():
        together = ensemble.probabilities(batch)
    nll = float(event_scores(together[valid], experts[valid], ["nll"]).mean())
    assert nll < sum(alone) / 3


# --- the contract ---


@pytest.mark.parametrize(("phase", "K", "hidden"), MODES)
def test_logits_depend_on_nothing_unknown(phase: str, K: int, hidden: bool) -> None:
    ensemble = ensemble_of("stacking", phase, K, hidden)
    batch = make_batch(phase, B=2, T=T, K=K, hidden=hidden, padded=False)
    with torch.no_grad():
        logits = ensemble(batch)
        for t in (0, T - 1):
            for p in range(LAYERS + 1):
                other = scrambled(batch, *known(phase, t, p), seed=10 * t + p)
                there_H = ensemble.kinds[p] != INVALID
                found = ensemble(other)[:, t, p][:, there_H]
                torch.testing.assert_close(found, logits[:, t, p][:, there_H], rtol=1e-4, atol=1e-4)
        changed = ensemble(make_batch(phase, B=2, T=T, K=K, hidden=hidden, padded=False, seed=9))
        assert not torch.allclose(changed, logits, atol=1e-2)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("K", [1, 2])
def test_one_step_is_the_last_row_of_the_window(combine: str, K: int) -> None:
    ensemble, batch = ensemble_of(combine, K=K), make_batch(K=K)
    last = batch.valid_BT.sum(1) - 1
    with torch.no_grad():
        logits = ensemble(batch)
        for layer in range(-1, LAYERS):
            torch.testing.assert_close(
                ensemble.step_logits(batch, layer),
                logits[torch.arange(3), last, layer + 1],
                rtol=1e-4,
                atol=1e-4,
            )
    assert ensemble.predict_next_experts(make_batch(B=1, padded=False, K=K), 0).p_HE.shape == (3, EXPERTS)


@pytest.mark.parametrize("K", [1, 2])
def test_one_step_of_a_calibrator_that_differs_from_point_to_point(K: int) -> None:
    ensemble, batch = ensemble_of(K=K), make_batch(K=K)
    vector = make_calibrator("vector", ensemble)
    assert isinstance(vector, VectorScaling)
    g = torch.Generator().manual_seed(0)
    vector.expert_offset_PHE.copy_(torch.randn(vector.expert_offset_PHE.shape, generator=g))
    ensemble.calibrator = vector
    last = batch.valid_BT.sum(1) - 1
    with torch.no_grad():
        p = ensemble.probabilities(batch)[torch.arange(3), last]
        for layer in range(-1, LAYERS):
            step = ensemble.step_probabilities(batch, layer)
            torch.testing.assert_close(step, p[:, layer + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize(("phase", "K", "hidden"), [("decode", 2, True), ("prefill", 1, False)])
def test_a_checkpoint_needs_no_other_file(
    combine: str, phase: str, K: int, hidden: bool, tmp_path: Path
) -> None:
    ensemble = ensemble_of(combine, phase, K, hidden, labels=["a", "b", "c"])
    ensemble.calibrator = TemperatureScaling(3, "softmax" if K == 1 else "sigmoid")
    ensemble.calibrator.log_temperature_QH.fill_(0.5)
    file = save_predictor(ensemble, tmp_path / "predictor.ckpt")
    content = torch.load(file, weights_only=True)
    assert [one["predictor"] for one in content["hyper_parameters"]["members"]] == [
        "mlp",
        "router_residual",
        "markov",
    ]
    again, batch = load_predictor(file), make_batch(phase, K=K, hidden=hidden)
    assert isinstance(again, Ensemble)
    assert (again.labels, again.combine) == (["a", "b", "c"], combine)
    with torch.no_grad():
        torch.testing.assert_close(again.probabilities(batch), ensemble.probabilities(batch))
    torch.testing.assert_close(again.uncertainty(batch), ensemble.uncertainty(batch))


def test_an_ensemble_can_be_a_member(tmp_path: Path) -> None:
    inner = ensemble_of("borda")
    outer = Ensemble.of([inner, calibrated("mlp", "decode", 2, True, 9)])
    again = load_predictor(save_predictor(outer, tmp_path / "predictor.ckpt"))
    with torch.no_grad():
        torch.testing.assert_close(again(make_batch()), outer(make_batch()))


# --- uncertainty ---


@pytest.mark.parametrize("combine", ["mean", "stacking"])
@pytest.mark.parametrize("K", [1, 2])
def test_uncertainty_is_the_decomposition_of_what_members_say(combine: str, K: int) -> None:
    ensemble, batch = ensemble_of(combine, K=K), make_batch(K=K)
    found = ensemble.uncertainty(batch)
    kinds = ensemble.kinds.clamp(min=0)
    weights = torch.stack([ensemble.weight_QHM[kinds, torch.arange(3)][..., m] for m in range(3)])
    want = decompose(said(ensemble, batch).double(), K, weights[:, None, None].double())
    for part in PARTS:
        assert found[part].shape == (3, 8, LAYERS + 1, 3)
        torch.testing.assert_close(found[part].double(), want[part], rtol=1e-3, atol=1e-4)
    assert float(found["epistemic"][..., ensemble.kinds == WITHIN].min()) > 0


# --- settings and mistakes ---


def test_horizons_are_the_least_of_the_members_or_fewer() -> None:
    assert ensemble_of().lookahead == 3
    short, batch = ensemble_of(lookahead=2), make_batch()
    with torch.no_grad():
        torch.testing.assert_close(short(batch), ensemble_of()(batch)[..., :2, :])


def test_members_without_hidden_states_make_an_id_only_ensemble() -> None:
    assert ensemble_of(hidden=False).hidden_size is None
    one, other = calibrated("mlp", "decode", 2, False, 1), calibrated("markov", "decode", 2, False, 3)
    fields = {k: one.hparams[k] for k in ("layers", "experts", "top_k", "vocab_size", "phase", "lookahead")}
    assert Ensemble(members=[one, other], hidden_size=8, **fields).hidden_size is None
    mixed = Ensemble.of([one, calibrated("mlp", "decode", 2, True, 1)])
    assert mixed.hidden_size == 8
    assert bool(mixed.probabilities(make_batch()).isfinite().all())


def test_members_stay_as_they_were_trained(tmp_path: Path) -> None:
    dropping = [calibrated("mlp", "decode", 2, True, s, dropout=0.5) for s in (1, 2)]
    ensemble, batch = Ensemble.of(dropping).train(), make_batch()
    assert ensemble.training
    torch.testing.assert_close(ensemble(batch), ensemble(batch))
    assert not any(p.requires_grad for p in ensemble.parameters())
    with pytest.raises(ConfigError, match="not trained: train its members"):
        trainer(tmp_path, max_epochs=1).fit(ensemble, loader([batch]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "prefill"}, "trained for phase=prefill and the ensemble is of phase=decode"),
        ({"K": 1}, "trained for top_k=1 and the ensemble is of top_k=2"),
        ({"lookahead": 2}, "foresees 2 layers ahead, the ensemble should foresee 3: set lookahead=2"),
        ({"vocab_size": 5}, "knows 5 token ids and the ensemble 11"),
    ],
)
def test_members_must_fit_together(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"phase": "decode", "K": 2} | change
    first, other = calibrated("mlp", "decode", 2, True, 1), fitted("markov", **settings)
    fields = {k: first.hparams[k] for k in ("layers", "experts", "top_k", "vocab_size", "phase", "lookahead")}
    with pytest.raises(ConfigError, match=f"member markov .*{message}"):
        Ensemble(members=[first, other], hidden_size=8, **fields)


def test_mistakes_are_named() -> None:
    one = fitted("mlp")
    with pytest.raises(ConfigError, match="combine='median' is unknown: choose one of mean, majority"):
        Ensemble.of([one, one], combine="median")
    for few in ([], [one]):
        with pytest.raises(ConfigError, match=f"ensemble of {len(few)} predictors is none"):
            Ensemble.of(few)
    fields = {k: one.hparams[k] for k in ("layers", "experts", "top_k", "vocab_size", "phase", "lookahead")}
    with pytest.raises(ConfigError, match="needs hidden states of 8 values and there are none"):
        Ensemble(members=[one, one], hidden_size=None, **fields)
    whole = fitted("mlp", "prefill", bidirectional=True)
    with pytest.raises(ConfigError, match="later tokens"):
        Ensemble(members=[whole, whole], hidden_size=8, **(fields | {"phase": "prefill"}))
    packed = fitted("mlp")
    packed.quantization = {"bits": 8, "group": 32}
    with pytest.raises(ConfigError, match="is packed: combine checkpoints as trained"):
        Ensemble.of([one, packed])
