"""``markov2`` against loops and dictionaries: counts of pairs, back-off, adaptation, weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from specgate.errors import ConfigError
from specgate.predictors.loglinear import fit_weights, log_loss
from specgate.predictors.markov2 import Markov2
from specgate.traces.batch import INVALID, RoutingBatch, targets
from tests.predictors.support import EXPERTS, LAYERS, make_batch, make_predictor


def made(phase: str = "decode", **kwargs: object) -> Markov2:
    predictor = make_predictor("markov2", phase, hidden=False, **kwargs)  # type: ignore[arg-type]
    assert isinstance(predictor, Markov2)
    return predictor


def batches_of(phase: str, K: int, n: int = 3) -> list[RoutingBatch]:
    return [make_batch(phase, K=K, B=4, T=9, hidden=False, seed=s, context=1) for s in range(n)]


def target(batch: RoutingBatch, b: int, t: int, layer: int, h: int) -> list[int] | None:
    """Experts h layers after ``layer``, None where there is nothing to score."""
    column, T = layer + h, batch.valid_BT.shape[1]
    if column < LAYERS:
        return batch.experts_BTLK[b, t, column].tolist()
    if batch.phase == "prefill" or t + 1 >= T or not batch.valid_BT[b, t + 1] or column >= 2 * LAYERS:
        return None
    return batch.experts_BTLK[b, t + 1, column - LAYERS].tolist()


Key = tuple[int, int, tuple[int, ...]]


def counted(batches: list[RoutingBatch]) -> tuple[Counter[Key], dict[Key, Counter[int]]]:
    """Trials and hits per (layer, horizon, context) with contexts of one or two experts, by loops."""
    trials: Counter[Key] = Counter()
    hits: dict[Key, Counter[int]] = {}
    for batch in batches:
        for b, t in batch.mask_BT.nonzero().tolist():
            for layer in range(LAYERS):
                for h in range(1, 5):
                    found = target(batch, b, t, layer, h)
                    if found is None:
                        continue
                    now = batch.experts_BTLK[b, t, layer].tolist()
                    contexts: list[tuple[int, ...]] = [(e,) for e in now]
                    if layer:
                        contexts += [
                            (d, e) for d in batch.experts_BTLK[b, t, layer - 1].tolist() for e in now
                        ]
                    for context in contexts:
                        trials[layer, h, context] += 1
                        hits.setdefault((layer, h, context), Counter()).update(found)
    return trials, hits


class Oracle:
    """Back-off and evidence from dictionaries, as the module's docstring has them."""

    def __init__(self, predictor: Markov2, batches: list[RoutingBatch], K: int) -> None:
        self.K, self.a = K, predictor.smoothing
        self.prior = predictor.prior_LE().double()
        self.trials, self.hits = counted(batches)
        self.discounts = {size: self.discount(size, predictor.lookahead) for size in (1, 2)}

    def discount(self, size: int, H: int) -> float:
        if self.K > 1:
            return 0.0
        # Tables of single experts reach one horizon further than those of pairs.
        counts = [
            n
            for (_, h, context), hits in self.hits.items()
            for n in hits.values()
            if len(context) == size and h <= H + (size == 1)
        ]
        once, twice = counts.count(1), counts.count(2)
        return once / max(1, once + 2 * twice)

    def p(self, layer: int, h: int, context: tuple[int, ...], f: int) -> float:
        if not context:
            return float(self.prior[(layer + h) % LAYERS, f])
        lower = self.p(layer, h, context[1:], f)
        n, hits = self.trials[layer, h, context], self.hits.get((layer, h, context), Counter())
        d = self.discounts[len(context)]
        freed = d * len([x for x in hits.values() if x > 0])
        return (max(hits[f] - d, 0.0) + (self.a + freed) * lower) / (n + self.a)

    def link(self, p: float) -> float:
        return math.log(p) if self.K == 1 else math.log(p / (1 - p))

    def lift(self, layer: int, h: int, context: tuple[int, ...], f: int) -> float:
        lower = () if len(context) == 1 else context[1:]
        return self.link(self.p(layer, h, context, f)) - self.link(self.p(layer, h, lower, f))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("K", [1, 2])
