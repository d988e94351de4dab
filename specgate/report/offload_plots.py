"""Pictures of offloaded decoding: speed against budget, where the time goes, a timeline of a few tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from specgate.report.canvas import figure, panels, tidy
from specgate.report.spans import LANES
from specgate.report.style import Look, Row

LOOKS = {
    "resident": Look("#000000", "_", "--"),
    "oracle": Look("#117733", "*"),
    "belady": Look("#88CCEE", "P"),
    "forecast": Look("#332288", "o"),
    "lru_forecast": Look("#CC6677", "D"),
    "lfru": Look("#DDAA33", "s"),
    "lfu": Look("#999933", "v"),
    "lru": Look("#AA4499", "^"),
    "on_demand": Look("#8a8a8a", "_", ":"),
    "offload_predictor": Look("#332288", "o"),
    "offload": Look("#AA4499", "^"),
    "offload_file": Look("#DDAA33", "s"),
    "accelerate_cpu": Look("#CC3311", "_", "-."),
    "accelerate_disk": Look("#661100", "_", (0, (1, 3))),  # type: ignore[arg-type]
}
SPARE = ("#332288", "#6699CC", "#882255", "#44AA99", "#661100", "#EE7733")  # of variants with a threshold
PARTS = {
    "compute_share": ("computing", "#117733"),
    "stall_share": ("waiting for experts", "#CC6677"),
    "other_share": ("host, launches, the rest", "#c9c9c9"),
}
LANE_COLORS = {
    "dense": "#88CCEE",
    "experts": "#117733",
    "wait": "#CC3311",
    "copy, demand": "#CC6677",
    "copy, prefetch": "#332288",
    "direct, demand": "#CC6677",
    "direct, prefetch": "#332288",
    "read, demand": "#DDAA33",
    "read, prefetch": "#999933",
}
LANE_TITLES = {"dense": "dense part", "experts": "experts", "wait": "waiting"}


def look_of(variant: str, variants: Sequence[str]) -> Look:
    """Colour, marker and line of a variant; those with a threshold of their own differ in colour."""
    base, found, _ = variant.partition(":")
    look = LOOKS.get(base, Look("#6699CC", "X"))
    if not found:
        return look
    alike = [name for name in variants if ":" in name]
    return Look(SPARE[alike.index(variant) % len(SPARE)], look.marker, look.line)


def is_line(rows: Sequence[Row], variant: str) -> bool:
    """Whether a variant was measured at shares of the experts, rather than at one size of its own."""
    return any(row["variant"] == variant and row["budgeted"] for row in rows)


def speed_against_budget(rows: Sequence[Row], title: str) -> Figure:
    """Tokens per second over the share of experts that have a slot; what knows no share is a level line."""
    drawn = figure(8.6, 4.6)
    axes = drawn.subplots()
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    shares = sorted({100 * row["residency"] for row in rows if row["budgeted"]})
    lines = [variant for variant in variants if is_line(rows, variant)]
    for variant in variants:
        look, mine = look_of(variant, variants), [row for row in rows if row["variant"] == variant]
        if not is_line(rows, variant):
            speed = mine[0]["tokens_per_second"]
            axes.axhline(speed, color=look.color, linestyle=look.line, linewidth=1.6, label=variant)
            continue
        mine = sorted(mine, key=lambda row: row["residency"])
        aside = 1 + 0.012 * (lines.index(variant) - (len(lines) - 1) / 2)  # bars that do not hide each other
        x = [100 * row["residency"] * aside for row in mine]
        y = [row["tokens_per_second"] for row in mine]
        low = [row["tokens_per_second"] - row["tokens_per_second_low"] for row in mine]
        high = [row["tokens_per_second_high"] - row["tokens_per_second"] for row in mine]
        strong = variant.partition(":")[0] in ("forecast", "offload_predictor", "oracle")
        axes.errorbar(
            x, y, yerr=[low, high], color=look.color, marker=look.marker, linewidth=2.2 if strong else 1.4,
            markersize=8 if strong else 6, capsize=3, label=variant, zorder=3 if strong else 2,
        )  # fmt: skip
    if shares:
        axes.set_xscale("log", base=2)
        axes.set_xticks(shares, [f"{share:g} %" for share in shares])
        axes.minorticks_off()
        axes.set_xlim(shares[0] / 1.15, shares[-1] * 1.15)
    axes.set_ylim(0, 1.08 * max(row["tokens_per_second_high"] for row in rows))
    axes.set_xlabel("experts that have a slot on the device")
    axes.set_ylabel("tokens per second")
    tidy(axes)
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: -max(_speeds(rows, names[i])))
    drawn.legend(
        [handles[i] for i in order], [names[i] for i in order],
        loc="outside right center", frameon=False, fontsize=9,
    )  # fmt: skip
    drawn.suptitle(title, fontsize=11)
    return drawn


def _speeds(rows: Sequence[Row], variant: str) -> list[float]:
    return [row["tokens_per_second"] for row in rows if row["variant"] == variant]


def label_of(row: Row) -> str:
    """A row in a few words: the variant, and its share of the experts if it has one."""
    return f"{row['variant']}, {100 * row['residency']:g} %" if row["budgeted"] else str(row["variant"])


def where_time_goes(rows: Sequence[Row], title: str, words: Mapping[str, str]) -> Figure:
    """A bar per row: milliseconds per token, split; ``words`` for the parts, by column."""
    ordered = sorted(rows, key=lambda row: -row["tokens_per_second"])
    drawn = figure(8.6, 1.5 + 0.3 * len(ordered))
    axes = drawn.subplots()
    for i, row in enumerate(ordered):
        left, each = 0.0, 1e3 / row["tokens_per_second"]
        for column, (_, color) in PARTS.items():
            width = each * (row[column] or 0.0)
            axes.barh(i, width, left=left, color=color, height=0.72)
            left += width
        axes.text(left, i, f" {each:.3g}", va="center", fontsize=8, color="#444444")
    axes.set_yticks(range(len(ordered)), [label_of(row) for row in ordered], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("milliseconds per token")
    tidy(axes, "x")
    drawn.legend(
        handles=[Patch(color=color, label=words.get(c, text)) for c, (text, color) in PARTS.items()],
        loc="outside lower center", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    drawn.suptitle(title, fontsize=11)
    return drawn


def timeline(timelines: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A panel per variant: what ran and what moved, lane by lane, over a few tokens."""
    drawn, axes = panels(9.6, 0.8 + 1.55 * len(timelines), len(timelines), 1)
    for panel, shown in zip(axes[:, 0], timelines, strict=True):
        lanes = [lane for lane in LANES if shown["timeline"].get(lane)]
        for i, lane in enumerate(lanes):
            bars = [(begin * 1e-6, max(end - begin, 1) * 1e-6) for begin, end in shown["timeline"][lane]]
            panel.broken_barh(bars, (i - 0.4, 0.8), facecolors=LANE_COLORS[lane], linewidth=0)
        panel.set_yticks(range(len(lanes)), [LANE_TITLES.get(lane, lane) for lane in lanes], fontsize=8)
        panel.set_ylim(len(lanes) - 0.4, -0.6)
        panel.set_title(_panel_title(shown), fontsize=9, loc="left")
        panel.tick_params(axis="x", labelsize=8)
        panel.margins(x=0.01)
        panel.set_xlim(left=0)
        _plain(panel)
    axes[-1, 0].set_xlabel("milliseconds", fontsize=9)
    drawn.suptitle(title, fontsize=11)
    return drawn


