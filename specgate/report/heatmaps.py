"""Pictures of matrices: recall per source layer and horizon, use per layer and expert.

Letters: L MoE layers, P source points, H horizons, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from specgate.report.canvas import horizons_of, panels, tidy
from specgate.report.style import ORACLE, Row, horizon_name, main_predictor, ranked, select, trace_title

_MISSING = "#d9d9d9"


def _point_grid(rows: Sequence[Row], predictor: str, column: str = "recall_at_k") -> np.ndarray:
    """One predictor's score per (horizon, source point), ``[H, P]``, NaN where there is nothing to
    foresee.
    """
    mine = select(rows, predictor=predictor)
    grid_HP = np.full((len(horizons_of(mine)), mine[0]["layers"] + 1), np.nan)
    for row in mine:
        for source, value in zip(row["per_layer"]["source_layer"], row["per_layer"][column], strict=True):
            grid_HP[row["horizon"] - 1, source + 1] = np.nan if value is None else value
    return grid_HP


def layer_heat_map(rows: Sequence[Row], trace: str) -> Figure:
    """recall@K per source layer and horizon of the main predictor, and its lead over the best free one
    there.
    """
    mine = select(rows, trace=trace)
    name, horizons = main_predictor(mine), horizons_of(mine)
    grid_HP = _point_grid(mine, name)
    free = [
        n for n in ranked(mine) if n != ORACLE and not select(mine, predictor=n)[0]["learned"] and n != name
    ]
    height = 0.42 * len(horizons) + 1.2
    drawn, axes = panels(
        max(6.5, 0.36 * grid_HP.shape[1] + 2.4), height * (2 if free else 1), 2 if free else 1, 1
    )
    _heat(drawn, axes[0, 0], grid_HP, f"recall@{mine[0]['top_k']} of {name}", "viridis", None)
    if free:
        best_HP = np.fmax.reduce([_point_grid(mine, n) for n in free])
        lead_HP = grid_HP - best_HP
        reach = max(0.01, float(np.nanmax(np.abs(lead_HP))))
        title = "its lead over the best free predictor of each cell (negative: a free one is better)"
        _heat(drawn, axes[1, 0], lead_HP, title, "PuOr", TwoSlopeNorm(0, -reach, reach))
    for panel in axes[:, 0]:
        panel.set_yticks(range(len(horizons)), [horizon_name(h) for h in horizons])
        _mark_kinds(panel, mine, grid_HP.shape)
    about = "source: MoE layer reached (“id”: only the token's id is known); grey: nothing lies ahead"
    axes[-1, 0].set_xlabel(about, fontsize=9)
    drawn.suptitle(f"Where routing is foreseen: {trace_title(mine[0])}", fontsize=11)
    return drawn


def _heat(drawn: Figure, panel: Axes, grid_HP: np.ndarray, title: str, colors: str, norm: Any) -> None:
    cmap = colormaps[colors].with_extremes(bad=_MISSING)
    image = panel.imshow(np.ma.masked_invalid(grid_HP), aspect="auto", cmap=cmap, norm=norm)
    small = grid_HP.shape[1] <= 26
    for (h, p), value in np.ndenumerate(grid_HP):
        if small and not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{100 * value:.0f}"
            panel.text(p, h, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    panel.set_title(title, fontsize=9, loc="left")
    points = range(grid_HP.shape[1])
    panel.set_xticks(points, ["id", *[str(p - 1) for p in points[1:]]], fontsize=7)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    drawn.colorbar(image, ax=panel, pad=0.01, format=PercentFormatter(1.0, decimals=0))


def _mark_kinds(panel: Axes, rows: Sequence[Row], shape: tuple[int, int]) -> None:
    """Frame the cells whose target lies in the next token."""
    points = {
        (row["horizon"] - 1, source + 1)
        for row in select(rows, kind="wrapped")
        for source in row["per_layer"]["source_layer"]
    }
    for h, p in points:
        panel.add_patch(
            Rectangle((p - 0.42, h - 0.42), 0.84, 0.84, fill=False, edgecolor="white", linewidth=1.4)
        )
    if points:
        panel.text(
            shape[1] - 0.5,
            -0.62,
            "framed: into the next token",
            ha="right",
            va="bottom",
            fontsize=7,
            color="#444444",
        )


def expert_load(load: Mapping[str, Any], title: str) -> Figure:
    """How often each expert of each layer is used, relative to an even share, and the entropy per layer."""
    share_LE = np.array(load["share"])
    layers, experts = share_LE.shape
    relative_LE = share_LE * experts
    drawn, axes = panels(
        min(10.0, 3.6 + 0.16 * experts), max(3.4, 1.6 + 0.2 * layers), 1, 2, sharey=True, width_ratios=[3, 1]
    )
    top = max(2.0, float(np.quantile(relative_LE, 0.995)))
    image = axes[0, 0].imshow(
        relative_LE, aspect="auto", cmap="PuOr_r", norm=TwoSlopeNorm(1.0, 0.0, top), interpolation="nearest"
    )
    axes[0, 0].set_xlabel("expert")
    axes[0, 0].set_ylabel("MoE layer")
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    drawn.colorbar(image, ax=axes[0, 0], label="use relative to an even share", pad=0.01, location="left")
    axes[0, 1].barh(np.arange(layers), load["hot_quarter"], color="#88CCEE", label="busiest ¼ takes")
    axes[0, 1].plot(
        load["entropy"], np.arange(layers), color="#332288", marker="o", markersize=3, label="entropy"
    )
    axes[0, 1].axvline(max(1, experts // 4) / experts, color="#555555", linestyle=":", linewidth=1)
    axes[0, 1].set_xlim(0, 1.02)
    axes[0, 1].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    tidy(axes[0, 1], "x")
    drawn.suptitle(f"Expert load: {title}", fontsize=11)
    return drawn
