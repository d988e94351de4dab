"""What a plan shows: tables, a picture, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from specgate.moe.offload_plan import size
from specgate.report.canvas import figure, panels, tidy
from specgate.report.offload_page import write_page
from specgate.report.offload_plots import LOOKS
from specgate.report.plan_verdict import RESOURCES
from specgate.report.replay_page import figures, gb
from specgate.report.style import Look, slug
from specgate.report.tables import Table, percent

TITLE = "Will it fit, how fast, and is prediction worth it?"
INTRODUCTION = (
    "Computed, not run: sizes from the model's configuration, times from the machine's figures, hit rates "
    "from simulating a real routing trace."
)
TIERS = {"device": "#332288", "host": "#44AA99", "file": "#DDAA33"}
SHADES = {
    "dense weights": "#332288",
    "KV cache": "#88CCEE",
    "activations (estimate)": "#6699CC",
    "expert slots": "#117733",
    "experts": "#117733",
    "free": "#e4e4e4",
}
LINES = ("resident", "oracle", "priced", "lfru", "lru", "on_demand")
TITLES = {"priced": "with prediction", "on_demand": "without a cache", "resident": "all on the device"}
CURVE = (
    "Expected tokens per second over the device memory that all of the model may use; the dotted line is the "
    "budget that was asked for, grey is beyond the card. A cache of fewer experts than a "
    "step uses finds almost nothing again."
)
MEMORY = "What lies where. Experts in the file are read only where host memory does not hold them."


def memory_table(record: Mapping[str, Any]) -> Table:
    """What lies where."""
    about = record["plan"]
    table = Table(f"Where {record['shape']['name']} lies", ["where", "what", "bytes", "of what"], left=2)
    tier = ""
    for row in record["memory"]:
        if row["tier"] != tier:
            table.sections.add(len(table.rows))
        shown = row["tier"] if row["tier"] != tier else ""
        table.rows.append([shown, row["what"], size(row["bytes"]), row["about"]])
        tier = row["tier"]
    table.notes = [
        f"Device: {record['machine']['device']}, {record['machine']['device_gb']:g} GB; budget "
        f"{about['budget_gb']:g} GB. Activations are those of a prompt that fills the context."
    ]
    return table


def speed_table(record: Mapping[str, Any]) -> Table:
    """What each policy would reach."""
    moved = {"demand_bytes": "MB asked", "prefetch_bytes": "ahead", "wasted_bytes": "wasted"}
    if any(row["file_bytes"] for row in record["rows"]):
        moved["file_bytes"] = "from file"
    table = Table(
        f"Expected speed of {record['shape']['name']} on {record['machine']['name']}",
        ["policy", "tokens/s", "ms/step", "hit %", "late %", "waits %", *moved.values(), "oracle's gain %",
         "bound by"],
    )  # fmt: skip
    for row in record["rows"]:
        table.rows.append(
            [
                row["policy"],
                figures(row["tokens_per_second"]),
                figures(row["ms_per_step"]),
                percent(row["hit_rate"]),
                percent(row["late_rate"]),
                percent(row["stall_share"]),
                *[figures(row[name] * 1e-6) for name in moved],
                percent(row["share_of_gain"]),
                row["binds"],
            ]
        )
        if row["policy"] == "priced":
            table.strong.add(len(table.rows) - 1)
    about = record["plan"]
    whose = "its own trace" if about["own_trace"] else f"the trace of another model, {about['trace']}"
    table.notes = [
        f"Hit rates: {whose}, {about['documents']} documents of at most {about['tokens']} tokens; forecasts "
        f"{about['forecasts']} (by layers ahead). MB per token over the link, asked for and fetched ahead; "
        "waits: share of the time that "
        "the model waits for experts. Oracle's gain: time saved over the better cache without prediction, as "
        "a share of what the oracle saves.",
        f"Bound by: {'; '.join(f'{name}, {words}' for name, words in RESOURCES.items())}.",
        *[f"{row['policy']}: {row['about']}." for row in record["rows"]],
    ]
    return table


def codec_table(record: Mapping[str, Any]) -> Table:
    """The codecs side by side."""
    table = Table(
        "By codec of the blocks in host memory and file, tokens/s",
        [
            "codec",
            "values",
            "an expert",
            "in host memory",
            "file",
            "lru",
            "lfru",
            "with prediction",
            "oracle",
        ],
        left=2,
    )
    best = max(record["codecs"], key=lambda row: row["priced"])
    for row in record["codecs"]:
        if row is best:
            table.strong.add(len(table.rows))
        table.rows.append(
            [
                row["codec"],
                "exact" if row["exact"] else "approximate",
                gb(row["block_bytes"]),
                f"{row['in_host']} of {record['plan']['blocks']}",
                gb(row["file_bytes"]),
                *[figures(row[name]) for name in ("lru", "lfru", "priced", "oracle")],
            ]
        )
    table.notes = ["Slots hold decoded experts, so that their number is the same with every codec."]
    return table


def split_table(record: Mapping[str, Any]) -> Table:
    """Context against slots."""
    table = Table(
        "How the budget could be split, tokens/s",
        ["context", "KV cache", "activations", "slots", "lru", "lfru", "priced", "oracle"],
    )
    for row in record["contexts"]:
        if row["context"] == record["plan"]["context"]:
            table.strong.add(len(table.rows))
        names = ("lru", "lfru", "priced", "oracle")
        speeds = [figures(row[n]) for n in names] if row["fits"] else ["does not fit", "", "", ""]
        table.rows.append(
            [
                str(row["context"]),
                gb(row["kv_bytes"]),
                gb(row["activation_bytes"]),
                str(row["slots"]),
                *speeds,
            ]
        )
    return table


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table of a plan."""
    tables = [memory_table(record)]
    if record["rows"]:
        tables += [speed_table(record), codec_table(record), split_table(record)]
    return tables


