"""What a validation shows: tables, a picture, a page, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console

from specgate.report.canvas import panels, tidy
from specgate.report.offload_page import section, write_page
from specgate.report.record import describe_hardware
from specgate.report.replay_page import figures
from specgate.report.style import Look, Row, slug
from specgate.report.tables import Table, percent

TITLE = "Does the simulator predict the replay?"
INTRODUCTION = (
    "The rows of a replay, which measured real copies and kernels, against simulations of the same "
    "documents, warm-up and decisions. By the profile: from what `python -m specgate.policy.measure` read "
    "on the machine and the model's shape; nothing of the replay enters. By its own rows: the time of an "
    "event is that of the row with everything on the device, the link as fast as it was; such rows predict "
    "nothing of themselves."
)
CAPTION = (
    "Predicted over measured tokens per second, both axes logarithmic; the band is 10 % to either side of "
    "the line. Hollow: the row that the prediction was made from."
)
WAYS = {"profile": "by the profile", "rows": "by its own rows"}
BAND = 0.10
KEPT = (
    "mode",
    "shape",
    "replay",
    "replayed_on",
    "profile",
    "handover",
    "event",
    "rows",
    "summary",
    "skipped",
)
FIGURES = (
    ("the link {:.3g} GB/s", "link_gb_per_s"),
    ("{:.3g} us for a copy besides", "link_latency_us"),
    ("{:.3g} us of the host for an operation", "operation_us"),
    ("{:.3g} us more to read a router's choice", "readback_us"),
    ("{:.3g} us to send slots ahead", "send_us"),
    ("launches {:.1%} longer beside copies for forecasts", "launch_slowdown"),
)
LOOKS = (
    *(Look("#8a8a8a", "o"), Look("#AA4499", "^"), Look("#332288", "s"), Look("#44AA99", "D")),
    *(Look("#CC3311", "h"), Look("#117733", "*"), Look("#DDAA33", "v"), Look("#0077BB", "P")),
    *(Look("#882255", "X"), Look("#66BB55", "d")),
)


def is_validation(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a validation."""
    return record.get("mode") == "validate"


