"""Everything a person reads of one run: tables in the terminal and in a file, pictures, one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.report.calibration_page import publish_calibration
from specgate.report.cost_page import publish_cost
from specgate.report.flow_page import publish_transitions
from specgate.report.html import write_page
from specgate.report.live_page import publish_live
from specgate.report.plan_page import publish_plan
from specgate.report.plots import draw_all
from specgate.report.quantized_page import publish_quantized
from specgate.report.replay_page import publish_replay
from specgate.report.simulate_page import publish_simulation
from specgate.report.style import scored_rows, traces_of
from specgate.report.tables import (
    Table,
    accuracy_table,
    calibration_table,
    detail_table,
    domain_table,
    summary_table,
    trace_table,
)
from specgate.report.uncertainty_page import publish_uncertainty

#: Modes of benchmark.py whose rows are not scores on a split, and what they look like.
PAGES: dict[str, Callable[[Mapping[str, Any], Path, Console | None], Path]] = {
    "calibration": publish_calibration,
    "cost": publish_cost,
    "live": publish_live,
    "plan": publish_plan,
    "quantize": publish_quantized,
    "replay": publish_replay,
    "simulate": publish_simulation,
    "transitions": publish_transitions,
    "uncertainty": publish_uncertainty,
}


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table of a record, most important first."""
    rows = record["rows"]
    tables = [summary_table(rows)]
    if record.get("traces"):
        tables.append(trace_table(record["traces"], record.get("load", {})))
    for trace in traces_of(rows):
        tables += [detail_table(rows, trace), calibration_table(rows, trace), domain_table(rows, trace)]
    return tables


def publish(record: Mapping[str, Any], directory: str | Path, console: Console | None = None) -> Path:
    """Write ``plots/*.png``, ``tables.md`` and ``report.html`` into ``directory`` and print the main tables.

    Args:
        record: content of a metrics.json with rows.
        console: where to print; default, nowhere.

    Returns:
        Path of the HTML page.
    """
    if record.get("mode") in PAGES:
        return PAGES[record["mode"]](record, Path(directory), console)
    directory, record = Path(directory), {**record, "rows": scored_rows(record)}
    pictures = draw_all(record, directory / "plots")
    tables = tables_of(record)
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    page = write_page(record, pictures, directory / "report.html")
    if console is not None:
        console.print(accuracy_table(record["rows"]))
        for trace in traces_of(record["rows"]):
            console.print(calibration_table(record["rows"], trace).to_rich())
    return page
