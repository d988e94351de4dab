"""Pictures of results (PNG), made from rows of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from specgate.calibration.decay import confidence_decay as fit_confidence_decay
from specgate.report.calibration_plots import draw_law
from specgate.report.canvas import horizon_color, horizon_ticks, horizons_of, line_of, panels, tidy
from specgate.report.heatmaps import expert_load, layer_heat_map
from specgate.report.style import (
    KIND_TITLES,
    ORACLE,
    Row,
    horizon_name,
    kinds_of,
    look_of,
    main_predictor,
    ranked,
    select,
    slug,
    trace_title,
    traces_of,
)


def accuracy_against_horizon(rows: Sequence[Row], trace: str) -> Figure:
    """recall@K over the horizons, a panel per kind of target, a line per predictor, chance dotted."""
    mine = select(rows, trace=trace)
    kinds, names, horizons = kinds_of(mine), ranked(mine), horizons_of(mine)
    drawn, axes = panels(2.7 * len(kinds) + 2.2, 4.2, 1, len(kinds), sharey=True)
    for panel, kind in zip(axes[0], kinds, strict=True):
        for name in names:
            scores = select(mine, kind=kind, predictor=name)
            if not scores:
                continue
            look, strong = look_of(name, names), bool(scores[0]["learned"])
            panel.plot(
                *line_of(scores, "recall_at_k"),
                color=look.color,
                marker=look.marker,
                linestyle=look.line,
                linewidth=2.4 if strong else 1.2,
                markersize=9 if strong else 6,
                zorder=3 if strong else 2,
                clip_on=False,
            )
        chance = mine[0]["top_k"] / mine[0]["experts"]
        panel.axhline(chance, color="#555555", linestyle=":", linewidth=1)
        panel.set_title(KIND_TITLES[kind], fontsize=10)
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        horizon_ticks(panel, horizons)
        tidy(panel, "y")
    axes[0, 0].set_ylabel(f"recall@{mine[0]['top_k']}: share of used experts foreseen")
    handles = [
        Line2D(
            [],
            [],
            color=look_of(name, names).color,
            marker=look_of(name, names).marker,
            linestyle=look_of(name, names).line,
            linewidth=2.4 if select(mine, predictor=name)[0]["learned"] else 1.2,
            label=f"{name} (learned)" if select(mine, predictor=name)[0]["learned"] else name,
        )
        for name in reversed(names)
    ]
    handles.append(Line2D([], [], color="#555555", linestyle=":", linewidth=1, label="chance (K/E)"))
    drawn.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    drawn.suptitle(f"How far ahead routing is foreseen: {trace_title(mine[0])}", fontsize=11)
    return drawn


def reliability(rows: Sequence[Row], trace: str) -> Figure:
    """Share of experts used against the probability forecast, per kind and horizon, before and after
    scaling.
    """
    mine = select(rows, trace=trace)
    name = main_predictor(mine)
    mine = select(mine, predictor=name)
    kinds, horizons = kinds_of(mine), horizons_of(mine)
    drawn, axes = panels(
        2.5 * len(horizons) + 0.6, 2.7 * len(kinds) + 0.9, len(kinds), len(horizons), sharex=True, sharey=True
    )
    for i, kind in enumerate(kinds):
        for j, horizon in enumerate(horizons):
            panel = axes[i, j]
            found = select(mine, kind=kind, horizon=horizon)
            if not found:
                panel.set_axis_off()
                continue
            _reliability_panel(panel, found[0])
            if i == 0:
                panel.set_title(horizon_name(horizon), fontsize=10)
            if j == 0:
                panel.set_ylabel(f"{KIND_TITLES[kind]}\nshare used", fontsize=9)
            if i == len(kinds) - 1:
                panel.set_xlabel("probability forecast", fontsize=9)
    handles = [
        Line2D([], [], color="#DDAA33", marker="o", markersize=4, linewidth=1.2, label="before scaling"),
        Line2D([], [], color="#332288", marker="s", markersize=4, linewidth=1.8, label="after scaling"),
        Line2D([], [], color="#999999", linestyle="--", linewidth=1, label="perfectly honest"),
        Rectangle((0, 0), 1, 1, color="#c9d3e6", label="share of all probabilities (log scale)"),
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    drawn.suptitle(f"Reliability of {name}: {trace_title(mine[0])}", fontsize=11)
    return drawn


def _reliability_panel(panel: Axes, row: Row) -> None:
    after, before = row["reliability"], row["reliability_uncalibrated"]
    cells_C = np.array(after["cells"], dtype=float)
    bins = len(cells_C)
    share_C = cells_C / cells_C.sum()
    # The histogram hangs in the lower fifth: four decades of shares, from 1e-4 to 1.
    height_C = np.where(share_C > 0, 1 + np.log10(np.maximum(share_C, 1e-4)) / 4, 0) * 0.2
    panel.bar((np.arange(bins) + 0.5) / bins, height_C, width=1 / bins, color="#c9d3e6", zorder=0)
    panel.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1, zorder=1)
    for curve, color, marker, width in ((before, "#DDAA33", "o", 1.2), (after, "#332288", "s", 1.8)):
        points = [
            (p, used)
            for p, used, cells in zip(curve["mean_p"], curve["used"], curve["cells"], strict=True)
            if cells >= 20
        ]
        if points:
            panel.plot(
                *zip(*points, strict=True),
                color=color,
                marker=marker,
                markersize=3,
                linewidth=width,
                zorder=3,
            )
    about = f"ECE {row['ece_uncalibrated']:.3f} → {row['ece']:.3f}"
    panel.text(0.97, 0.24, about, ha="right", fontsize=8)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    panel.set_aspect("equal")
    tidy(panel)


def confidence_decay(rows: Sequence[Row], trace: str) -> Figure:
    """Mean confidence (before and after scaling) against accuracy over the horizons of the main predictor."""
    mine = select(rows, trace=trace)
    name, horizons = main_predictor(mine), horizons_of(mine)
    mine = select(mine, predictor=name)
    kinds = kinds_of(mine)
    drawn, axes = panels(max(7.8, 2.7 * len(kinds) + 1.0), 3.9, 1, len(kinds), sharey=True)
    series = (
        ("mean_accuracy", "accuracy: share of predicted experts used", "#117733", "o", "-"),
        ("mean_confidence", "confidence after scaling", "#332288", "s", "--"),
        ("mean_confidence_uncalibrated", "confidence before scaling", "#DDAA33", "^", ":"),
    )
    for panel, kind in zip(axes[0], kinds, strict=True):
        for column, label, color, marker, line in series:
            x, y = line_of(select(mine, kind=kind), column)
            panel.plot(x, y, color=color, marker=marker, linestyle=line, linewidth=1.8, label=label)
        (entry,) = fit_confidence_decay(select(mine, kind=kind))
        if "fit" in entry:
            draw_law(panel, entry, "accuracy", "#117733", named=False)
            half = entry["fit"]["accuracy"]["laws"]["exponential"]["half_life"]
            about = "no decay" if half is None else f"half-life {half:.0f} layers"
            panel.text(0.97, 0.95, about, transform=panel.transAxes, ha="right", fontsize=8)
        panel.set_title(KIND_TITLES[kind], fontsize=10)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        horizon_ticks(panel, horizons)
        tidy(panel, "y")
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(max(0.0, low - 0.05), min(1.0, high + 0.05))
    top_k = mine[0]["top_k"]
    axes[0, 0].set_ylabel(
        "of the predicted expert" if top_k == 1 else f"mean over the {top_k} predicted experts"
    )
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=1 if len(kinds) < 2 else 3,
        frameon=False,
        fontsize=8,
    )
    drawn.suptitle(f"Does confidence fall with accuracy? {name}, {trace_title(mine[0])}", fontsize=11)
    return drawn


def thresholds(rows: Sequence[Row], trace: str) -> Figure:
    """Left: precision and recall of "fetch if p ≥ threshold" per horizon; right: all predictors at N+1."""
    mine = select(rows, trace=trace)
    name, names, kind = main_predictor(mine), ranked(mine), kinds_of(mine)[0]
    horizons = horizons_of(select(mine, kind=kind))  # a shallow stack has fewer within the token
    drawn, axes = panels(9.4, 4.2, 1, 2, sharey=True)
    drawn.set_layout_engine("constrained", w_pad=0.12)
    left, right = axes[0]
    for horizon in horizons:
        curve = select(mine, kind=kind, predictor=name, horizon=horizon)[0]["thresholds"]
        color = horizon_color(horizon, horizons)
        for column, line in (("precision", "-"), ("recall", "--")):
            y = [np.nan if value is None else value for value in curve[column]]
            left.plot(curve["threshold"], y, color=color, linestyle=line, linewidth=1.6)
    handles = [Line2D([], [], color=horizon_color(h, horizons), label=horizon_name(h)) for h in horizons]
    handles += [
        Line2D([], [], color="#444444", linestyle=s, label=t)
        for s, t in (("-", "precision"), ("--", "recall"))
    ]
    left.legend(handles=handles, frameon=False, fontsize=8, loc="lower center")
    left.set_xlabel("threshold on the probability")
    left.set_title(f"{name}: fetch every expert with p ≥ threshold", fontsize=9)
    for other in names:
        row = select(mine, kind=kind, predictor=other, horizon=horizons[0])
        if not row or other == ORACLE:
            continue
        pairs = [
            (r, p)
            for r, p in zip(row[0]["thresholds"]["recall"], row[0]["thresholds"]["precision"], strict=True)
            if r is not None and p is not None
        ]
        look, strong = look_of(other, names), bool(row[0]["learned"])
        right.plot(
            *zip(*pairs, strict=True),
            color=look.color,
            marker=look.marker,
            markersize=4,
            markevery=4,
            linewidth=2.2 if strong else 1.1,
            label=other,
        )
    right.set_xlabel("recall: share of used experts fetched in time")
    right.set_title(f"all predictors, {horizon_name(horizons[0])}: precision against recall", fontsize=9)
    right.legend(frameon=False, fontsize=7, loc="best")
    left.set_ylabel("share")
    for panel in (left, right):
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1.02)
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        tidy(panel)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.1f}")
    drawn.suptitle(
        f"What a prefetcher would gain and waste: {trace_title(mine[0])}, {KIND_TITLES[kind]}", fontsize=11
    )
    return drawn


PER_TRACE: dict[str, Callable[[Sequence[Row], str], Figure]] = {
    "accuracy": accuracy_against_horizon,
    "layers": layer_heat_map,
    "reliability": reliability,
    "decay": confidence_decay,
    "thresholds": thresholds,
}


def draw_all(record: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Path]]:
    """Write every picture of a record as ``directory/<trace>-<picture>.png``.

    Returns:
        ``{trace: {picture: path}}``; pictures are those of :data:`PER_TRACE` and, if the load is known,
        ``load``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = record["rows"]
    made: dict[str, dict[str, Path]] = {}
    for trace in traces_of(rows):
        figures = {name: draw(rows, trace) for name, draw in PER_TRACE.items()}
        if trace in record.get("load", {}):
            figures["load"] = expert_load(record["load"][trace], trace_title(select(rows, trace=trace)[0]))
        made[trace] = {}
        for name, drawn in figures.items():
            path = directory / f"{slug(trace)}-{name}.png"
            drawn.savefig(path, metadata={"Software": None})  # the same numbers make the same bytes
            made[trace][name] = path
    return made
