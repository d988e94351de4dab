"""Pictures of benchmark.py mode=calibration (PNG), made from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from specgate.calibration.decay import decay_curve
from specgate.report.canvas import horizon_color, horizon_ticks, horizons_of, panels, tidy
from specgate.report.style import KIND_TITLES, Row, horizon_name, kinds_of, select, slug, trace_title

LOOKS = {
    "none": ("#DDAA33", "o", 1.2),
    "temperature": ("#332288", "s", 1.8),
    "vector": ("#117733", "^", 1.2),
    "isotonic": ("#CC6677", "D", 1.2),
}
IN_DOMAIN, SHIFTED, TRIPLE = "#88CCEE", "#CC6677", 3


def reliability_by_calibrator(rows: Sequence[Row]) -> Figure:
    """Share used minus probability, per calibrator and horizon, for targets of the first kind: the diagonal
    becomes zero, so that thousandths can be seen.
    """
    kind = kinds_of(rows)[0]
    mine = select(rows, kind=kind)
    horizons = horizons_of(mine)
    columns = min(3, len(horizons))
    lines = -(-len(horizons) // columns)
    drawn, axes = panels(3.2 * columns + 0.6, 2.7 * lines + 0.9, lines, columns, sharex=True, sharey=True)
    for panel, horizon in zip(axes.flat, horizons, strict=False):
        panel.axhline(0, color="#999999", linestyle="--", linewidth=1)
        for name, (color, marker, width) in LOOKS.items():
            for row in select(mine, horizon=horizon, calibrator=name):
                curve = row["reliability"]
                points = [
                    (p, used - p)
                    for p, used, cells in zip(curve["mean_p"], curve["used"], curve["cells"], strict=True)
                    if cells >= 100
                ]
                panel.plot(
                    *zip(*points, strict=True), color=color, marker=marker, markersize=3, linewidth=width
                )
        panel.set_title(horizon_name(horizon), fontsize=10)
        panel.set_xlim(0, 1)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" pts"))
        tidy(panel)
    for panel in axes.flat[len(horizons) :]:
        panel.set_axis_off()
    for panel in axes[-1]:
        panel.set_xlabel("probability forecast", fontsize=9)
    for panel in axes[:, 0]:
        panel.set_ylabel("share used − forecast", fontsize=9)
    present = {row["calibrator"] for row in mine}
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=4, linewidth=width, label=name)
        for name, (color, marker, width) in LOOKS.items()
        if name in present
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    drawn.suptitle(
        f"Reliability after each calibrator: {rows[0]['predictor']}, {trace_title(rows[0])}, "
        f"{KIND_TITLES[kind]}",
        fontsize=10,
    )
    return drawn


def error_by_domain(drift: Row, shifted: Sequence[Row], usual: float) -> Figure:
    """Calibration error per domain as bars, in domain and shifted, with the monitor's alarms."""
    bars = [(found, IN_DOMAIN) for found in sorted(drift["in_domain"], key=lambda f: f["ece"])]
    for shift in shifted:
        bars += [(found, SHIFTED) for found in sorted(shift["domains"], key=lambda f: f["ece"])]
    drawn, axes = panels(0.55 * len(bars) + 2.6, 4.4, 1, 1)
    panel: Axes = axes[0, 0]
    top = max(found["ece"] for found, _ in bars)
    for i, (found, color) in enumerate(bars):
        panel.bar(i, found["ece"], color=color, width=0.75)
        text = f"{found['ratio'] or 0:.1f}×" + ("\nDRIFT" if found["monitor"]["drifted"] else "")
        panel.text(i, found["ece"] + 0.012 * top, text, ha="center", va="bottom", fontsize=7)
    panel.axhline(usual, color="#332288", linewidth=1.2)
    panel.axhline(TRIPLE * usual, color="#332288", linewidth=1.2, linestyle="--")
    panel.set_ylim(0, 1.16 * max(top, TRIPLE * usual))
    panel.set_xticks(
        range(len(bars)), [found["domain"] for found, _ in bars], rotation=45, ha="right", fontsize=8
    )
    panel.set_ylabel("calibration error (ECE), mean over targets")
    tidy(panel, "y")
    handles = [
        Line2D([], [], color=IN_DOMAIN, linewidth=7, label="in domain, this domain alone"),
        Line2D([], [], color=SHIFTED, linewidth=7, label="other text"),
        Line2D([], [], color="#332288", linewidth=1.2, label="in domain, all together"),
        Line2D([], [], color="#332288", linewidth=1.2, linestyle="--", label="three times that"),
    ]
    panel.legend(handles=handles, frameon=False, fontsize=8, loc="upper left")
    drawn.suptitle(
        f"Does calibration survive other text? {drift['predictor']}, {trace_title(drift)}", fontsize=10
    )
    return drawn


