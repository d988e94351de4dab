"""The calibrators by name, and which one a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from specgate.calibration.base import Calibrator
from specgate.calibration.isotonic import IsotonicCalibration
from specgate.calibration.temperature import TemperatureScaling
from specgate.calibration.vector import VectorScaling
from specgate.errors import CheckpointError, ConfigError
from specgate.predictors.base import Predictor

CALIBRATORS: dict[str, type[Calibrator]] = {
    cls.name: cls for cls in (TemperatureScaling, VectorScaling, IsotonicCalibration)
}


def link_of(top_k: int) -> str:
    """The link between logits and probabilities: softmax for one expert per token, else a sigmoid per
    expert.
    """
    return "softmax" if top_k == 1 else "sigmoid"


def make_calibrator(name: str, predictor: Predictor) -> Calibrator:
    """An unfitted calibrator of the predictor's shape.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in CALIBRATORS:
        raise ConfigError(f"calibrator {name!r} is unknown: choose one of {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name](
        predictor.lookahead, link_of(predictor.top_k), predictor.layers + 1, predictor.experts
    )


def restore_calibrator(state: Mapping[str, Tensor], predictor: Predictor) -> Calibrator:
    """The unfitted calibrator into which a checkpoint's ``state`` fits, told by the names of its buffers.

    Raises:
        CheckpointError: if no calibrator has such buffers.
    """
    for name, cls in CALIBRATORS.items():
        if set(make_calibrator(name, predictor).state_dict()) == set(state):
            return cls.from_state(
                state, predictor.lookahead, link_of(predictor.top_k), predictor.layers + 1, predictor.experts
            )
    raise CheckpointError(
        f"the checkpoint holds an unknown calibrator (buffers {', '.join(sorted(state))}): use the "
        f"version of specgate that wrote it, or train it again (this one knows {', '.join(CALIBRATORS)})"
    )
