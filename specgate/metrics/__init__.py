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

__all__ = [
    "SCORES",
    "CalibrationMetrics",
    "RoutingMetrics",
    "calibration_bins",
    "calibration_error",
    "equal_mass_error",
    "event_scores",
    "threshold_curve",
]