def coverage_against_nominal(rows: Sequence[Row]) -> Figure:
    """Measured minus nominal coverage with intervals, and the size of the sets, per mode and horizon."""
    kind = kinds_of(rows)[0]
    mine = select(rows, kind=kind)
    modes, horizons = list(dict.fromkeys(row["mode"] for row in mine)), horizons_of(mine)
    levels = sorted({row["level"] for row in mine})
    drawn, axes = panels(9.4, 3.2 * len(modes) + 0.8, len(modes), 2)
    for (left, right), mode in zip(axes, modes, strict=True):
        left.axhspan(-1, 1, color="#e9edf5", zorder=0)
        left.axhline(0, color="#999999", linestyle="--", linewidth=1)
        for horizon in horizons:
            found = [select(mine, mode=mode, horizon=horizon, level=level)[0] for level in levels]
            offset = 0.12 * (horizons.index(horizon) - (len(horizons) - 1) / 2)
            x = np.arange(len(levels)) + offset
            gap = np.array([100 * row["gap"] for row in found])
            low = gap - np.array([100 * (row["low"] - row["level"]) for row in found])
            high = np.array([100 * (row["high"] - row["level"]) for row in found]) - gap
            color = horizon_color(horizon, horizons)
            bars = np.maximum(np.array([low, high]), 0)
            left.errorbar(x, gap, bars, color=color, marker="o", markersize=4, linestyle="", capsize=2)
            right.plot(
                range(len(levels)),
                [row["mean_size"] for row in found],
                color=color,
                marker="o",
                label=horizon_name(horizon),
            )
        for panel in (left, right):
            panel.set_xticks(range(len(levels)), [f"{level:.0%}" for level in levels])
            panel.set_xlabel("nominal coverage", fontsize=9)
            panel.set_xlim(-0.5, len(levels) - 0.5)
            tidy(panel, "y")
        what = "all K used experts" if mode == "all" else "each used expert"
        left.set_title(f"covered: {what}", fontsize=9)
        left.set_ylabel("coverage − nominal, points", fontsize=9)
        right.set_title("experts per prefetch set", fontsize=9)
        right.set_ylim(bottom=0)
        right.legend(frameon=False, fontsize=8)
    drawn.suptitle(
        f"Conformal prefetch sets of {rows[0]['predictor']}: {trace_title(rows[0])}, {KIND_TITLES[kind]}",
        fontsize=10,
    )
    return drawn


def decay_with_fit(entries: Sequence[Row]) -> Figure:
    """Accuracy and confidence over the horizons, with the fitted laws, per kind of target."""
    drawn, axes = panels(max(6.4, 3.1 * len(entries) + 0.8), 3.9, 1, len(entries), sharey=True)
    for panel, entry in zip(axes[0], entries, strict=True):
        for column, color, marker in (("accuracy", "#117733", "o"), ("confidence", "#332288", "s")):
            panel.plot(
                entry["horizon"], entry[column], color=color, marker=marker, linestyle="", label=column
            )
            draw_law(panel, entry, column, color)
        panel.set_title(KIND_TITLES[entry["kind"]], fontsize=10)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        horizon_ticks(panel, entry["horizon"])
        tidy(panel, "y")
        panel.legend(frameon=False, fontsize=7, loc="upper right")
    axes[0, 0].set_ylabel("mean over the predicted experts")
    drawn.suptitle(
        f"How fast does trust fall? {entries[0]['predictor']}, {trace_title(entries[0])}", fontsize=10
    )
    return drawn


def draw_law(panel: Axes, entry: Row, column: str, color: str, named: bool = True) -> None:
    """The best law of one column of a decay entry as a thin line, with its half-life; nothing without a
    fit.
    """
    if "fit" not in entry:
        return
    fit = entry["fit"][column]
    dense = np.linspace(entry["horizon"][0], entry["horizon"][-1], 100)
    half = fit["laws"]["exponential"]["half_life"]
    about = "no decay" if half is None else f"half-life {half:.0f} layers"
    label = f"best: {fit['best']}; {about}" if named else None
    panel.plot(dense, decay_curve(fit["laws"][fit["best"]], dense), color=color, linewidth=1, label=label)


def draw_calibration(record: Mapping[str, Any], trace: str, predictor: str, folder: Path) -> dict[str, Path]:
    """Write the pictures of one predictor; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"trace": trace, "predictor": predictor}
    rows = select(record["rows"], **own)
    (drift,) = select(record["drift"], **own)
    main = select(rows, calibrator=record["main"])
    usual = float(np.average([row["ece"] for row in main], weights=[row["n"] for row in main]))
    figures = {
        "reliability": reliability_by_calibrator(rows),
        "domains": error_by_domain(drift, select(record["shift"], **own), usual),
        "coverage": coverage_against_nominal(select(record["conformal"], **own)),
        "decay": decay_with_fit(select(record["decay"], **own)),
    }
    made = {}
    for name, drawn in figures.items():
        made[name] = folder / f"{slug(trace)}-{slug(predictor)}-{name}.png"
        drawn.savefig(made[name], metadata={"Software": None})
    return made
