"""What forecasts cost, as a table, pictures and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter
from rich.console import Console

from specgate.report.canvas import panels, tidy
from specgate.report.dots import shortened
from specgate.report.html import plain_page
from specgate.report.style import Row, horizon_name, look_of, select, slug, trace_title, traces_of
from specgate.report.tables import Table

INTRODUCTION = (
    "A forecast must cost less than the wait that it spares. The time is that of what a loader calls at run "
    "time: one step of 1, 8 or 64 sequences, foreseeing from one MoE layer with its history. Operations are "
    "counted per token and layer; the host's layer is its attention, its router and the K experts that a "
    "token uses."
)


def cost_table(rows: Sequence[Row], trace: str, hosts: Sequence[Mapping[str, Any]] = ()) -> Table:
    """One line per predictor of a trace, cheapest operations first."""
    mine = sorted(select(rows, trace=trace), key=lambda row: row["flops_per_token_layer"])
    timed = [(d, b) for d, sizes in mine[0]["us"].items() for b in sizes]
    horizons = horizons_in(mine)
    table = Table(
        title=f"Cost: {trace_title(mine[0])}",
        columns=[
            "predictor",
            "weights",
            "params",
            "MB",
            "FLOPs",
            "% host",
            *[f"µs {_device(d)}×{b}" for d, b in timed],
            "train s",
            *[f"{horizon_name(h)} %" for h in horizons],
        ],
        left=2,
    )
    for row in mine:
        share, seconds = row["share_of_host"], row["training_seconds"]
        table.rows.append(
            [
                row["predictor"] + ("" if row["fast_step"] else " ‡"),
                row["precision"],
                big(row["parameters"]),
                f"{row['bytes'] / 1e6:.2f}",
                big(row["flops_per_token_layer"]),
                "–" if share is None else f"{100 * share:.2f}",
                *["–" if row["us"][d][b] is None else f"{row['us'][d][b]:,.0f}" for d, b in timed],
                "–" if seconds is None else f"{seconds:,.0f}",
                *[f"{100 * row[f'recall_n{h}']:.1f}" if f"recall_n{h}" in row else "–" for h in horizons],
            ]
        )
    table.notes = notes_of(mine, trace, hosts)
    return table


def notes_of(mine: Sequence[Row], trace: str, hosts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of the numbers."""
    notes = [
        f"µs per call of so many sequences with {mine[0]['context']} tokens of context, from MoE layer"
        f" {mine[0]['layer']}; operations per token and layer, a multiply-add is two; MB: all that the"
        " checkpoint keeps, counted tables and the host's routers included."
    ]
    notes += [host_note(host) for host in hosts if host["trace"] == trace]
    if not all(row["fast_step"] for row in mine):
        notes.append(
            "‡ has no run-time call of its own: it computes its whole window and picks one point of it."
        )
    for row in mine:
        notes += [
            f"{row['predictor']} on {device}: {how}."
            for device, how in row["how"].items()
            if "eager: " in how
        ]
    return notes


def host_note(host: Mapping[str, Any]) -> str:
    """What a layer of the host costs, in words."""
    if "missing" in host:
        return f"Host layer: unknown ({host['missing']})."
    attention, router, expert = (big(host[part]) for part in ("attention", "router", "expert"))
    return (
        f"Host layer: {big(host['active'])} operations per token (attention {attention}, router {router},"
        f" {host['top_k']} experts of {expert} each)."
    )


def horizons_in(rows: Sequence[Row]) -> list[int]:
    """The horizons up to N+3 that have a recall in some row."""
    return [h for h in (1, 2, 3) if any(f"recall_n{h}" in row for row in rows)]


