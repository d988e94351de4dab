"""The drift monitor: quiet in domain at its stated rate, loud on drift, O(1) and pure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specgate.calibration.monitor import (
    DriftMonitor,
    DriftSettings,
    DriftState,
    TokenStream,
    advance,
    cusum_step,
    false_alarms,
    fit_baseline,
    peaks,
    token_residuals,
    watch,
)
from specgate.errors import ConfigError

SETTINGS = DriftSettings(bins=5, block=20, stream=1000, splits=20, streams=15)


def simulated(documents: int, tokens: int, seed: int, drift: float = 0.0, first: int = 0) -> TokenStream:
    """Documents with a bias of their own (tokens of a document are alike), and ``drift`` on top of all."""
    generator = np.random.default_rng(seed)
    parts = []
    for d in range(documents):
        own = 0.3 * generator.normal()
        p = generator.random((tokens, 8)).astype(np.float32)
        odds = np.log(p) - np.log1p(-p) + own + drift
        used = generator.random(p.shape) < 1 / (1 + np.exp(-odds))
        bins = np.minimum((p * 5).astype(int), 4)
        residual = np.zeros((tokens, 5))
        for c in range(5):
            residual[:, c] = ((used - p) * (bins == c)).sum(1)
        parts.append(TokenStream(residual, np.full(tokens, 8.0), np.full(tokens, first + d)))
    return TokenStream.join(parts)


def test_false_alarms_stay_near_the_stated_rate_and_drift_is_found() -> None:
    baseline = fit_baseline(simulated(120, 60, seed=0), SETTINGS)
    fresh = false_alarms(baseline, simulated(120, 60, seed=1), 200)
    assert fresh["rate"] <= 0.15
    assert fresh["documents"] == 120
    for drift in (-0.6, 0.6):
        monitor = watch(baseline, simulated(20, 60, seed=2, drift=drift))
        assert monitor.drifted
        report = monitor.report()
        assert report["alarm_at"] <= 1000
        assert np.sign(sum(report["lean"])) == np.sign(drift)
        assert report["error"] > 0.02


def test_alike_tokens_need_the_higher_threshold_that_documents_give() -> None:
    """The same tokens declared independent give a threshold that documents trip far too often."""
    stream = simulated(120, 60, seed=0)
    alone = TokenStream(stream.residual_NC, stream.cells_N, np.arange(len(stream.cells_N)) // 20)
    shuffled = np.random.default_rng(0).permutation(len(stream.cells_N))
    naive = fit_baseline(
        TokenStream(stream.residual_NC[shuffled], stream.cells_N, alone.document_N), SETTINGS
    )
    honest = fit_baseline(stream, SETTINGS)
    fresh = simulated(120, 60, seed=1)
    assert false_alarms(naive, fresh, 100)["rate"] > 0.5 > false_alarms(honest, fresh, 100)["rate"]


def test_token_by_token_is_the_same_as_at_once() -> None:
    baseline = fit_baseline(simulated(40, 60, seed=0), SETTINGS)
    stream = simulated(17, 60, seed=5)
    monitor = watch(baseline, stream.select(np.arange(980)))
    x_1SC = stream.select(np.arange(980)).blocks(20)[None]
    expected = peaks(x_1SC, baseline.mean_C, baseline.whiten_CC, SETTINGS.reference)
    assert monitor.state.peak == pytest.approx(float(expected[0]))
    assert monitor.state.tokens == 980


def test_update_takes_what_a_loader_has() -> None:
    baseline = fit_baseline(simulated(40, 60, seed=0), SETTINGS)
    monitor = DriftMonitor(baseline)
    p_ME, used_MK = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.5, 1.0]]), torch.tensor([[0], [1]])
    before = monitor.state
    state = monitor.update(p_ME, used_MK)
    expected = np.zeros(5)
    for row, used in zip(p_ME.tolist(), used_MK[:, 0].tolist(), strict=True):
        for e, p in enumerate(row):
            expected[min(int(p * 5), 4)] += (e == used) - p
    np.testing.assert_allclose(state.residual_C, expected, atol=1e-6)
    assert (state.tokens, state.cells) == (1, 6)
    assert before.tokens == 0  # the old state is untouched
    assert not monitor.drifted
    monitor.reset()
    assert monitor.state.tokens == 0


def test_one_step_agrees_with_croisers_formula() -> None:
    s, z, k = np.array([3.0, 4.0]), np.array([0.0, 0.0]), 1.0
    np.testing.assert_allclose(cusum_step(s[None], z[None], k)[0], s * (1 - 1 / 5))
    np.testing.assert_allclose(cusum_step(np.array([[0.1, 0.0]]), z[None], k)[0], [0, 0])


def test_residuals_of_tokens_agree_with_a_loop() -> None:
    p_ME = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
    used_MK = torch.randint(4, (12, 1), generator=torch.Generator().manual_seed(1))
    token_M = torch.arange(12) // 3
    residual_NC, cells_N = token_residuals(p_ME, used_MK, token_M, 4, 3)
    expected = np.zeros((4, 3))
    for m in range(12):
        for e in range(4):
            p = float(p_ME[m, e])
            expected[m // 3, min(int(p * 3), 2)] += (int(used_MK[m, 0]) == e) - p
    np.testing.assert_allclose(residual_NC, expected, atol=1e-6)
    assert cells_N.tolist() == [12.0] * 4


def test_memory_is_constant_and_a_quiet_stream_starts_anew() -> None:
    baseline = fit_baseline(simulated(40, 60, seed=0), SETTINGS)
    state, quiet_C = DriftState.start(5), 8 * baseline.mean_C
    for _ in range(1000):
        state = advance(baseline, state, quiet_C, 8.0)
    assert state.sum_C.shape == (5,)
    assert not state.sum_C.any()
    assert state.alarm_at is None


def test_too_little_to_fit_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="fitted on 3 documents"):
        fit_baseline(simulated(3, 60, seed=0), SETTINGS)
    with pytest.raises(ConfigError, match="make no two blocks of 20"):
        fit_baseline(simulated(4, 5, seed=0), SETTINGS)
    with pytest.raises(ConfigError, match=r"alarm_rate=1\.5"):
        DriftSettings(alarm_rate=1.5)
    with pytest.raises(ConfigError, match="block=10 does not fit stream=5"):
        DriftSettings(block=10, stream=5)
