"""benchmark.py mode=quantize: what integer weights cost in recall, and what they spare in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specgate.calibration.fit import TemperatureFitter
from specgate.calibration.load import find_checkpoint, load_predictor
from specgate.errors import ConfigError
from specgate.predictors.base import Predictor
from specgate.predictors.quantize import pack, stored_bytes
from specgate.report.accuracy import assign, labels, pick_device
from specgate.report.cost import CostSettings, history, time_steps, weights_in
from specgate.report.evaluate import evaluate_data, labels_of, open_split
from specgate.report.identity import trace_identity
from specgate.traces.datamodule import RoutingDataModule


@dataclass
class QuantizeSettings:
    """What to compare.

    Attributes:
        checkpoints: ``.ckpt`` files or directories of runs; of float32 weights, to be rounded here, or
            already packed by a run that was trained for it.
        bits: precisions to round float32 weights to.
        match, split, device: see ``AccuracySettings``.
        context, repeats: of the timed call, see ``CostSettings``.
    """

    checkpoints: Sequence[str] = ()
    bits: Sequence[int] = (8, 4)
    match: str = "trained"
    split: str = "test"
    device: str = "auto"
    context: int = 128
    repeats: int = 9

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ConfigError("mode=quantize needs trained predictors: give checkpoints=[outputs/train/...]")
        if self.split not in ("test", "validation"):
            raise ConfigError(f"split={self.split!r} is unknown: choose test or validation")


def compare_precisions(
    settings: QuantizeSettings,
    traces: Mapping[str, RoutingDataModule],
    fitter: Any = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score every precision of every checkpoint on its traces.

    Returns:
        The content of metrics.json; a flat row per precision: ``precision``, ``training`` (float,
        post-training, aware), ``parameters``, ``bytes``, ``recall_n1`` ..., ``ece_n1`` ... of targets within
        the token, ``us_cpu_1``.
    """
    console, fitter = console or Console(quiet=True), fitter or TemperatureFitter()
    device = torch.device(pick_device(settings.device))
    files = [find_checkpoint(path) for path in settings.checkpoints]
    plan = assign(files, traces, settings.match)
    rows, identities = [], []
    for name, data in traces.items():
        identities.append(trace_identity(data, name))
        for file, label in labels(sorted(file for file in files if name in plan[file])).items():
            console.print(f"{name}: {label}", highlight=False)
            rows += [
                precision_row(predictor, training, name, label, data, settings, device)
                for predictor, training in precisions(file, settings.bits, data, fitter, device)
            ]
    return {
        "mode": "quantize",
        "split": settings.split,
        "checkpoints": [str(file) for file in files],
        "traces": identities,
        "rows": rows,
    }


def precisions(
    file: Path, bits: Sequence[int], data: RoutingDataModule, fitter: Any, device: torch.device
) -> list[tuple[Predictor, str]]:
    """A checkpoint at every precision: (predictor, how it came to its weights)."""
    predictor = load_predictor(file, device)
    if predictor.quantization is not None:
        return [(predictor, "aware")]
    found = [(predictor, "float")]
    for b in bits:
        rounded = load_predictor(file, device)
        pack(rounded, b)
        fitter(rounded, data.val_dataloader(), device)
        found.append((rounded, "post-training"))
    return found


def precision_row(
    predictor: Predictor,
    training: str,
    trace: str,
    label: str,
    data: RoutingDataModule,
    settings: QuantizeSettings,
    device: torch.device,
) -> dict[str, Any]:
    """Size, time and scores of one predictor."""
    scored = evaluate_data(
        predictor,
        data,
        split=settings.split,
        trace=trace,
        name=label,
        device=device,
        batches=open_split(data, settings.split),
    )
    within = [row for row in scored if row["kind"] == "within"]
    bits = None if predictor.quantization is None else predictor.quantization["bits"]
    row: dict[str, Any] = {**labels_of(data, trace, settings.split), "predictor": label, "learned": True}
    row |= {"precision": f"int{bits}" if bits else "float32", "training": training}
    row |= {"parameters": weights_in(predictor), "bytes": stored_bytes(predictor)}
    for one in within:
        row |= {f"recall_n{one['horizon']}": one["recall_at_k"], f"ece_n{one['horizon']}": one["ece"]}
    cost = CostSettings(context=settings.context, repeats=settings.repeats, batch_sizes=[1])
    window = history(data, settings.context)
    for place in ("cpu", *(["cuda"] if device.type == "cuda" else [])):
        times, _ = time_steps({label: (predictor, None)}, window, 1, place, cost)
        row[f"us_{place}_1"] = round(times[label].median, 2)
    return row
