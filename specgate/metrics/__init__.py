"""How well routing is foreseen: pure functions and torchmetrics classes of fixed size."""

from specgate.metrics.functional import (
    SCORES,
    calibration_bins,
    calibration_error,
    equal_mass_error,
    event_scores,
    threshold_curve,
)
from specgate.metrics.routing import CalibrationMetrics, RoutingMetrics
from specgate.metrics.uncertainty import AreaUnderROC, auroc, decompose, forecast_entropy

__all__ = [
    "SCORES",
    "AreaUnderROC",
    "CalibrationMetrics",
    "RoutingMetrics",
    "auroc",
    "calibration_bins",
    "calibration_error",
    "decompose",
    "equal_mass_error",
    "event_scores",
    "forecast_entropy",
    "threshold_curve",
]
