"""Dot plots with error bars: one panel per trace, one line per predictor or run, one colour per horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from specgate.report.canvas import horizon_color, panels, tidy
from specgate.report.runs import Spread
from specgate.report.style import horizon_name

_MARKERS = "osD^vP"
_COLORS = {
    "free": "#777777",
    "learned": "#222222",
    "reference": "#882255",
    "oracle": "#117733",
    "": "#222222",
}
_LONGEST = 44

Line = tuple[str, Mapping[int, Spread], str]
"""Label, value per horizon, group (``free``, ``learned``, ``reference``, ``oracle`` or empty)."""


def shortened(name: str) -> str:
    """A label that leaves room for the picture."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def dot_plot(parts: Sequence[tuple[str, Sequence[Line]]], label: str) -> Figure:
    """Best line on top.

    Args:
        parts: title and lines of each panel.
        label: of the value axis.
    """
    longest = max(len(lines) for _, lines in parts)
    words = max(min(len(name), _LONGEST) for _, lines in parts for name, _, _ in lines)
    width = len(parts) * (3.9 + 0.075 * words)
    drawn, axes = panels(max(6.0, width), 1.5 + 0.27 * max(longest, 4), 1, len(parts))
    horizons = sorted({h for _, lines in parts for _, values, _ in lines for h in values})
    for panel, (title, lines) in zip(axes[0], parts, strict=True):
        for y, (_, values, _) in enumerate(lines):
            for i, (h, spread) in enumerate(sorted(values.items())):
                at = y + 0.16 * (i - (len(values) - 1) / 2)
                panel.errorbar(
                    spread.mean, at, xerr=spread.deviation or None, color=horizon_color(h, horizons),
                    marker=_MARKERS[horizons.index(h) % len(_MARKERS)], markersize=4.5, capsize=2.5,
                    elinewidth=1.1, linestyle="none",
                )  # fmt: skip
        names = [shortened(name) for name, _, _ in lines]
        panel.set_yticks(range(len(lines)), names, fontsize=8)
        for tick, (_, _, group) in zip(panel.get_yticklabels(), lines, strict=True):
            tick.set_color(_COLORS[group])
        panel.set_ylim(len(lines) - 0.5, -0.5)
        panel.xaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_xlabel(label, fontsize=9)
        panel.set_title(title, fontsize=10)
        tidy(panel)
    handles = [
        Line2D([], [], color=horizon_color(h, horizons), marker=_MARKERS[i % len(_MARKERS)], linestyle="none",
               label=horizon_name(h))
        for i, h in enumerate(horizons)
    ]  # fmt: skip
    groups = {group for _, lines in parts for _, _, group in lines if group}
    handles += [
        Line2D([], [], color=_COLORS[g], linestyle="none", marker="_", label=g)
        for g in _COLORS
        if g in groups
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return drawn