def test_static_evidence_matches_dictionaries(phase: str, K: int) -> None:
    predictor, batches = made(phase, K=K, adapt=0, smoothing=1.5), batches_of(phase, K)
    for batch in batches:
        predictor.count(batch)
    oracle, new = Oracle(predictor, batches, K), make_batch(phase, K=K, hidden=False, seed=77)
    assert K > 1 or 0 < oracle.discounts[2] < 1
    near, skip, pair = (x.double() for x in predictor.evidence(new))
    b, t = 1, 4
    for layer in range(LAYERS):
        now, before = new.experts_BTLK[b, t, layer].tolist(), new.experts_BTLK[b, t, layer - 1].tolist()
        for h in (1, 2, 3):
            if predictor.kinds[layer + 1, h - 1] == INVALID:
                continue
            for f in range(EXPERTS):
                cell = (b, t, layer + 1, h - 1, f)
                one = sum(oracle.lift(layer, h, (e,), f) for e in now)
                assert float(near[cell]) == pytest.approx(one, abs=2e-4)
                far = sum(oracle.lift(layer - 1, h + 1, (e,), f) for e in before) if layer else 0.0
                assert float(skip[cell]) == pytest.approx(far, abs=2e-4)
                two = sum(oracle.lift(layer, h, (d, e), f) for d in before for e in now) / K if layer else 0.0
                assert float(pair[cell]) == pytest.approx(two, abs=2e-4)


def test_with_one_expert_it_is_interpolated_kneser_ney() -> None:
    """Unfitted, its probabilities are those of the back-off chain, and sum to 1 without a softmax's help."""
    predictor, batches = made("prefill", K=1, smoothing=0.5), batches_of("prefill", 1)
    for batch in batches:
        predictor.count(batch)
    oracle, new = Oracle(predictor, batches, 1), make_batch("prefill", K=1, hidden=False, seed=5)
    p = predictor.probabilities(new)
    before, now = new.experts_BTLK[2, 1, :2, 0].tolist()
    chain = [oracle.p(1, 1, (before, now), f) for f in range(EXPERTS)]
    assert sum(chain) == pytest.approx(1.0)
    torch.testing.assert_close(p[2, 1, 2, 0].double(), torch.tensor(chain).double(), atol=1e-5, rtol=1e-4)


def test_order_two_learns_what_order_one_cannot() -> None:
    """Layer 2 is the sum (mod E) of the two layers before it: alone, neither tells anything."""
    g = torch.Generator().manual_seed(3)
    scores = {}
    for order in (1, 2):
        predictor = made("prefill", K=1, order=order)
        for seed in range(30):
            batch = make_batch("prefill", K=1, B=8, T=10, hidden=False, seed=seed, padded=False)
            batch.experts_BTLK[:, :, :2] = torch.randint(0, EXPERTS, (8, 10, 2, 1), generator=g)
            batch.experts_BTLK[:, :, 2] = batch.experts_BTLK[:, :, :2].sum(2) % EXPERTS
            if seed < 29:
                predictor.count(batch)
        predictor.finish()
        found = predictor(batch)[:, :, 2, 0].argmax(-1) == batch.experts_BTLK[:, :, 2, 0]
        scores[order] = float(found.float().mean())
    assert scores[2] == 1.0
    assert scores[1] < 0.5