def big(value: float) -> str:
    """A number of operations with a unit: 1.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: (cost, recall), cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, recall in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or recall > best[-1][1]:
            best.append((cost, recall))
    return best


def pareto(rows: Sequence[Row], trace: str) -> Figure | None:
    """recall@K against time and operations, a row of panels per horizon; None where no recall is known."""
    mine = [row for row in select(rows, trace=trace) if horizons_in([row])]
    horizons = horizons_in(mine)
    if not horizons:
        return None
    times = list(dict.fromkeys(device for row in mine for device in row["us"]))
    columns = [
        (f"us_{d}_1", f"µs per call, {_device(d)}, one sequence")
        for d in times
        if any(row.get(f"us_{d}_1") for row in mine)
    ]
    columns.append(("flops_per_token_layer", "operations per token and layer"))
    names = [row["predictor"] for row in mine]
    drawn, axes = panels(3.6 * len(columns) + 2.3, 2.7 * len(horizons) + 0.9, len(horizons), len(columns))
    for i, h in enumerate(horizons):
        for j, (column, title) in enumerate(columns):
            _panel(
                axes[i, j],
                [row for row in mine if f"recall_n{h}" in row and row.get(column)],
                column,
                h,
                names,
            )
            if i == len(horizons) - 1:
                axes[i, j].set_xlabel(title, fontsize=9)
        axes[i, 0].set_ylabel(f"{horizon_name(h)}: recall@K", fontsize=9)
    handles: list[Line2D] = []
    for row in sorted(mine, key=lambda row: -row.get(f"recall_n{horizons[0]}", 0.0)):
        look = look_of(row["predictor"], names)
        handles.append(
            Line2D(
                [],
                [],
                color=look.color,
                marker=look.marker,
                linestyle="",
                markersize=8,
                label=shortened(row["predictor"]),
            )
        )
    handles.append(Line2D([], [], color="#999999", linewidth=1.2, label="best for its cost"))
    drawn.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    drawn.suptitle(f"What foresight costs: {trace_title(mine[0])}", fontsize=11)
    return drawn


def _device(name: str) -> str:
    return "GPU" if name.startswith("cuda") else "CPU"


def _panel(panel: Axes, rows: Sequence[Row], column: str, horizon: int, names: Sequence[str]) -> None:
    points = [(row[column], row[f"recall_n{horizon}"]) for row in rows]
    if not points:
        panel.set_axis_off()
        return
    best = frontier(points)
    if best:
        panel.step(*zip(*best, strict=True), where="post", color="#999999", linewidth=1.2, zorder=1)
    for row, (x, y) in zip(rows, points, strict=True):
        look = look_of(row["predictor"], names)
        panel.plot([x], [y], color=look.color, marker=look.marker, markersize=9, linestyle="", zorder=2)
    panel.set_xscale("log")
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    panel.set_xlim(low / 1.6, high * 1.6)
    if high / low < 30:  # less than a decade or so has no ticks of its own
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: big(value)))
        panel.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: big(value) if _leads(value) else ""))
        panel.tick_params(axis="x", which="minor", labelsize=8)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.tick_params(labelsize=8)
    tidy(panel)


def _leads(value: float) -> bool:
    """Whether a tick's first digit is 2 or 5."""
    return f"{value:.1e}"[0] in "25"


def publish_cost(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write ``plots/*.png``, ``tables.md`` and ``report.html`` and print the tables; returns the page's
    path."""
    tables, pictures = [], []
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    for trace in traces_of(record["rows"]):
        tables.append(cost_table(record["rows"], trace, record.get("hosts", [])))
        drawn = pareto(record["rows"], trace)
        if drawn is not None:
            path = directory / "plots" / f"{slug(trace)}-pareto.png"
            drawn.savefig(path)
            pictures.append((path, f"Recall against cost on {trace}. Up and to the left is better."))
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    if console is not None:
        for table in tables:
            console.print(table.to_rich())
    page = directory / "report.html"
    page.write_text(
        plain_page(record, "What does a forecast cost?", INTRODUCTION, tables, pictures), encoding="utf-8"
    )
    return page
