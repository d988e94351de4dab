"""Confidence decay: the laws agree with scipy, known half-lives come back, and few horizons are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from specgate.calibration.decay import confidence_decay, decay_curve, fit_decay

H = np.arange(1.0, 7.0)


def test_an_exponential_comes_back_with_its_half_life() -> None:
    fit = fit_decay(H.astype(int).tolist(), (0.125 + 0.7 * np.exp(-(H - 1) / 8)).tolist(), 0.125)
    law = fit["laws"]["exponential"]
    assert law["tau"] == pytest.approx(8, rel=1e-3)
    assert law["half_life"] == pytest.approx(8 * math.log(2), rel=1e-3)
    assert law["start"] == pytest.approx(0.825, abs=1e-5)
    assert law["r2"] == pytest.approx(1, abs=1e-6)
    assert fit["best"].startswith("exponential")
    np.testing.assert_allclose(decay_curve(law, H), law["predicted"], atol=1e-5)


def test_a_power_law_with_a_floor_of_its_own_is_told_apart() -> None:
    fit = fit_decay(H.astype(int).tolist(), (0.5 + 0.4 * H**-1.5).tolist(), 0.125)
    assert fit["best"] == "power, fitted floor"
    law = fit["laws"][fit["best"]]
    assert law["floor"] == pytest.approx(0.5, abs=1e-3)
    assert law["rate"] == pytest.approx(1.5, rel=1e-2)
    assert law["half_life"] == pytest.approx(2 ** (1 / 1.5) - 1, rel=1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_agree_with_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = 0.2 + 0.6 * np.exp(-(H - 1) / rng.uniform(2, 20)) + 0.004 * rng.normal(size=6)
    laws = fit_decay(H.astype(int).tolist(), y.tolist(), 0.2)["laws"]

    def exponential(h: np.ndarray, start: float, rate: float) -> np.ndarray:
        return 0.2 + (start - 0.2) * np.exp(-(h - 1) * rate)

    def power(h: np.ndarray, start: float, rate: float) -> np.ndarray:
        return 0.2 + (start - 0.2) * h**-rate

    for name, law in (("exponential", exponential), ("power", power)):
        best, _ = curve_fit(law, H, y, p0=(0.8, 0.1))
        assert laws[name]["start"] == pytest.approx(best[0], abs=1e-4)
        assert laws[name]["rate"] == pytest.approx(best[1], rel=1e-3)
        error = math.sqrt(float(((law(H, *best) - y) ** 2).mean()))
        assert laws[name]["rmse"] == pytest.approx(error, rel=1e-3)
        fitted = laws[f"{name}, fitted floor"]
        assert fitted["rmse"] <= laws[name]["rmse"] + 1e-9
        assert 0 <= fitted["floor"] <= 1


def test_no_decay_has_no_half_life() -> None:
    law = fit_decay([1, 2, 3], [0.8, 0.8, 0.8], 0.1)["laws"]["exponential"]
    assert law["half_life"] is None
    assert law["tau"] is None
    assert law["r2"] is None
    with pytest.raises(ValueError, match="2 horizons do not show a decay"):
        fit_decay([1, 2], [0.8, 0.7], 0.1)


def test_rows_with_three_horizons_get_fits_and_others_do_not() -> None:
    def row(kind: str, horizon: int) -> dict[str, object]:
        names = {"trace": "t", "stack": "s", "phase": "decode", "predictor": "p", "top_k": 1, "experts": 4}
        accuracy = 0.25 + 0.5 * 0.8 ** (horizon - 1)
        values = {"mean_accuracy": accuracy, "mean_confidence": 0.9 * accuracy}
        return names | values | {"kind": kind, "horizon": horizon, "mean_confidence_uncalibrated": 0.9}

    within, entry = confidence_decay(
        [*(row("within", h) for h in (3, 1, 2)), row("entry", 1), row("entry", 2)]
    )
    assert within["fit"]["accuracy"]["laws"]["exponential"]["tau"] == pytest.approx(
        -1 / math.log(0.8), rel=1e-3
    )
    assert within["fit"]["confidence"]["laws"]["exponential"]["floor"] == 0.25
    assert "fit" not in entry
