"""What a replay shows: tables, pictures, a page, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.report.offload_page import section, write_page
from specgate.report.offload_plots import draw
from specgate.report.style import Row, slug
from specgate.report.tables import Table, number, percent

TITLE = "What is foresight worth to an expert loader?"
INTRODUCTION = (
    "A real trace says which experts each token uses; experts of the model's true size, with random "
    "weights, are moved and multiplied accordingly, one token at a time. Every variant decodes the same "
    "documents in the same run, in turns, and computes the same values."
)


def gb(count: float | None) -> str:
    """Bytes as GB, or MB where that is more readable; a dash for unknown."""
    if count is None:
        return "–"
    return f"{count * 1e-9:.2f} GB" if count >= 1e9 else f"{count * 1e-6:.3g} MB"


def share_of(row: Row) -> str:
    """A row's share of the experts, in percent."""
    return f"{100 * row['residency']:g}" if row["budgeted"] else "–"


def groups(table: Table, rows: Sequence[Row]) -> None:
    """A line between variants."""
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1]["variant"] != row["variant"]:
            table.sections.add(i)


def speed_table(rows: Sequence[Row], title: str) -> Table:
    """Tokens per second and what they are compared to."""
    table = Table(
        title,
        ["variant", "slots %", "tokens/s", "low to high", "× on demand", "% resident", "ms p50", "ms p95",
         "stall %", "hidden %"],
        left=1,
    )  # fmt: skip
    for row in rows:
        table.rows.append(
            [
                row["variant"],
                share_of(row),
                figures(row["tokens_per_second"]),
                f"{figures(row['tokens_per_second_low'])} to {figures(row['tokens_per_second_high'])}",
                number(row["against_on_demand"], 2),
                percent(row["against_resident"]),
                figures(row["ms_p50"]),
                figures(row["ms_p95"]),
                percent(row["stall_share"]),
                percent(row["copies_hidden"]),
            ]
        )
    groups(table, rows)
    table.notes = [
        "Ratios are medians over the rounds of one run. Stall: waiting for a layer's experts. Hidden: "
        "share of the time in which something was on its way to the device that the device spent "
        "computing.",
        *[f"{row['variant']}: {row['about']}." for row in _first_of_each(rows)],
    ]
    return table


def bytes_table(rows: Sequence[Row], title: str) -> Table:
    """What was moved per token."""
    moved = {
        "demanded": "demand_bytes",
        "ahead": "prefetch_bytes",
        "useful": "useful_bytes",
        "wasted": "wasted_bytes",
        "late": "late_bytes",
        "from file": "read_bytes",
    }
    table = Table(title, ["variant", "slots %", "hit %", "late %", *[f"MB {name}" for name in moved]], left=1)
    for row in rows:
        table.rows.append(
            [
                row["variant"],
                share_of(row),
                percent(row["hit_rate"]),
                percent(row["late_rate"]),
                *[figures(row[column] * 1e-6) for column in moved.values()],
            ]
        )
    groups(table, rows)
    table.notes = [
        "MB to the device per token: demanded, and fetched ahead. Useful: fetched ahead (also while "
        "warming up) and then used; wasted: evicted unused; late: used while still on its way, and part "
        "of useful."
    ]
    return table


def memory_table(rows: Sequence[Row], title: str) -> Table:
    """Link, memory and energy."""
    table = Table(
        title,
        ["variant", "slots %", "slots", "link GB/s", "device GB", "host GB", "experts on host GB", "J/token"],
        left=1,
    )
    for row in rows:
        on_device = row["device_bytes"] if row["device_peak"] is None else row["device_peak"]
        table.rows.append(
            [
                row["variant"],
                share_of(row),
                str(row["slots"]),
                number(row["link_gb_per_second"], 1),
                *[figures(count * 1e-9) for count in (on_device, row["host_peak"], row["host_bytes"])],
                number(row["joules_per_token"], 2),
            ]
        )
    groups(table, rows)
    stands = " Here the CPU stands in for the device: slots and dense weights." if _on_cpu(rows) else ""
    table.notes = [
        "Link: bytes over the time in which something was on its way. Device and host: at their peak; "
        f"host is the memory of the process that lies in RAM.{stands}"
    ]
    return table


