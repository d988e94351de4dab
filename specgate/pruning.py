"""What a run of a sweep tells the others, and what it learns from them: the median stopping rule.

Hydra's Optuna sweeper (1.3) asks Optuna for a trial, runs the job and tells Optuna its result; a job has no
handle on its trial, so Optuna's own pruners cannot reach it. Here each job writes its validation curve into
its folder of the sweep and reads the curves of the jobs that ended before it, whatever sweeper or launcher
runs them: a shared file system is all it takes.

The rule is that of Golovin et al., "Google Vizier: A Service for Black-Box Optimization" (KDD 2017), section
3.2: a run is stopped at a step if its best value so far is worse than the median, over the completed runs, of
the running average of their values up to that step. A stopped run ends in good order: its best weights are
calibrated and evaluated like any other's, so that the sampler learns its true value.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from specgate.errors import ConfigError
from specgate.traces.batch import RoutingBatch

CURVE = "curve.json"
Curve = Sequence[Sequence[float]]


def running_average(curve: Curve, step: float) -> float | None:
    """Mean of the values reported up to ``step``, None if there is none.

    Args:
        curve: ``[step, value]`` pairs.
    """
    values = [value for at, value in curve if at <= step]
    return statistics.fmean(values) if values else None


def median_verdict(own: Curve, others: Iterable[Curve], jobs: int, sign: float = 1.0) -> float | None:
    """The median that the run of curve ``own`` falls short of, or None if it may go on.

    Args:
        own: its curve so far, the last point being now.
        others: curves of completed runs.
        jobs: so many of them must reach back to this step, or nothing is said.
        sign: 1 if large values are good, -1 if small ones are.
    """
    step = own[-1][0]
    averages = [mean for curve in others if (mean := running_average(curve, step)) is not None]
    if len(averages) < jobs:
        return None
    median = statistics.median(averages)
    best = max(sign * value for _, value in own)
    return median if best < sign * median else None


class MedianStopping(L.Callback):
    """Ends a run of a sweep that is worse than half of the completed ones.

    Args:
        folder: the run's own folder, where ``curve.json`` goes.
        sweep: the folder of the whole sweep; other runs are its sub-folders.
        monitor: a metric logged in validation.
        mode: ``max`` or ``min``.
        jobs: completed runs needed before any is stopped.
        evaluations: validations before a run may be stopped.

    Attributes:
        pruned: None, or why the run was stopped: ``step``, ``best`` so far, ``median`` of the others,
            ``jobs`` compared with.

    Raises:
        ConfigError: for another mode.
    """

    def __init__(
        self,
        folder: str,
        sweep: str,
        monitor: str = "val/recall",
        mode: str = "max",
        jobs: int = 3,
        evaluations: int = 1,
    ) -> None:
        if mode not in ("max", "min"):
            raise ConfigError(f"mode={mode!r} of median stopping is unknown: choose max or min")
        self.path, self.sweep, self.monitor = Path(folder) / CURVE, Path(sweep), monitor
        self.sign, self.jobs, self.evaluations = (1.0 if mode == "max" else -1.0), jobs, evaluations
        self.curve: list[list[float]] = []
        self.pruned: dict[str, Any] | None = None

    def completed(self) -> list[Curve]:
        """Curves of the sweep's runs that trained to their end."""
        found = []
        for file in sorted(self.sweep.glob(f"*/{CURVE}")):
            if file == self.path:
                continue
            try:
                record = json.loads(file.read_text())
            except ValueError:
                continue  # being written
            if record["state"] == "completed" and record["monitor"] == self.monitor:
                found.append(record["curve"])
        return found

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the curve, and stop if the rule says so."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None:
            return
        self.curve.append([trainer.global_step, float(value)])
        self._write(trainer, "running")
        others = self.completed()
        median = None
        if len(self.curve) >= self.evaluations:
            median = median_verdict(self.curve, others, self.jobs, self.sign)
        if trainer.strategy.reduce_boolean_decision(median is not None, all=False):
            best = self.sign * max(self.sign * v for _, v in self.curve)
            self.pruned = {
                "step": trainer.global_step,
                "best": round(best, 6),
                "median": None if median is None else round(median, 6),
                "jobs": len(others),
            }
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The curve is whole now; it counts for the others unless the run was stopped."""
        self._write(trainer, "pruned" if self.pruned else "completed")

    def _write(self, trainer: L.Trainer, state: str) -> None:
        if not trainer.is_global_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"state": state, "monitor": self.monitor, "curve": self.curve}))
        temporary.replace(self.path)


class TokenCount(L.Callback):
    """How many scored tokens the training batches held (on this rank).

    Attributes:
        total: the sum, kept on the device of the batches.
    """

    def __init__(self) -> None:
        self.total: torch.Tensor | int = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: RoutingBatch, *_: Any
    ) -> None:
        """Add one batch."""
        self.total = self.total + batch.mask_BT.sum()
