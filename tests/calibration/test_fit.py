"""Fitting a predictor's calibrator, and the table of confidence decay."""

from __future__ import annotations

import pytest
import torch

from specgate.calibration.decay import confidence_decay
from specgate.calibration.fit import NoCalibration, TemperatureFitter, forecast_stream
from specgate.calibration.temperature import TemperatureScaling
from tests.predictors.support import fitted, make_batch


@pytest.mark.parametrize("K", [1, 2])
def test_fitter_installs_a_calibrator_for_every_kind_and_horizon(K: int) -> None:
    predictor = fitted("popularity", "decode", K=K)
    predictor.train()
    batches = [make_batch("decode", K=K, B=8, T=16, seed=seed) for seed in range(3)]
    report = TemperatureFitter(cells=5000)(predictor, batches)
    assert isinstance(predictor.calibrator, TemperatureScaling)
    assert predictor.calibrator.link == ("softmax" if K == 1 else "sigmoid")
    assert {(row["kind"], row["horizon"]) for row in report} == {
        (kind, h) for kind in ("within", "wrapped", "entry") for h in (1, 2, 3)
    } - {("within", 3)}  # three layers: from layer 0 on, N+3 lies in the next token
    assert all(row["nll_after"] <= row["nll_before"] for row in report)
    assert predictor.training
    p_BTPHE = predictor.probabilities(batches[0])
    assert p_BTPHE.min() >= 0
    assert p_BTPHE.max() <= 1


def test_no_calibration_changes_nothing() -> None:
    predictor = fitted("popularity")
    before = predictor.calibrator
    assert NoCalibration()(predictor, [make_batch()]) == []
    assert predictor.calibrator is before


def test_chunks_give_the_same_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = fitted("mlp")
    batch = make_batch("decode", B=5)
    whole = torch.cat([logits for _, logits in forecast_stream(predictor, [batch])])
    monkeypatch.setattr("specgate.calibration.fit.MAX_LOGITS", 1)
    pieces = list(forecast_stream(predictor, [batch]))
    assert len(pieces) == 5
    torch.testing.assert_close(torch.cat([logits for _, logits in pieces]), whole)
    assert not whole.requires_grad


def test_decay_orders_horizons_and_reports_overconfidence() -> None:
    def row(predictor: str, horizon: int, confidence: float, accuracy: float) -> dict[str, object]:
        return {
            "trace": "t",
            "stack": "decoder",
            "phase": "decode",
            "predictor": predictor,
            "kind": "within",
            "horizon": horizon,
            "mean_confidence": confidence,
            "mean_confidence_uncalibrated": 0.99,
            "mean_accuracy": accuracy,
            "top_k": 2,
            "experts": 8,
        }

    rows = [row("a", 2, 0.7, 0.75), row("a", 1, 0.9, 0.8), row("b", 1, 0.5, 0.5)]
    first, second = confidence_decay(rows)
    assert first["horizon"] == [1, 2]
    assert first["gap"] == [0.1, -0.05]
    assert first["confidence_uncalibrated"] == [0.99, 0.99]
    assert (second["predictor"], second["gap"]) == ("b", [0.0])
