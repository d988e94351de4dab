"""The drift monitor: quiet in domain at its stated rate, loud on drift in any direction, O(1) and pure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from specgate.calibration.baseline import (
    TokenStream,
    beginnings,
    false_alarms,
    fit_baseline,
    peaks,
    shuffled,
    watch,
)
from specgate.calibration.monitor import (
    DriftBaseline,
    DriftMonitor,
    DriftSettings,
    DriftState,
    advance,
    drift_groups,
    score_names,
    token_scores,
)
from specgate.errors import ConfigError
from specgate.traces.batch import kind_PH

SETTINGS = DriftSettings(half=20, block=20, warmup=60, stream=1000, splits=20, streams=15)
NAMES = ("a", "b", "c")


def simulated(
    documents: int, tokens: int, seed: int, drift: tuple[float, ...] = (0, 0, 0), spread: float = 0.3
) -> TokenStream:
    """Documents with a lean of their own, strong along (1, 1, 0), and ``drift`` on top of all."""
    generator = np.random.default_rng(seed)
    own_D3 = spread * generator.normal(size=(documents, 3)) * [0.3, 0.3, 0.3]
    own_D3 += spread * generator.normal(size=(documents, 1)) * [1.0, 1.0, 0.0]
    noise_N3 = generator.normal(size=(documents * tokens, 3))
    score_N3 = np.repeat(own_D3, tokens, axis=0) + noise_N3 + 0.5 + np.array(drift)
    return TokenStream.of(score_N3, np.repeat(np.arange(documents), tokens))


def test_false_alarms_stay_near_the_stated_rate_and_drift_is_found() -> None:
    baseline = fit_baseline(simulated(160, 60, seed=0), NAMES, SETTINGS)
    fresh = false_alarms(baseline, simulated(160, 60, seed=1), 200)
    assert fresh["rate"] <= 0.1
    assert fresh["rate_beginnings"] <= 0.1
    assert fresh["documents"] == 160
    for sign in (-1, 1):
        monitor = watch(baseline, simulated(20, 60, seed=2, drift=(0, 0, 0.5 * sign)))
        assert monitor.drifted
        report = monitor.report()
        assert report["alarm_at"] <= 1000
        assert report["lean"]["c"] == pytest.approx(0.5 * sign, abs=0.2)


def test_a_usual_direction_hides_what_an_unusual_one_shows() -> None:
    """A drift of the same size is found where documents do not scatter, and not along where they do."""
    baseline = fit_baseline(simulated(160, 60, seed=0, spread=0.6), NAMES, SETTINGS)
    peak = {}
    for name, drift in {"usual": (0.3, 0.3, 0.0), "unusual": (0.3, -0.3, 0.0)}.items():
        found = [
            watch(baseline, simulated(20, 60, seed=s, drift=drift, spread=0.6)).state.peak for s in range(9)
        ]
        peak[name] = np.median(found)
    assert peak["unusual"] > baseline.threshold > peak["usual"]


def test_one_long_document_says_less_than_many_short_ones() -> None:
    """What the weights are for: a lean that one document may have is no drift until several have it."""
    baseline = fit_baseline(simulated(160, 60, seed=0), NAMES, SETTINGS)
    lean = (0.5, -0.5, 0.5)
    many = watch(baseline, simulated(50, 20, seed=3, drift=lean, spread=0))
    one = watch(baseline, simulated(1, 1000, seed=3, drift=lean, spread=0))
    assert many.state.peak > 2 * one.state.peak
    assert many.drifted
    assert not one.drifted


def test_statistic_of_independent_tokens_is_hotellings() -> None:
    """With tokens that are documents of their own, known mean and no warmup, T^2 is chi-squared."""
    given_settings = replace(SETTINGS, half=10**9, warmup=0.0, shrink=1e-9, splits=1, streams=1)
    baseline = fit_baseline(TokenStream.of(_normal(40_000, 0), np.arange(40_000)), NAMES, given_settings)
    sum_NF = np.stack([_normal(50, seed).sum(0) for seed in range(1, 801)])
    squared_N = baseline.statistic(sum_NF, np.full(800, 50.0)) ** 2
    for share in (0.5, 0.9, 0.95):
        assert float((squared_N <= chi2(3).ppf(share)).mean()) == pytest.approx(share, abs=0.05)
    # and the oracle's own formula, from plain sample moments
    x_NF = _normal(40_000, 0)
    inverse = np.linalg.inv(np.cov(x_NF.T))
    away_NF = sum_NF / 50 - x_NF.mean(0)
    expected_N = np.einsum("nf,fg,ng->n", away_NF, inverse, away_NF) / (1 / 50 + 1 / 40_000)
    np.testing.assert_allclose(squared_N, expected_N, rtol=0.01)


def _normal(count: int, seed: int) -> np.ndarray:
    mix = np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.7]])
    return np.random.default_rng(seed).normal(size=(count, 3)) @ mix + [0.1, -0.4, 0.0]


def test_token_by_token_is_the_same_as_at_once() -> None:
    baseline = fit_baseline(simulated(40, 60, seed=0), NAMES, SETTINGS)
    stream = simulated(16, 60, seed=5)
    quiet = replace(baseline, threshold=1e9)
    expected = []
    total, weight = np.zeros(3), 0.0
    for n in range(960):
        t = n % 60
        g = (t + 1) / (1 + (t + 1) / 20) - t / (1 + t / 20)  # what n tokens weigh, one token at a time
        total, weight = total + g * stream.score_NF[n], weight + g
        if (n + 1) % 20 == 0:
            z = (total - weight * baseline.mean_F) @ baseline.whiten_FF
            expected.append(np.linalg.norm(z) / np.sqrt(weight + weight**2 / baseline.weight + 60))
    monitor = watch(quiet, stream)
    assert monitor.state.peak == pytest.approx(max(expected))
    assert monitor.state.statistic == pytest.approx(expected[-1])
    assert monitor.state.tokens == 960
    (peak,) = peaks(quiet, stream.select(np.arange(60)), 1, np.random.default_rng(0))
    assert peak == pytest.approx(max(expected[:3]))


def test_update_takes_what_a_loader_has_and_requests_may_alternate() -> None:
    kinds = kind_PH(2, 2, "prefill")
    group_PH, groups = drift_groups(kinds)
    names = score_names(groups, 2)
    generator = torch.Generator().manual_seed(0)
    place_PH = group_PH >= 0
    forecasts = int(place_PH.sum())
    p_NME = torch.rand(60, forecasts, 4, generator=generator)
    used_NMK = torch.rand(60, forecasts, 4, generator=generator).argsort(-1)[..., :2]
    group_M = group_PH[place_PH]
    score_NF = np.concatenate(
        [
            token_scores(p, u, group_M, torch.zeros_like(group_M), 1, len(groups))
            for p, u in zip(p_NME, used_NMK, strict=True)
        ]
    )
    document_N = np.arange(60) % 3  # three requests in turn
    small = replace(SETTINGS, block=5, splits=2, streams=2)
    baseline = fit_baseline(TokenStream.of(score_NF, np.arange(60) // 10), names, small)
    monitor = DriftMonitor(baseline)
    before = monitor.state
    for n in range(60):
        monitor.update(p_NME[n], used_NMK[n], group_M, age=n // 3)
    assert monitor.state.peak == pytest.approx(
        watch(baseline, TokenStream.of(score_NF, document_N)).state.peak
    )
    assert monitor.state.tokens == 60
    assert before.tokens == 0  # the old state is untouched
    monitor.reset()
    assert monitor.state.tokens == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), top_k=st.sampled_from([1, 2]))
def test_scores_are_the_gradient_of_the_log_likelihood(seed: int, top_k: int) -> None:
    """Autograd's derivative in the inverse temperature and the offset is the oracle."""
    generator = torch.Generator().manual_seed(seed)
    logits_ME = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    used_MK = torch.rand(9, 4, generator=generator).argsort(-1)[:, :top_k]
    group_M = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0])
    token_M = torch.arange(9) // 3
    if top_k == 1:  # the log-odds of the marginal probabilities are what is scaled
        logits_ME = torch.logit(logits_ME.softmax(-1)).clamp(-4, 4)
    p_ME = logits_ME.sigmoid()
    found = token_scores(p_ME, used_MK, group_M, token_M, 3, 2)
    assert found.shape == (3, 2 * top_k)
    used_ME = torch.zeros(9, 4, dtype=torch.float64).scatter_(1, used_MK, 1.0)
    for token in range(3):
        for group in range(2):
            at = (token_M == token) & (group_M == group)
            slope = torch.ones((), dtype=torch.float64, requires_grad=True)
            offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
            odds = logits_ME[at] * slope + offset
            likelihood = -torch.nn.functional.binary_cross_entropy_with_logits(
                odds, used_ME[at], reduction="sum"
            )
            wanted = torch.autograd.grad(likelihood, [slope, offset])
            assert found[token, group] == pytest.approx(float(wanted[0]), abs=1e-9)
            if top_k > 1:
                assert found[token, 2 + group] == pytest.approx(float(wanted[1]), abs=1e-9)


