"""Isotonic calibration: agrees with scikit-learn, keeps the ranking, sums to one for K = 1."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from specgate.calibration.isotonic import (
    SLOPE,
    IsotonicCalibration,
    group,
    interpolate,
    log_odds,
    pool_adjacent_violators,
)
from specgate.calibration.temperature import TemperatureScaling
from specgate.traces.batch import kind_PH

LAYERS, HORIZONS, EXPERTS = 2, 2, 6
KINDS_PH = kind_PH(LAYERS, HORIZONS, "decode")
Stream = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def distorted_stream(link: str, batches: int = 20, seed: int = 0) -> Stream:
    """True log-odds pushed through a cubic, which no temperature undoes."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(batches):
        shape = (8, 16, LAYERS + 1, HORIZONS)
        true = 1.5 * torch.randn(*shape, EXPERTS, generator=generator)
        if link == "softmax":
            used = torch.multinomial(true.softmax(-1).view(-1, EXPERTS), 1, generator=generator)
            used = used.view(*shape, 1)
        else:  # the gap to the 3rd/4th expert decides: Gumbel top-3 of 6
            noise = -torch.log(-torch.log(torch.rand(true.shape, generator=generator)))
            used = (true + noise).topk(3).indices
        made.append((true + 0.3 * true**3, used, torch.ones(shape, dtype=torch.bool)))
    return made


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 60))
def test_pool_adjacent_violators_agrees_with_sklearn(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    y, weight = rng.random(count), rng.random(count) + 0.01
    expected = IsotonicRegression().fit(np.arange(count), y, sample_weight=weight).predict(np.arange(count))
    np.testing.assert_allclose(pool_adjacent_violators(y, weight), expected, atol=1e-10)


def test_fit_agrees_with_sklearn_where_every_value_is_a_knot() -> None:
    rng = np.random.default_rng(0)
    levels = np.sort(rng.normal(size=40)).astype(np.float32)
    logits_ME = torch.from_numpy(rng.choice(levels, size=(500, EXPERTS)))
    used_MK = (logits_ME + torch.from_numpy(rng.gumbel(size=(500, EXPERTS)))).topk(2).indices
    shape = (1, 500, LAYERS + 1, HORIZONS)
    stream = [
        (
            logits_ME[None, :, None, None].expand(*shape, EXPERTS),
            used_MK[None, :, None, None].expand(*shape, 2),
            torch.ones(shape, dtype=torch.bool),
        )
    ]
    isotonic = IsotonicCalibration(HORIZONS, "sigmoid")
    isotonic.fit(stream, KINDS_PH, cells=10**9)
    x = logits_ME.flatten().numpy()
    used = np.zeros((500, EXPERTS))
    np.put_along_axis(used, used_MK.numpy(), 1, axis=1)
    expected = IsotonicRegression(out_of_bounds="clip").fit(x, used.flatten()).predict(x)
    inside = (expected > 0.01) & (expected < 0.99)  # sklearn gives 0 and 1 where nothing else was seen
    p = isotonic(stream[0][0], KINDS_PH)[0, :, 1, 0].flatten().numpy()
    np.testing.assert_allclose(p[inside], expected[inside], atol=5 * SLOPE)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_it_undoes_what_a_temperature_cannot(link: str) -> None:
    isotonic, one = IsotonicCalibration(HORIZONS, link), TemperatureScaling(HORIZONS, link)
    report = isotonic.fit(distorted_stream(link), KINDS_PH)
    one.fit(distorted_stream(link), KINDS_PH)
    assert all(row["nll_after"] <= row["nll_before"] for row in report)
    logits, used, _ = distorted_stream(link, batches=1, seed=7)[0]

    def nll(p: torch.Tensor) -> float:
        p = p[..., KINDS_PH >= 0, :].clamp(1e-7, 1 - 1e-7)
        u = used[..., KINDS_PH >= 0, :]
        if link == "softmax":
            return float(-p.gather(-1, u).log().mean())
        truth = torch.zeros_like(p).scatter_(-1, u, 1.0)
        return float(-(truth * p.log() + (1 - truth) * (1 - p).log()).mean())

    assert nll(isotonic(logits, KINDS_PH)) < nll(one(logits, KINDS_PH))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_ranking_stays_and_probabilities_add_up(link: str) -> None:
    isotonic = IsotonicCalibration(HORIZONS, link)
    logits = 20 * torch.randn(3, 5, LAYERS + 1, HORIZONS, EXPERTS)
    bare = logits.softmax(-1) if link == "softmax" else logits.sigmoid()
    torch.testing.assert_close(isotonic(logits, KINDS_PH), bare, atol=2e-6, rtol=1e-4)
    isotonic.fit(distorted_stream(link, batches=3), KINDS_PH)
    logits = 2 * torch.randn(50, 5, LAYERS + 1, HORIZONS, EXPERTS)
    p = isotonic(logits, KINDS_PH)
    order = logits.argsort(-1)
    rise, apart = p.gather(-1, order).diff(dim=-1), logits.gather(-1, order).diff(dim=-1) > 2e-3
    assert rise.min() > -2e-7  # equal up to float32
    assert (rise[apart] > 0).all()
    assert 0 <= float(p.min()) <= float(p.max()) <= 1
    if link == "softmax":
        torch.testing.assert_close(p.sum(-1), torch.ones_like(p.sum(-1)))


def test_interpolation_agrees_with_numpy() -> None:
    knot = torch.tensor([-2.0, -0.5, 0.0, 1.0])
    value = torch.tensor([-3.0, -1.0, -1.0, 4.0])
    x = torch.linspace(-2, 1, 301)
    expected = np.interp(x.numpy(), knot.numpy(), value.numpy())
    np.testing.assert_allclose(
        interpolate(x[None, None], knot[None, None], value[None, None])[0, 0], expected, atol=1e-5
    )
    beyond = interpolate(torch.tensor([[[3.0]]]), knot[None, None], value[None, None])
    assert float(beyond) == pytest.approx(4.0 + SLOPE * 2.0)


def test_groups_cover_all_cells_in_order() -> None:
    rng = np.random.default_rng(1)
    x = np.round(rng.normal(size=5000), 2)
    y = (rng.random(5000) < 0.1).astype(float)
    x_G, y_G, cells_G = group(x, y, 32)
    assert len(x_G) <= 32
    assert (np.diff(x_G) > 0).all()
    assert cells_G.sum() == 5000
    assert (y_G * cells_G).sum() == pytest.approx(y.sum())
    few = group(np.array([1.0, 1.0, 2.0]), np.array([0.0, 1.0, 1.0]), 8)
    np.testing.assert_allclose(np.array(few), [[1, 2], [0.5, 1], [2, 1]], atol=1e-6)


def test_state_is_of_fixed_size_and_survives_a_checkpoint() -> None:
    isotonic = IsotonicCalibration(HORIZONS, "sigmoid", knots=32)
    isotonic.fit(distorted_stream("sigmoid", batches=2), KINDS_PH)
    assert isotonic.knot_QHI.shape == (3, HORIZONS, 32)
    assert (isotonic.knot_QHI.diff(dim=-1) > 0).all()
    file = io.BytesIO()
    torch.save(isotonic.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = IsotonicCalibration.from_state(state, HORIZONS, "sigmoid", LAYERS + 1, EXPERTS)
    again.load_state_dict(state)
    logits = torch.randn(2, 3, LAYERS + 1, HORIZONS, EXPERTS)
    assert torch.equal(again(logits, KINDS_PH), isotonic(logits, KINDS_PH))


def test_log_odds_stay_finite() -> None:
    extreme = torch.tensor([[-float("inf"), float("inf"), 0.0]])
    assert log_odds(extreme, "sigmoid").tolist() == [[-30.0, 30.0, 0.0]]
    certain = torch.tensor([[0.0, 200.0, 0.0]])
    assert torch.isfinite(log_odds(certain, "softmax")).all()
