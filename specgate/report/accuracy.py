"""benchmark.py mode=accuracy: checkpoints, free predictors and the oracle on the locked test split of any
traces.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from specgate.calibration.base import Calibrator
from specgate.calibration.decay import confidence_decay
from specgate.calibration.fit import TemperatureFitter
from specgate.calibration.load import check_compatible, find_checkpoint, load_predictor
from specgate.errors import CheckpointError, ConfigError, SpecgateError
from specgate.predictors.base import Predictor
from specgate.predictors.counting import CountingPredictor
from specgate.predictors.registry import predictor_class, predictor_names
from specgate.report.evaluate import ORACLE, evaluate_data, make_oracle, open_split
from specgate.report.identity import expert_load, trace_identity
from specgate.report.record import FILE_NAME, read_record
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import norm_eps

FREE = (
    "popularity",
    "markov",
    "markov2",
    "previous_token",
    "recency",
    "token_table",
    "router_lookahead",
    "router_mean_expert",
)


@dataclass
class AccuracySettings:
    """What to compare and how.

    Attributes:
        checkpoints: ``.ckpt`` files or directories of runs.
        free: names of the free predictors to fit on the train split.
        lookahead: horizons of the free predictors and the oracle; checkpoints bring their own.
        match: ``trained``: a checkpoint is scored on the traces that its run's metrics.json names (on all
            that fit its shape if it names none); ``shape``: on every trace that fits, to see a shift of
            domain.
        split: ``test`` (locked) or ``validation``.
        bins: calibration bins.
        device: ``auto``, ``cpu``, ``cuda``, ...
        progress: show progress bars.
    """

    checkpoints: Sequence[str] = ()
    free: Sequence[str] = FREE
    lookahead: int = 3
    match: str = "trained"
    split: str = "test"
    bins: int = 20
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.match not in ("trained", "shape"):
            raise ConfigError(f"match={self.match!r} is unknown: choose trained or shape")
        if self.split not in ("test", "validation"):
            raise ConfigError(f"split={self.split!r} is unknown: choose test or validation")
        for name in self.free:
            if name not in predictor_names() or predictor_class(name).learned:
                raise ConfigError(f"free={name!r} is no free predictor: choose among {', '.join(FREE)}")


def compare(
    settings: AccuracySettings,
    traces: Mapping[str, RoutingDataModule],
    fitter: Any = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score everything on every trace.

    Args:
        traces: data modules by the name they get in tables.
        fitter: calibrates what has no fitted calibrator yet, on the validation split; default
            :class:`TemperatureFitter`.
        console: where to say what is going on.

    Returns:
        The content of metrics.json: ``traces``, ``rows``, ``calibration``, ``decay``, ``load``, ``skipped``.

    Raises:
        CheckpointError: if a checkpoint cannot be loaded or fits none of the traces.
    """
    console, fitter = console or Console(quiet=True), fitter or TemperatureFitter()
    device = torch.device(pick_device(settings.device))
    files = [find_checkpoint(path) for path in settings.checkpoints]
    plan = assign(files, traces, settings.match)
    rows: list[dict[str, Any]] = []
    calibration, skipped, identities, load = [], [], [], {}
    for name, data in traces.items():
        console.print(f"{name}: {data.stack}, {data.phase}, {data.spec.experts} experts", highlight=False)
        contest = Contest(name, data, settings, fitter, device)
        contest.run({file for file, names in plan.items() if name in names})
        identities.append(trace_identity(data, name))
        load[name] = expert_load(data.spec, contest.batches)
        rows += contest.rows
        calibration += contest.calibration
        skipped += contest.skipped
    return {
        "mode": "accuracy",
        "split": settings.split,
        "checkpoints": [str(file) for file in files],
        "traces": identities,
        "rows": rows,
        "calibration": calibration,
        "decay": confidence_decay(rows),
        "load": load,
        "skipped": skipped,
    }