def test_pairs_without_a_row_back_off_to_order_one() -> None:
    batches = batches_of("decode", 2)
    full, small = made(adapt=0), made(adapt=0, cells=2 * 5 * 3 * EXPERTS)
    assert small.rows == 5
    assert full.rows == EXPERTS**2
    for batch in batches:
        full.count(batch)
        small.count(batch)
    assert int((small.row_JM >= 0).sum()) == 2 * 5
    new = make_batch(hidden=False, seed=50)
    kept_RF, all_RF = small.tables()[2], full.tables()[2]
    assert kept_RF is not None
    assert all_RF is not None
    assert not kept_RF[-1].any()
    # A row given in the first batch has seen everything: it equals the full table's; all else adds nothing.
    first = Counter(
        (layer, d * EXPERTS + e)
        for b, t in batches[0].mask_BT.nonzero().tolist()
        for layer in (1, 2)
        for d in batches[0].experts_BTLK[b, t, layer - 1].tolist()
        for e in batches[0].experts_BTLK[b, t, layer].tolist()
    )
    for layer in (1, 2):
        codes = (small.row_JM[layer - 1] >= 0).nonzero().flatten().tolist()
        most = sorted((n for (at, _), n in first.items() if at == layer), reverse=True)[:5]
        assert sorted((first[layer, code] for code in codes), reverse=True) == most
        for code in codes:
            row, whole = small.row_JM[layer - 1, code], full.row_JM[layer - 1, code]
            torch.testing.assert_close(kept_RF[row], all_RF[whole])
    small.row_JM.fill_(-1)
    assert not list(small.evidence(new))[2].any()


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("lookahead", [3, 5])
def test_adaptation_counts_the_sequence_so_far(K: int, lookahead: int) -> None:
    predictor = made(K=K, lookahead=lookahead, decays=[0.5, 0.8])
    for batch in batches_of("decode", K):
        predictor.count(batch)
    new = make_batch(K=K, hidden=False, seed=8)
    (*_, fast, slow, own) = predictor.evidence(new)
    prior = predictor.prior_LE().double()
    link = (lambda p: math.log(p)) if K == 1 else (lambda p: math.log(p / (1 - p)))
    T = new.valid_BT.shape[1]
    for b, t in ((0, 0), (0, 5), (1, 7), (2, 4)):
        for layer in range(-1, LAYERS):
            for h in range(1, lookahead + 1):
                column = layer + h
                if column >= 2 * LAYERS:
                    continue
                goal = column % LAYERS
                for f in range(EXPERTS):
                    base, cell = float(prior[goal, f]), (b, t, layer + 1, h - 1, f)
                    # Own use: tokens whose target layer is known, newest first.
                    newest = t if column >= LAYERS and goal <= layer else t - 1
                    for decay, found in ((0.5, fast), (0.8, slow)):
                        p = base
                        for s in range(newest + 1):
                            use = float(f in new.experts_BTLK[b, s, goal].tolist())
                            p += 0.5 * (1 - decay) * decay ** (newest - s) * (use - base)
                        assert float(found[cell]) == pytest.approx(link(p) - link(base), abs=1e-4)
                    if layer < 0:
                        continue
                    hits = trials = 0.0
                    now = set(new.experts_BTLK[b, t, layer].tolist())
                    for s in range(t):
                        later = target(new, b, s, layer, h)
                        known = column < LAYERS or s + 1 < t or goal <= layer
                        if later is None or not known or s + 1 >= T:
                            continue
                        for e in now & set(new.experts_BTLK[b, s, layer].tolist()):
                            assert e in now
                            trials += 0.8 ** (t - s)
                            hits += 0.8 ** (t - s) * (f in later)
                    p = (hits + 4 * base) / (trials + 4)
                    assert float(own[cell]) == pytest.approx(link(p) - link(base), abs=1e-4)