def _panel_title(shown: Mapping[str, Any]) -> str:
    share = shown["residency"]
    return f"{shown['variant']}, {100 * share:g} %" if 0 < share < 1 else str(shown["variant"])


def _plain(panel: Axes) -> None:
    tidy(panel, "x")
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)


def choose_timelines(timelines: Sequence[Mapping[str, Any]], most: int = 5) -> list[Mapping[str, Any]]:
    """Those that say most: at about a quarter of the experts, from the slowest kind to the fastest."""
    budgeted = sorted({t["residency"] for t in timelines if 0 < t["residency"] < 1})
    share = min(budgeted, key=lambda r: abs(r - 0.25), default=None)
    wanted = (
        "on_demand",
        "lru",
        "offload",
        "forecast",
        "lru_forecast",
        "offload_predictor",
        "oracle",
        "resident",
    )
    by_name: dict[str, Mapping[str, Any]] = {}
    for t in timelines:
        name = t["variant"].partition(":")[0]
        if t["residency"] in (0.0, share) or name == "resident":
            by_name.setdefault(name, t)
    return [by_name[name] for name in wanted if name in by_name][:most]


def draw(
    record: Mapping[str, Any], folder: Path, name: str, title: str, parts: Mapping[str, str] | None = None
) -> list[tuple[Path, str]]:
    """All pictures of a record as PNG files; returns paths and captions.

    Args:
        parts: what the parts of the time are called, by column, where not as in a replay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = record["rows"]
    made = [
        (speed_against_budget(rows, f"Speed against budget: {title}"), "speed", SPEED),
        (where_time_goes(rows, f"Where the time goes: {title}", parts or {}), "time", TIME),
    ]
    shown = choose_timelines(record.get("timelines", []))
    if shown:
        made.append((timeline(shown, f"A few tokens: {title}"), "timeline", TIMELINE))
    out = []
    for drawn, kind, caption in made:
        path = folder / f"{name}-{kind}.png"
        drawn.savefig(path, metadata={"Software": None})
        out.append((path, caption))
    return out


SPEED = (
    "Tokens per second over the share of the experts that have a slot on the device; bars reach from the "
    "slowest round to the fastest. Level lines: what does not depend on that share."
)
TIME = (
    "Milliseconds per token, split as in a round that was watched. Waiting: from the call that asks for "
    "a layer's experts until they may be used."
)
TIMELINE = (
    "A few tokens of the watched round. Copies that lie under the dense part or the experts cost "
    "nothing; the whole of it is in the timeline files of the run's folder, for ui.perfetto.dev."
)