def slim_validation(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record."""
    return {key: record[key] for key in KEPT if key in record}


def share_of(row: Row) -> str:
    """A row's share of the experts, in percent."""
    return f"{100 * row['residency']:g}" if row["budgeted"] else "–"


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """By variant, in the order in which they come, then by residency."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    return sorted(rows, key=lambda row: (names.index(row["variant"]), row["residency"], row["run"]))


def speed_table(record: Mapping[str, Any]) -> Table:
    """Tokens per second, measured and predicted."""
    table = Table(
        f"Measured and predicted tokens/s: {record['shape']['name']}",
        ["variant", "slots %", "measured", "low to high", "by profile", "ratio", "by rows", "ratio"],
    )
    rows = _ordered(record["rows"])
    for i, row in enumerate(rows):
        if i and rows[i - 1]["variant"] != row["variant"]:
            table.sections.add(i)
        cells = [row["variant"], share_of(row), figures(row["measured"])]
        cells.append(f"{figures(row['measured_low'])} to {figures(row['measured_high'])}")
        for way in WAYS:
            known = row[f"ratio_{way}"] is not None and not (way == "rows" and row["all_hits"])
            cells.append(figures(row[f"by_{way}"]))
            cells.append(f"{row[f'ratio_{way}']:.3f}" if known else "–")
        table.rows.append(cells)
    table.notes = ["Ratio: predicted over measured. Low to high: of the replay's rounds."]
    return table


def cause_table(record: Mapping[str, Any]) -> Table:
    """Hits and bytes, which say whether the simulated store decided as the real one did."""
    names = (("hit", "hit_rate"), ("late", "late_rate"), ("stall", "stall_share"))
    table = Table(
        f"Why: measured / predicted by the profile, {record['shape']['name']}",
        ["variant", "slots %", *[f"{short} %" for short, _ in names], "MB demanded", "MB ahead"],
    )
    rows = _ordered(record["rows"])
    for i, row in enumerate(rows):
        if i and rows[i - 1]["variant"] != row["variant"]:
            table.sections.add(i)
        table.rows.append(
            [
                row["variant"],
                share_of(row),
                *[f"{percent(row[f'measured_{n}'])} / {percent(row[f'profile_{n}'])}" for _, n in names],
                *[
                    f"{figures(row[f'measured_{n}'] * 1e-6)} / {figures(row[f'profile_{n}'] * 1e-6)}"
                    for n in ("demand_bytes", "prefetch_bytes")
                ],
            ]
        )
    table.notes = [
        "Shares of the experts that were asked for, and of the time; MB to the device per token. The stall "
        "was measured in a round of its own, with marks that slow it down."
    ]
    return table


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """What it comes to."""
    lines = [f"Replayed on {describe_hardware(record['replayed_on'])}.", *_figures(record)]
    for way, words in WAYS.items():
        found = record["summary"].get(way)
        if found is None:
            lines.append(f"Not predicted {words}: no row asked the store with everything on the device.")
            continue
        lines.append(
            f"Predicted {words}: {found['within']} of {found['rows']} rows within 10 %, {found['mean']:.1%} "
            f"off on average, {found['worst']:.1%} at most ({found['worst_row']})."
        )
        if found["order"] is not None:
            lines[-1] += (
                f" {found['order']:.0%} of the pairs that differ at a budget are in the measured order."
            )
    for left in record["skipped"]:
        where = f"{left['variant']} ({100 * left['residency']:g} %)"
        lines += [f"{where} is not simulated: {left['reason']}."]
    return lines


def _figures(record: Mapping[str, Any]) -> list[str]:
    """What decides, of the profile and of handing over forecasts; records of before do not hold all of it."""
    profile, how = record["profile"], record.get("handover")
    if "launch_slowdown" not in profile or how is None:
        return []
    known = [text.format(profile[name]) for text, name in FIGURES if profile[name] is not None]
    lines = [f"The profile: {', '.join(known)}."]
    times = [row["handover"]["us"] for row in record["rows"] if row["handover"]]
    if times and how == "unknown":
        lines += [
            "What it costs the host to hand over forecasts is not charged: it is read on the machine of the "
            "replay alone (or given, --handover-us)."
        ]
    elif times:
        span = " to ".join(dict.fromkeys(f"{t:.3g}" for t in (min(times), max(times))))
        lines += [f"Handing over a layer's forecasts takes the host {span} us ({how})."]
    return lines


def draw(record: Mapping[str, Any], file: Path) -> Path:
    """The picture: a panel for each way of predicting."""
    rows = record["rows"]
    ways = [way for way in WAYS if any(row[f"by_{way}"] is not None for row in rows)]
    drawn, axes = panels(4.6 * len(ways) + 1.2, 4.6, 1, len(ways), sharex=True, sharey=True)
    values = [row["measured"] for row in rows]
    values += [row[f"by_{way}"] for row in rows for way in ways if row[f"by_{way}"] is not None]
    low, high = min(values) / 1.25, max(values) * 1.25
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for panel, way in zip(axes[0], ways, strict=True):
        _panel(panel, rows, way, names, (low, high))
        panel.set_title(f"predicted {WAYS[way]}", fontsize=10, loc="left")
        panel.set_xlabel("measured tokens/s")
    axes[0][0].set_ylabel("predicted tokens/s")
    drawn.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8.5
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file)
    return file


def _panel(
    axes: Axes, rows: Sequence[Row], way: str, names: Sequence[str], limits: tuple[float, float]
) -> None:
    ends = list(limits)
    axes.fill_between(
        ends, [v * (1 - BAND) for v in ends], [v * (1 + BAND) for v in ends], color="#e9e9e9", lw=0, zorder=0
    )
    axes.plot(ends, ends, color="#8a8a8a", linewidth=0.8, zorder=1)
    for i, name in enumerate(names):
        look = LOOKS[i % len(LOOKS)]
        mine = [row for row in rows if row["variant"] == name and row[f"by_{way}"] is not None]
        for hollow in (False, True):
            some = [row for row in mine if (way == "rows" and row["all_hits"]) == hollow]
            if not some:
                continue
            x = [row["measured"] for row in some]
            spread = [[row["measured"] - row["measured_low"] for row in some],
                      [row["measured_high"] - row["measured"] for row in some]]  # fmt: skip
            axes.errorbar(
                x, [row[f"by_{way}"] for row in some], xerr=spread, fmt=look.marker, color=look.color,
                markerfacecolor="none" if hollow else look.color, markersize=6.5, elinewidth=0.8,
                label=None if hollow and len(some) < len(mine) else name, zorder=3,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    tidy(axes)


def picture_name(record: Mapping[str, Any]) -> str:
    """File name of the picture."""
    return f"validate-{slug(record['shape']['name'])}.png"


def publish_validation(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write the picture, ``tables.md`` and ``report.html``, print the tables; returns the page's path."""
    picture = draw(record, directory / "plots" / picture_name(record))
    tables = [speed_table(record), cause_table(record)]
    pictures = [(picture, CAPTION)]
    return write_page(record, directory, console, TITLE, INTRODUCTION, lines_of(record), tables, pictures)


def draw_validations(records: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """The pictures of stored records, for docs/RESULTS.md."""
    for record in records.values():
        if is_validation(record):
            draw(record, folder / picture_name(record))


def validation_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    text = section(INTRODUCTION, lines_of(record), [speed_table(record), cause_table(record)])
    return [*text, f"![{CAPTION}](images/{picture_name(record)})", ""]