def test_groups_are_few_and_hold_every_forecast() -> None:
    for layers, horizons, phase in ((6, 3, "prefill"), (48, 24, "decode"), (2, 3, "decode")):
        kinds = kind_PH(layers, horizons, phase)
        group_PH, names = drift_groups(kinds)
        assert ((group_PH >= 0) == (kinds >= 0)).all()
        assert sorted(group_PH[group_PH >= 0].unique().tolist()) == list(range(len(names)))
        assert len(names) <= 40
    group_PH, names = drift_groups(kind_PH(6, 3, "prefill"))
    assert names[int(group_PH[1, 0])] == "within N+1 early"  # from point 1, layer 1 of six
    assert names[int(group_PH[2, 2])] == "within N+3 late"  # from point 2, layer 4
    assert names[int(group_PH[0, 1])] == "entry N+2"
    assert group_PH[1, 0] != group_PH[2, 0]


def test_ages_count_within_documents_and_beginnings_are_cut_there() -> None:
    document_N = np.array([5, 2, 5, 5, 2, 9])
    stream = TokenStream.of(np.arange(6.0)[:, None], document_N)
    assert stream.age_N.tolist() == [0, 0, 1, 2, 1, 0]
    assert stream.by_document().score_NF[:, 0].tolist() == [1, 4, 0, 2, 3, 5]
    assert beginnings(stream, replace(SETTINGS, half=2)).score_NF[:, 0].tolist() == [0, 1, 2, 4, 5]
    assert stream.select(stream.age_N > 0).age_N.tolist() == [1, 2, 1]
    whole = shuffled(stream.documents(), np.random.default_rng(0), 100)
    assert sorted(whole.tolist()) == list(range(6))


