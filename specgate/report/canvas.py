"""What all pictures share: figures without global state, axes without clutter, the look of horizons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from specgate.report.style import Row, horizon_name

DPI = 160
_HORIZON_MAP = colormaps["viridis"]


def figure(width: float, height: float) -> Figure:
    """An empty figure in inches; no global state of pyplot is touched."""
    drawn = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def panels(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure with ``rows x columns`` axes (always a 2-D array)."""
    drawn = figure(width, height)
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """No box, a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def horizons_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["horizon"] for row in rows})


def line_of(rows: Sequence[Row], column: str) -> tuple[list[int], list[float]]:
    ordered = sorted(rows, key=lambda row: row["horizon"])
    return [row["horizon"] for row in ordered], [row[column] for row in ordered]


def horizon_ticks(axes: Axes, horizons: Sequence[int]) -> None:
    axes.set_xticks(horizons, [horizon_name(h) for h in horizons])
    axes.set_xlim(horizons[0] - 0.25, horizons[-1] + 0.25)


def horizon_color(horizon: int, horizons: Sequence[int]) -> Any:
    return _HORIZON_MAP(0.85 * (horizons.index(horizon) / max(1, len(horizons) - 1)))
