"""specgate foresees which experts a Mixture-of-Experts model will need, and measures what that is worth.

The public names below are loaded on first use, so that ``import specgate`` costs nothing (no torch).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> module that defines it.
_PUBLIC = {
    "BudgetError": "specgate.errors",
    "CheckpointError": "specgate.errors",
    "ConfigError": "specgate.errors",
    "Forecast": "specgate.forecast",
    "Predictor": "specgate.predictors.base",
    "Recorder": "specgate.moe.recorder",
    "RoutingBatch": "specgate.traces.batch",
    "RoutingDataModule": "specgate.traces.datamodule",
    "SpecgateError": "specgate.errors",
    "StoreError": "specgate.errors",
    "TextError": "specgate.errors",
    "TraceError": "specgate.errors",
    "TraceReader": "specgate.traces.store",
    "TraceWriter": "specgate.traces.store",
    "UnknownArchitectureError": "specgate.errors",
    "load_predictor": "specgate.calibration.load",
    "offload": "specgate.moe.offload",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from specgate.calibration.load import load_predictor as load_predictor
    from specgate.errors import CheckpointError as CheckpointError
    from specgate.errors import ConfigError as ConfigError
    from specgate.errors import SpecgateError as SpecgateError
    from specgate.errors import TextError as TextError
    from specgate.errors import TraceError as TraceError
    from specgate.errors import UnknownArchitectureError as UnknownArchitectureError
    from specgate.forecast import Forecast as Forecast
    from specgate.moe.offload import offload as offload
    from specgate.moe.recorder import Recorder as Recorder
    from specgate.predictors.base import Predictor as Predictor
    from specgate.traces.batch import RoutingBatch as RoutingBatch
    from specgate.traces.datamodule import RoutingDataModule as RoutingDataModule
    from specgate.traces.store import TraceReader as TraceReader
    from specgate.traces.store import TraceWriter as TraceWriter


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'specgate' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
