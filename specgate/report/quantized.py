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
from specgate.report.html import plain_page
from specgate.report.identity import trace_identity
from specgate.report.style import Row, horizon_name, select, trace_title, traces_of
from specgate.report.tables import Table
from specgate.traces.datamodule import RoutingDataModule

INTRODUCTION = (
    "Predictors with float32, int8 and int4 weights on the same documents. Post-training: the trained "
    "weights are rounded and the calibration is fitted again. Aware: trained for the rounding."
)
TRAININGS = {"float": "", "post-training": "post-training", "aware": "aware"}


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


def quantized_table(rows: Sequence[Row], trace: str) -> Table:
    """One line per precision, the loss against the float32 weights of the same checkpoint in points of
    recall."""
    mine = select(rows, trace=trace)
    horizons = sorted(int(key.removeprefix("recall_n")) for key in mine[0] if key.startswith("recall_n"))
    times = [key for key in mine[0] if key.startswith("us_")]
    table = Table(
        title=f"Integer weights: {trace_title(mine[0])}",
        columns=["predictor", "weights", "rounded", "MB"]
        + [f"µs {'GPU' if 'cuda' in key else 'CPU'}" for key in times]
        + [f"{horizon_name(h)} %" for h in horizons]
        + ["points lost", "ECE N+1"],
        notes=[
            "Points lost: of recall, mean over horizons, against the predictor of the same name in float32."
        ],
        left=3,
    )
    exact = {row["predictor"].split(" (")[0]: row for row in mine if row["training"] == "float"}
    for row in mine:
        base = exact.get(row["predictor"].split(" (")[0])
        lost = "–"
        if base is not None and base is not row:
            each = [base[f"recall_n{h}"] - row[f"recall_n{h}"] for h in horizons]
            lost = f"{100 * sum(each) / len(each):.2f}"
        table.rows.append(
            [row["predictor"], row["precision"], TRAININGS[row["training"]], f"{row['bytes'] / 1e6:.2f}"]
            + [f"{row[key]:,.0f}" for key in times]
            + [f"{100 * row[f'recall_n{h}']:.1f}" for h in horizons]
            + [lost, f"{row[f'ece_n{horizons[0]}']:.4f}"]
        )
    return table


def publish_quantized(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write ``tables.md`` and ``report.html`` and print the tables; returns the page's path."""
    tables = [quantized_table(record["rows"], trace) for trace in traces_of(record["rows"])]
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    if console is not None:
        for table in tables:
            console.print(table.to_rich())
    page = directory / "report.html"
    page.write_text(
        plain_page(record, "What do integer weights cost?", INTRODUCTION, tables, []), encoding="utf-8"
    )
    return page
