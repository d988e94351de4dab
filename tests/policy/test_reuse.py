"""The model of reuse against scipy, against direct sums, and against data made by the model itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from specgate.errors import ConfigError
from specgate.policy import reuse
from specgate.policy.workload import Workload, decoding
from tests.policy.support import slow_misses, small_workload


def negative(at: np.ndarray, x: np.ndarray, count: np.ndarray, hits: np.ndarray) -> float:
    """Written apart from the module: binomial, with the probability kept off 1."""
    q = np.minimum(np.exp(at[0] + at[1] * x), 1 - 1e-9)
    return float(-(hits * np.log(q) + (count - hits) * np.log(1 - q)).sum())


@given(seed=st.integers(0, 1000), slope=st.floats(0.2, 1.2), intercept=st.floats(-1.5, -0.1))
@settings(max_examples=15, deadline=None)
def test_no_other_line_is_more_likely(seed: int, slope: float, intercept: float) -> None:
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(-6, -0.05, 40))
    count = rng.integers(50, 500, 40).astype(float)
    hits = rng.binomial(count.astype(int), np.exp(intercept + slope * x)).astype(float)
    a, b, nll = reuse.fit_line(x, count, hits)
    assert nll == pytest.approx(negative(np.array([a, b]), x, count, hits), rel=1e-6)
    starts = [np.array([intercept, slope]), np.array([-2.0, 0.5])]
    best = min(minimize(negative, s, (x, count, hits), method="Nelder-Mead").fun for s in starts)
    assert nll <= best * (1 + 1e-4)


def test_what_is_used_regardless_of_the_past_gets_slope_zero() -> None:
    x = np.array([-4.0, -2.0, -1.0])
    a, b, _ = reuse.fit_line(
        x, np.full(3, 1000.0), np.array([400.0, 300.0, 200.0])
    )  # falls: no slope below 0
    assert b == pytest.approx(0.0, abs=1e-9)
    assert np.exp(a) == pytest.approx(0.3, rel=1e-3)


def test_decayed_uses_are_the_sum_that_the_rules_state() -> None:
    workload = small_workload(2, tokens=(20,))
    used = reuse.used_SLE(workload)
    half_life, g = 5.0, 2 ** (-1 / 5.0)
    expected = []
    for s in range(1, workload.steps):
        for layer in range(workload.layers):
            for e in range(workload.experts):
                f = sum((1 - g) * g ** (s - i) for i in range(s) if e in workload.event(i * 3 + layer))
                expected.append((np.log(f + 1e-6), bool(used[s, layer, e])))
    x, counts, hits = reuse.binned(used, half_life)
    assert counts.sum() == len(expected)
    assert hits.sum() == sum(u for _, u in expected)
    assert (x * counts).sum() == pytest.approx(sum(v for v, _ in expected))
    width = -np.log(1e-6) / reuse._BINS
    at = np.array([v for v, _ in expected])
    assert np.abs(at[:, None] - x[None]).min(1).max() <= width * 1.001


def sampled(half_life: float, slope: float, intercept: float, steps: int = 3000) -> Workload:
    """One layer whose experts are used with the model's own probability."""
    rng = np.random.default_rng(0)
    E, g = 24, 2 ** (-1 / half_life)
    f = np.zeros(E)
    start, experts = [0], []
    for step in range(steps):
        q = np.clip(np.exp(intercept + slope * np.log(f + 1e-6)), 0, 1)
        used = rng.random(E) < (q if step else 1.0)
        experts.extend(np.nonzero(used)[0].tolist())
        start.append(len(experts))
        f = g * (f + (1 - g) * used)
    return Workload(
        1,
        E,
        4,
        np.array(start),
        np.array(experts, dtype=np.int32),
        np.ones(len(experts), dtype=np.int32),
        np.zeros(steps, dtype=np.int32),
    )


def test_the_fit_finds_the_parameters_that_made_the_data() -> None:
    found = reuse.fit_reuse(sampled(16.0, 0.6, -0.6), slots=8)
    assert found.half_life == 16.0
    assert found.slope == pytest.approx(0.6, abs=0.05)
    assert found.intercept == pytest.approx(-0.6, abs=0.1)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_discount_is_the_share_of_slots_that_keep_their_expert(size: int) -> None:
    tokens = np.random.default_rng(4).permuted(np.tile(np.arange(6), (50, 1)), axis=1)[:, None, :2]
    workload = decoding([tokens], experts=6)  # one layer
    misses = slow_misses(workload, size, lambda b, uses, n: (uses[-1],))
    assert reuse.fit_discount(workload, size) == pytest.approx(1 - misses / (50 * size))


def test_a_cache_of_everything_hands_nothing_over() -> None:
    workload = small_workload()
    assert reuse.fit_discount(workload, 3 * 6) == 1.0


def test_the_likelihood_is_of_the_experts_near_the_cache() -> None:
    workload = small_workload(6, tokens=(40, 30))
    slots, half_life, g = 6, 4.0, 2 ** (-1 / 4.0)  # 2 slots a layer: the 4 latest of each layer count
    found = reuse.fit_reuse(workload, slots, (half_life,))
    nll, entries = 0.0, 0
    for layer in range(3):
        recent: list[int] = []
        for s in range(workload.steps):
            now = workload.event(s * 3 + layer)
            for e in recent[:4]:
                f = sum((1 - g) * g ** (s - i) for i in range(s) if e in workload.event(i * 3 + layer))
                q = min(float(np.exp(found.intercept + found.slope * np.log(f + 1e-6))), 1 - 1e-4)
                nll -= np.log(q if e in now else 1 - q)
                entries += 1
            recent = sorted(now, reverse=True) + [e for e in recent if e not in now]
    assert found.nll == pytest.approx(nll / entries, rel=5e-3)  # log f is binned


def test_one_step_says_nothing() -> None:
    with pytest.raises(ConfigError, match="1 training steps"):
        reuse.fit_reuse(small_workload(tokens=(1,)), 8)


def test_the_same_documents_give_the_same_fit() -> None:
    workload = small_workload(7, tokens=(60, 50))
    assert reuse.fit_reuse(workload, 9) == reuse.fit_reuse(workload, 9)