def figures(value: float | None) -> str:
    """Three figures."""
    if value is None:
        return "–"
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def _first_of_each(rows: Sequence[Row]) -> list[Row]:
    return list({row["variant"]: row for row in reversed(rows)}.values())[::-1]


def _on_cpu(rows: Sequence[Row]) -> bool:
    return all(row["device_peak"] is None for row in rows)


def setting_lines(record: Mapping[str, Any]) -> list[str]:
    """What was replayed, in words."""
    shape, about = record["shape"], record["replay"]
    where = (
        "in host memory" if about["tier"] == "memory" else f"in a file, {about['host']:.0%} in host memory"
    )
    lines = [
        f"{shape['name']}: {shape['layers']} layers of {shape['experts']} experts, {shape['top_k']} per "
        f"token, {shape['expert_parameters'] / 1e6:.3g} M weights each; {shape['dtype']} in slots of "
        f"{gb(about['slot_bytes'])}, codec {about['codec']} in blocks of {gb(about['block_bytes'])}, "
        f"{where}.",
        f"{about['documents']} documents of {about['tokens']} tokens after {about['warmup']} to warm up, "
        f"{about['repeats']} rounds; kernels {about['kernels']} on {about['device']}; a layer's dense "
        f"part is {'one matrix of its size' if about['dense'] else 'left out'}, the language-model head "
        f"{'runs' if about['head'] else 'is left out'}.",
    ]
    if about["predictor"]:
        lines.append(
            f"Forecasts: {about['predictor']}, computed beforehand (its own time is not in the figures), "
            f"fetched from p ≥ {about['threshold']:g}; the oracle knows {about['lookahead']} calls."
        )
    if record["rows"][0]["phase"] == "prefill":
        lines.append("The trace was recorded in prefill; its tokens are decoded one by one here.")
    if not about["energy"]:
        lines.append("Energy is left out: no NVML counter here.")
    if about["resumed"]:
        lines.append(f"{about['resumed']} measurements are from an interrupted run.")
    return lines


def verdict_lines(rows: Sequence[Row]) -> list[str]:
    """What it comes to, at the residency nearest a quarter."""
    budgeted = [row for row in rows if row["budgeted"]]
    if not budgeted:
        return []
    share = min({row["residency"] for row in budgeted}, key=lambda r: abs(r - 0.25))
    mine = [row for row in budgeted if row["residency"] == share]
    out = []
    for base, words in (("on_demand", "without a cache"), ("resident", "the resident model")):
        if mine[0][f"against_{base}"] is not None:
            each = ", ".join(f"{row['variant']} {row[f'against_{base}']:.2f}×" for row in mine)
            out.append(f"At {100 * share:g} % of the experts, tokens/s against {words}: {each}.")
    return out


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table of a replay."""
    rows, name = record["rows"], f"{record['shape']['name']} with trace {record['rows'][0]['trace']}"
    return [
        speed_table(rows, f"Decoding {name}"),
        bytes_table(rows, f"Bytes per token: {name}"),
        memory_table(rows, f"Link, memory and energy: {name}"),
    ]


def publish_replay(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write pictures, ``tables.md`` and ``report.html``, print the tables; returns the page's path."""
    tables = tables_of(record)
    title = f"{record['shape']['name']}, codec {record['replay']['codec']}"
    pictures = draw(record, directory / "plots", slug(record["shape"]["name"]), title)
    lines = [*setting_lines(record), *verdict_lines(record["rows"])]
    return write_page(record, directory, console, TITLE, INTRODUCTION, lines, tables, pictures)


def is_replay(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a replay."""
    return record.get("mode") == "replay"


def slim_replay(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record: everything but the timelines."""
    return {key: record[key] for key in ("shape", "replay", "rows", "skipped", "threads") if key in record}


def replay_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    lines = [*setting_lines(record), *verdict_lines(record["rows"])]
    return section(INTRODUCTION, lines, tables_of(record))