class Contest:
    """All predictors on one trace.

    Args:
        trace: its name in tables.
        fitter: see :func:`compare`.

    Attributes:
        batches: the loader of the scored split, opened once.
        rows, calibration, skipped: what was found.
    """

    def __init__(
        self,
        trace: str,
        data: RoutingDataModule,
        settings: AccuracySettings,
        fitter: Any,
        device: torch.device,
    ) -> None:
        self.trace, self.data, self.settings, self.fitter, self.device = trace, data, settings, fitter, device
        self.batches = open_split(data, settings.split)
        self.rows: list[dict[str, Any]] = []
        self.calibration: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []

    def run(self, files: Iterable[Path]) -> None:
        """The free predictors, the checkpoints in ``files``, the oracle."""
        for name in self.settings.free:
            predictor = self.fit_free(name)
            if predictor is not None:
                self.score(predictor, name)
        for file, label in labels(sorted(files)).items():
            self.score(load_predictor(file), label)
        self.score(make_oracle(self.data, self.settings.lookahead), ORACLE)

    def score(self, predictor: Predictor, label: str) -> None:
        """Calibrate if that was not done yet (the oracle needs none), and add the predictor's rows."""
        predictor.to(self.device)
        if label != ORACLE and not isinstance(predictor.calibrator, Calibrator):
            fitted = self.fitter(predictor, self.data.val_dataloader(), self.device)
            self.calibration += [{"trace": self.trace, "predictor": label, **row} for row in fitted]
        self.rows += evaluate_data(
            predictor,
            self.data,
            split=self.settings.split,
            trace=self.trace,
            name=label,
            device=self.device,
            bins=self.settings.bins,
            progress=self.settings.progress,
            batches=self.batches,
        )

    def fit_free(self, name: str) -> Predictor | None:
        """Count a free predictor's tables over the train split; None, with a reason in ``skipped``, if it
        cannot be.
        """
        cls, spec, routers = predictor_class(name), self.data.spec, None
        if cls.needs_hidden:
            routers = self.data.routers if spec.hidden_size is not None else None
            if routers is None:
                reason = (
                    "the trace has no hidden states"
                    if spec.hidden_size is None
                    else "the trace has no routers"
                )
                self.skipped.append({"trace": self.trace, "predictor": name, "reason": reason})
                return None
        options: dict[str, Any] = {**vars(spec), "lookahead": self.settings.lookahead}
        if cls.needs_hidden:
            options |= {"routers": routers, "norm_eps": norm_eps(self.data)}
        predictor = cls(**options).to(self.device)
        if isinstance(predictor, CountingPredictor):
            quiet = not (self.settings.progress and sys.stdout.isatty())
            batches = track(
                self.data.train_dataloader(),
                description=f"counting {name:>18}",
                transient=True,
                disable=quiet,
            )
            with torch.no_grad():
                for batch in batches:
                    predictor.count(batch.to(self.device))
                predictor.finish()
        return predictor


def pick_device(name: str) -> str:
    """``auto`` is the first CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: if a CUDA device is asked for and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name} but no CUDA device is visible: choose device=cpu or device=auto")
    return name


def assign(
    files: Sequence[Path], traces: Mapping[str, RoutingDataModule], match: str
) -> dict[Path, list[str]]:
    """Which checkpoint is scored on which traces.

    Raises:
        CheckpointError: if one fits none of them, with the reason for the first trace.
    """
    plan: dict[Path, list[str]] = {}
    for file in files:
        predictor = load_predictor(file)
        plan[file], reason = [], ""
        trained = trained_on(file) if match == "trained" else None
        for trace, data in traces.items():
            if trained is not None and not trained & _keys(data):
                reason = (
                    reason
                    or f"{file} was trained on another trace than {trace} (match=shape scores it anyway)"
                )
                continue
            try:
                check_compatible(predictor, data.spec)
            except CheckpointError as error:
                reason = reason or str(error)
                continue
            plan[file].append(trace)
        if not plan[file]:
            raise CheckpointError(reason or f"no trace to score {file} on: name one with data=")
    return plan


def _keys(data: RoutingDataModule) -> set[tuple[str, str, str]]:
    """A trace's stacks by what they are: (directory's name, stack, phase)."""
    return {(path.resolve().name, data.stack, data.phase) for path in data.paths}


def trained_on(file: Path) -> set[tuple[str, str, str]] | None:
    """(directory's name, stack, phase) of the traces a checkpoint's run was trained on, None if nobody wrote
    it down.

    The run's metrics.json stands beside the checkpoint or in a directory above.
    """
    for folder in list(file.resolve().parents)[:3]:
        if (folder / FILE_NAME).is_file():
            try:
                data = read_record(folder)["config"]["data"]
                paths = [data["traces"]] if isinstance(data["traces"], str) else data["traces"]
                return {(Path(path).name, data["stack"], data["phase"]) for path in paths}
            except (SpecgateError, KeyError, TypeError):
                return None
    return None


def labels(files: Sequence[Path]) -> dict[Path, str]:
    """A name for every checkpoint: its predictor's, with the run's directory added where two would be equal,
    and as many of the directories above it as it takes.
    """
    names = {file: load_predictor(file).name for file in files}
    found: dict[Path, str] = {}
    for depth in range(1, max((len(file.parts) for file in files), default=0) + 1):
        for file, name in names.items():
            folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
            alone = list(names.values()).count(name) == 1
            found[file] = name if alone else f"{name} ({'/'.join(folder.parts[-depth:])})"
        if len(set(found.values())) == len(found):
            break
    return found