def test_a_baseline_goes_into_a_checkpoint_and_back(tmp_path: Path) -> None:
    baseline = fit_baseline(simulated(40, 60, seed=0), NAMES, SETTINGS)
    torch.save({"drift": baseline.values()}, tmp_path / "x.ckpt")
    again = DriftBaseline.from_values(torch.load(tmp_path / "x.ckpt", weights_only=True)["drift"])
    assert (again.settings, again.names, again.threshold) == (SETTINGS, NAMES, baseline.threshold)
    stream = simulated(10, 60, seed=4)
    assert watch(again, stream).report() == watch(baseline, stream).report()


def test_memory_is_constant_and_a_quiet_stream_starts_anew() -> None:
    baseline = fit_baseline(simulated(40, 60, seed=0), NAMES, SETTINGS)
    state = DriftState(np.zeros(3))
    for _ in range(1000):
        state = advance(baseline, state, baseline.mean_F, 0)
    assert state.statistic == pytest.approx(0, abs=1e-9)
    heavy = state.weight
    state = advance(baseline, state, baseline.mean_F, 0)
    assert state.sum_F.shape == (3,)
    assert state.weight == pytest.approx(heavy / 1000)
    assert state.alarm_at is None


def test_too_little_to_fit_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="fitted on 3 documents"):
        fit_baseline(simulated(3, 60, seed=0), NAMES, SETTINGS)
    with pytest.raises(ConfigError, match="make no block of 20"):
        fit_baseline(simulated(4, 5, seed=0), NAMES, SETTINGS)
    with pytest.raises(ConfigError, match=r"alarm_rate=1\.5"):
        DriftSettings(alarm_rate=1.5)
    with pytest.raises(ConfigError, match="block=10 does not fit stream=5"):
        DriftSettings(block=10, stream=5)
    with pytest.raises(ConfigError, match="half=0"):
        DriftSettings(half=0)