def draw_curve(record: Mapping[str, Any]) -> Figure:
    """Tokens per second against the budget."""
    drawn = figure(7.6, 4.2)
    axes = drawn.subplots()
    for name in LINES:
        rows = record["curve"]
        if name == "on_demand":  # loads nothing where everything is there
            rows = [row for row in rows if row["slots"] < record["plan"]["decoding"]]
        x = [row["budget_gb"] for row in rows]
        look = LOOKS.get(name, Look("#332288", "o"))
        marker = None if name == "resident" else look.marker
        strong = name == "priced"
        axes.plot(
            x, [row[name] for row in rows], color=look.color, marker=marker, linestyle=look.line,
            linewidth=2.4 if strong else 1.5, markersize=7 if strong else 5, label=TITLES.get(name, name),
            zorder=3 if strong else 2,
        )  # fmt: skip
    axes.axvline(record["plan"]["budget_gb"], color="#8a8a8a", linestyle=":", linewidth=1.2)
    if record["machine"]["device_gb"] < max(row["budget_gb"] for row in record["curve"]):
        axes.axvspan(record["machine"]["device_gb"], axes.get_xlim()[1], color="#f0f0f0", zorder=0)
    axes.margins(x=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("device memory, GB")
    axes.set_ylabel("expected tokens per second")
    tidy(axes)
    drawn.legend(loc="outside right center", frameon=False, fontsize=9)
    drawn.suptitle(_title(record), fontsize=11)
    return drawn


def draw_memory(record: Mapping[str, Any]) -> Figure:
    """A bar per tier."""
    tiers = list(TIERS)
    drawn, grid = panels(7.6, 3.0, len(tiers), 1)
    shown: dict[str, Any] = {}
    for axes, tier in zip(grid[:, 0], tiers, strict=True):
        left = 0.0
        for row in record["memory"]:
            if row["tier"] != tier or row["bytes"] <= 0:
                continue
            width = row["bytes"] / 1e9
            bar = axes.barh(0, width, left=left, color=SHADES[row["what"]], height=0.7)
            shown.setdefault(row["what"].replace("expert slots", "experts"), bar)
            left += width
        axes.set_yticks([0], [tier], fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        tidy(axes, "x")
        axes.spines["left"].set_visible(False)
    grid[-1, 0].set_xlabel("GB", fontsize=9)
    drawn.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False, fontsize=8
    )
    drawn.suptitle(_title(record), fontsize=11)
    return drawn


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['shape']['name']} on {record['machine']['device']}, codec {record['plan']['codec']}"


def draw(record: Mapping[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """All pictures as PNG files; returns paths and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [(draw_memory(record), "memory", MEMORY)]
    if record["curve"]:
        made.insert(0, (draw_curve(record), "speed", CURVE))
    out = []
    for drawn, kind, caption in made:
        path = folder / f"{slug(record['shape']['name'])}-plan-{kind}.png"
        drawn.savefig(path, metadata={"Software": None})
        out.append((path, caption))
    return out


def publish_plan(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write pictures, ``tables.md`` and ``report.html``, print tables and verdict; returns the page."""
    lines: Sequence[str] = record["verdict"]
    return write_page(
        record, directory, console, TITLE, INTRODUCTION, lines, tables_of(record),
        draw(record, directory / "plots"),
    )  # fmt: skip


def is_plan(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a plan."""
    return record.get("mode") == "plan"
