"""``seq2seq``: joint paths against enumeration, and what a path knows that marginals cannot.

Letters: B sequences, T tokens, N = B * T, P source points, H horizons, E experts, K experts per token, W
paths.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specgate.errors import ConfigError, SpecgateError
from specgate.predictors.paths import joint_hit_rates, log_normaliser, path_hits, set_log_p
from specgate.predictors.seq2seq import Seq2Seq
from specgate.traces.batch import RoutingBatch, targets
from tests.predictors.support import EXPERTS, LAYERS, fitted, loader, make_batch, make_predictor, trainer

Path_ = tuple[tuple[int, ...], ...]


def sets(K: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(EXPERTS), K))


def enumerated(model: Seq2Seq, batch: RoutingBatch, point: int, token: int, H: int) -> dict[Path_, float]:
    """Every path's probability by brute force: the teacher-forced decoder on each path, sets weighed by
    products of odds."""
    K, every = model.top_k, list(itertools.product(sets(model.top_k), repeat=H))
    used = torch.zeros(len(every), H, EXPERTS)
    for i, path in enumerate(every):
        for h0, chosen in enumerate(path):
            used[i, h0, list(chosen)] = 1.0
    with torch.no_grad():
        start_PNU, direct_PNHE = model.encode(batch)
        state = start_PNU[:, token : token + 1].expand(-1, len(every), -1)
        direct = direct_PNHE[:, token : token + 1].expand(-1, len(every), -1, -1)
        taken = torch.zeros(model.layers + 1, len(every), model.lookahead, EXPERTS)
        taken[point, :, :H] = used
        z = (model.decode(state, direct, taken)[point] * model.sharp_PH[point, :, None]).double()
    probability = {}
    for i, path in enumerate(every):
        p = 1.0
        for h0, chosen in enumerate(path):
            odds = z[i, h0].exp().tolist()
            total = sum(math.prod(odds[e] for e in other) for other in sets(K))
            p *= math.prod(odds[e] for e in chosen) / total
        probability[path] = p
    return probability


def as_path(experts_HK: Tensor) -> Path_:
    return tuple(tuple(step) for step in experts_HK.tolist())


@pytest.mark.parametrize(("phase", "hidden"), [("decode", False), ("prefill", True)])
@pytest.mark.parametrize(("K", "layer"), [(1, 0), (1, -1), (2, 0)])
def test_a_wide_beam_is_exhaustive_enumeration(phase: str, hidden: bool, K: int, layer: int) -> None:
    model = fitted("seq2seq", phase, K=K, hidden=hidden)
    assert isinstance(model, Seq2Seq)
    batch = make_batch(phase, B=1, T=4, K=K, hidden=hidden, padded=False)
    model.sharp_PH.copy_(torch.rand(LAYERS + 1, 3, generator=torch.Generator().manual_seed(4)) + 0.5)
    H = 3 if phase == "decode" or layer == -1 else 2  # prefill has no layer behind the last one
    oracle = enumerated(model, batch, layer + 1, 3, H)
    assert sum(oracle.values()) == pytest.approx(1.0, abs=1e-6)
    found = model.beam_search(batch, layer, beams=10**6, candidates=EXPERTS)
    assert found.experts_BWHK.shape == (1, len(oracle), H, K)
    assert float(found.log_p_BW.double().exp().sum()) == pytest.approx(1.0, abs=1e-4)
    for experts_HK, log_p in zip(found.experts_BWHK[0], found.log_p_BW[0].tolist(), strict=True):
        assert log_p == pytest.approx(math.log(oracle[as_path(experts_HK)]), abs=1e-3)
    assert (found.log_p_BW.diff() <= 0).all()
    assert found.target_layer_H.tolist() == [(layer + h) % LAYERS for h in range(1, H + 1)]
    assert found.next_token_H.tolist() == [layer + h >= LAYERS for h in range(1, H + 1)]


def test_a_narrow_beam_keeps_real_paths_and_a_wider_one_never_loses() -> None:
    model, batch = fitted("seq2seq", K=2, hidden=False), make_batch(K=2, hidden=False)
    assert isinstance(model, Seq2Seq)
    exact = model.beam_search(batch, 0, beams=10**6, candidates=EXPERTS)
    best = [model.beam_search(batch, 0, beams=w, candidates=4).log_p_BW[:, 0] for w in (1, 4, 64)]
    assert (best[0] <= best[1] + 1e-6).all()
    assert (best[1] <= best[2] + 1e-6).all()
    assert (best[2] <= exact.log_p_BW[:, 0] + 1e-5).all()
    narrow = model.beam_search(batch, 0, beams=4)
    for b in range(3):  # each sequence from its own last token
        by_path = {
            as_path(p): float(x) for p, x in zip(exact.experts_BWHK[b], exact.log_p_BW[b], strict=True)
        }
        for experts_HK, log_p in zip(narrow.experts_BWHK[b], narrow.log_p_BW[b].tolist(), strict=True):
            assert log_p == pytest.approx(by_path[as_path(experts_HK)], abs=1e-4)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_set_probabilities_are_products_of_odds(K: int) -> None:
    z = torch.randn(5, EXPERTS, generator=torch.Generator().manual_seed(3)) * 3
    odds = z.double().exp()
    total = sum(odds[:, list(s)].prod(-1) for s in sets(K))
    assert isinstance(total, Tensor)
    torch.testing.assert_close(log_normaliser(z, K), total.log().float())
    chosen = torch.tensor([[0, 2, 4][:K]]).expand(5, -1)
    torch.testing.assert_close(set_log_p(z, chosen), (odds[:, [0, 2, 4][:K]].prod(-1) / total).log().float())
    shifted = log_normaliser(z + 300.0, K)  # odds that overflow float32
    torch.testing.assert_close(shifted, log_normaliser(z, K) + 300.0 * K, rtol=1e-5, atol=1e-3)


def linked_batch(seed: int) -> RoutingBatch:
    """Layer 0 is chance; each further layer is a fixed permutation of the one before."""
    batch = make_batch("prefill", B=16, T=16, K=1, hidden=False, seed=seed, padded=False)
    order = torch.tensor([3, 5, 0, 1, 2, 4])
    layers = [batch.experts_BTLK[:, :, 0]]
    for _ in range(LAYERS - 1):
        layers.append(order[layers[-1]])
    return replace(batch, experts_BTLK=torch.stack(layers, dim=2))


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Seq2Seq:
    torch.manual_seed(0)
    settings = {"width": 32, "decoder_width": 32, "lr": 0.01, "dropout": 0.0, "joint": 1.0}
    model = make_predictor("seq2seq", "prefill", K=1, hidden=False, **settings)
    batches = [linked_batch(seed) for seed in range(60)]
    trainer(tmp_path_factory.mktemp("linked"), max_epochs=4).fit(model, loader(batches))
    assert isinstance(model, Seq2Seq)
    return model.eval()


def test_joint_paths_know_what_marginals_cannot(linked: Seq2Seq) -> None:
    """From p = 0 each layer is chance (1/6), but so is the whole path: probability 1/6, not 1/216."""
    batch = linked_batch(99)
    found = linked.beam_search(batch, -1, beams=6)
    paths_NWHK, log_p_NW = found.experts_BWHK, found.log_p_BW
    assert float(log_p_NW.exp().sum(1).mean()) > 0.9
    taken_BHK = batch.experts_BTLK[:, -1]
    assert joint_hit_rates(paths_NWHK, taken_BHK, (6,))[6] > 0.9
    with torch.no_grad():
        marginal_HE = linked.probabilities(batch)[:, -1, 0].mean(0)
    assert float(marginal_HE.max()) < 0.35


def test_soft_path_marginals_against_enumerated_paths(linked: Seq2Seq) -> None:
    """The first step is exact; later ones are the documented approximation, whose gap is bounded here even
    where steps depend on each other as much as they can."""
    batch = linked_batch(98)
    with torch.no_grad():
        soft = linked(batch).softmax(-1)
    gaps = []
    for token in (0, 5, 9):
        exact = torch.zeros(3, EXPERTS)
        for path, p in enumerated(linked, batch, 0, token, 3).items():
            for h0, (expert,) in enumerate(path):
                exact[h0, expert] += p
        gap_HE = (exact - soft[0, token, 0]).abs()
        assert float(gap_HE[0].max()) < 1e-5
        gaps.append(float(gap_HE[1:].mean()))
    assert max(gaps) < 0.08


def test_forced_decoding_of_its_own_soft_path_is_forward() -> None:
    model, batch = fitted("seq2seq"), make_batch()
    assert isinstance(model, Seq2Seq)
    with torch.no_grad():
        start, direct = model.encode(batch)
        soft = model.decode(start, direct)
        torch.testing.assert_close(model.decode(start, direct, soft.sigmoid()), soft)
        other = model.decode(start, direct, 1 - soft.sigmoid())
    torch.testing.assert_close(other[:, :, 0], soft[:, :, 0])  # nothing comes before the first step
    assert not torch.allclose(other[:, :, 1], soft[:, :, 1], atol=1e-3)


def test_the_joint_likelihood_is_trained() -> None:
    batch = make_batch()
    losses = []
    for joint in (0.0, 1.0):
        model = fitted("seq2seq", dropout=0.0, joint=joint)
        assert isinstance(model, Seq2Seq)
        losses.append(model.training_loss(batch))
        experts, valid = targets(batch, 3)
        taken = torch.zeros(*experts.shape[:-1], EXPERTS).scatter_(-1, experts, 1.0)
    start, direct = model.encode(batch)
    logits = model.decode(start, direct, taken.flatten(0, 1).transpose(0, 1))
    expected = model.loss(model._as_batch(batch, logits), experts, valid)
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-3, atol=1e-2)


def test_hits_of_paths() -> None:
    paths = torch.tensor([[[[0, 1], [2, 3]], [[0, 1], [4, 5]]]])
    assert path_hits(paths, torch.tensor([[[1, 0], [5, 4]]])).tolist() == [[False, True]]
    assert path_hits(paths, torch.tensor([[[1, 0], [5, 3]]])).tolist() == [[False, False]]
    taken = torch.tensor([[[1, 0], [5, 4]]])
    assert joint_hit_rates(paths, taken, (1, 2)) == {1: 0.0, 2: 1.0}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_report_counts_paths_of_the_validation_split(phase: str, linked: Seq2Seq) -> None:
    model = fitted("seq2seq", phase)
    assert isinstance(model, Seq2Seq)
    model.fit_on_validation([make_batch(phase, seed=s) for s in range(2)])
    kinds = model.report()["joint_paths"]["kinds"]
    assert set(kinds) == ({"entry", "wrapped"} if phase == "decode" else {"entry"})  # 3 steps, 3 layers
    assert kinds["entry"]["states"] == 2 * (8 + 8 + 5)
    for row in kinds.values():
        assert 0 <= row["top_1"] <= row["top_4"] <= row["top_16"] <= 1
    assert kinds["entry"]["mean_probability"] > 0
    before = linked.sharp_PH.clone()
    rows = linked.fit_on_validation([linked_batch(97)])
    assert [(r["kind"], r["horizon"]) for r in rows] == [("entry", 1), ("entry", 2), ("entry", 3)]
    assert all(r["nll_after"] <= r["nll_before"] for r in rows)
    torch.testing.assert_close(linked.sharp_PH[0], torch.tensor([r["value"] for r in rows]))
    row = linked.report()["joint_paths"]["kinds"]["entry"]
    assert row["top_16"] > 0.9
    assert row["marginals_path"] < row["top_4"]
    linked.sharp_PH.copy_(before)


def test_senseless_searches_are_refused(tmp_path: Path) -> None:
    model = fitted("seq2seq", "prefill")
    assert isinstance(model, Seq2Seq)
    batch = make_batch("prefill")
    with pytest.raises(SpecgateError, match="say layer="):
        model.beam_search(batch)
    with pytest.raises(SpecgateError, match="prefill ends there"):
        model.beam_search(batch, LAYERS - 1)
    with pytest.raises(ConfigError, match="beams=0"):
        model.beam_search(batch, 0, beams=0)
    with pytest.raises(ConfigError, match="candidates=1 cannot fill a set of 2"):
        model.beam_search(batch, 0, candidates=1)
    with pytest.raises(SpecgateError, match="no token yet"):
        model.beam_search(replace(batch, valid_BT=torch.zeros_like(batch.valid_BT)), 0)