def test_adaptation_is_off_in_prefill_and_scaled_by_adapt() -> None:
    assert len(list(made("prefill").evidence(make_batch("prefill", hidden=False)))) == 3
    assert len(list(made(order=1, adapt=0).evidence(make_batch(hidden=False)))) == 1
    batches, new = batches_of("decode", 2), make_batch(hidden=False, seed=4)
    models = {a: made(adapt=a) for a in (0.0, 0.5, 1.0)}
    for model in models.values():
        for batch in batches:
            model.count(batch)
    off, half, whole = (models[a](new) for a in (0.0, 0.5, 1.0))
    assert not torch.allclose(off, whole)
    torch.testing.assert_close(half, (off + whole) / 2)
    for kwargs, message in (
        ({"order": 3}, "order 3 is neither"),
        ({"adapt": -1.0}, "adapt -1.0 is negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**kwargs)


def test_held_out_batches_fit_the_weights_and_are_counted_after() -> None:
    batches = [make_batch(K=2, B=8, T=12, hidden=False, seed=s, padded=False) for s in range(8)]
    for batch in batches:  # what layer 1 does depends on layer 0; layer 2 repeats the token before
        batch.experts_BTLK[:, :, 1] = (batch.experts_BTLK[:, :, 0] + 1) % EXPERTS
        batch.experts_BTLK[:, 1:, 2] = batch.experts_BTLK[:, :1, 2]
    model, plain = made(fit_every=4), made(fit_every=100)
    start = model.weight_QHI.clone()
    for batch in batches:
        model.count(batch)
        plain.count(batch)
    assert len(model.kept) == 2
    assert float(model.tokens_L[0]) == float(plain.tokens_L[0]) * 6 / 8
    model.finish()
    plain.finish()
    torch.testing.assert_close(plain.weight_QHI, start)
    assert model.kept == []
    for name in ("popularity_LE", "joint_LHEE", "trials_LHE", "pair_RHE", "trials_RH"):
        torch.testing.assert_close(getattr(model, name), getattr(plain, name))
    new = make_batch(K=2, B=8, T=12, hidden=False, seed=60, padded=False)
    new.experts_BTLK[:, :, 1] = (new.experts_BTLK[:, :, 0] + 1) % EXPERTS
    new.experts_BTLK[:, 1:, 2] = new.experts_BTLK[:, :1, 2]
    experts, valid = targets(new, 3)
    losses = [float(m.loss(m(new), experts, valid)) for m in (model, plain)]
    assert losses[0] < 0.9 * losses[1]
    again = made(fit_every=4)
    again(new)  # tables of nothing, to be replaced
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(new), model(new))
    report = model.report()
    assert report["order"] == 2
    assert report["pair_table"]["cells"] == 2 * EXPERTS**2 * 3 * EXPERTS
    assert list(report["weights"]) == [
        "order 1",
        "skip",
        "pair",
        "own use, decay 0.7",
        "own use, decay 0.95",
        "own transitions",
    ]


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_step_that_looks_past_the_next_token(phase: str, K: int) -> None:
    predictor, new = (
        made(phase, K=K, lookahead=5, cells=2 * 9 * 5 * EXPERTS),
        make_batch(phase, K=K, hidden=False),
    )
    for batch in batches_of(phase, K):
        predictor.count(batch)
    last = new.valid_BT.sum(1) - 1
    for layer in range(-1, LAYERS):
        there = predictor.kinds[layer + 1] != INVALID
        whole = predictor(new)[torch.arange(3), last, layer + 1]
        torch.testing.assert_close(
            predictor.step_logits(new, layer)[:, there], whole[:, there], rtol=1e-4, atol=1e-5
        )
    following = replace(new, experts_BTLK=new.experts_BTLK.clone())
    for b, t in enumerate(last.tolist()):
        following.experts_BTLK[b, t, 1:] = 0  # not known yet
    torch.testing.assert_close(predictor.step_logits(following, 0), predictor.step_logits(new, 0))


@pytest.mark.parametrize("K", [1, 2])
def test_newton_finds_the_minimum(K: int) -> None:
    g = torch.Generator().manual_seed(K)
    N, pieces, E = 200, 3, EXPERTS
    x, base = torch.randn(N, pieces, E, generator=g), torch.randn(N, E, generator=g)
    used = torch.zeros(N, E).scatter_(-1, torch.rand(N, E, generator=g).topk(K).indices, 1.0)
    start = torch.tensor([1.0, 0.0, -3.0])
    w = fit_weights(base, x, used, start, K, ridge=0.1).requires_grad_()
    loss = log_loss(base.double() + torch.einsum("nie,i->ne", x.double(), w), used.double(), K)
    loss = loss + 0.05 * (w - start.double()).square().sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(gradient.abs().max()) < 1e-4
    unused = replace(make_batch(K=K), hidden_BTLD=None)  # and the loss is the predictors' own, per cell
    model = made(K=K)
    experts, valid = targets(unused, 3)
    logits = model(unused)
    hot = torch.zeros_like(logits).scatter_(-1, experts, 1.0)[valid]
    own = float(model.loss(logits, experts, valid)) / int(valid.sum())
    assert float(log_loss(logits[valid], hot, K)) == pytest.approx(own, rel=1e-5)
