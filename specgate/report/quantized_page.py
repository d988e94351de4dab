"""Tables of what integer weights cost: for ``benchmark.py mode=quantize`` and for docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.report.html import plain_page
from specgate.report.style import Row, horizon_name, select, trace_title, traces_of
from specgate.report.tables import Table

INTRODUCTION = (
    "Predictors with float32, int8 and int4 weights on the same documents. Post-training: the trained "
    "weights are rounded and the calibration is fitted again. Aware: trained for the rounding."
)
TRAININGS = {"float": "", "post-training": "post-training", "aware": "aware"}


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


def is_quantized(record: Mapping[str, Any]) -> bool:
    """Whether a record compares precisions of weights."""
    return record.get("mode") == "quantize"


def slim_quantized(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record besides where it came from: all rows, which are flat."""
    return {"rows": list(record["rows"])}


def quantized_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    lines = [INTRODUCTION, ""]
    for trace in traces_of(record["rows"]):
        table = quantized_table(record["rows"], trace)
        lines += [f"**{table.title}**", "", table.to_markdown(), ""]
    return lines
