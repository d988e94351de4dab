"""What mode=live shows: tables, pictures, a page, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.report.offload_page import section, write_page
from specgate.report.offload_plots import draw
from specgate.report.replay_page import bytes_table, figures, gb, groups, share_of
from specgate.report.style import Row, slug
from specgate.report.tables import Table, number, percent

TITLE = "How fast does a model generate whose experts are elsewhere?"
INTRODUCTION = (
    "The same prompts, generated greedily by the resident model, by specgate.offload with budgets from a "
    "few experts to all of them, and by accelerate, on the same machine in the same run, in turns. "
    "Offloaded models give the resident model's logits bit for bit; that is checked at every step."
)
PARTS = {
    "compute_share": "as long as the resident model takes",
    "stall_share": "waiting for experts",
    "other_share": "the rest",
}


def speed_table(rows: Sequence[Row], title: str) -> Table:
    """Decoding, and what it is compared to."""
    named = {"on_demand": "× on demand", "accelerate_cpu": "× accelerate"}
    bases = [base for base in named if rows[0][f"against_{base}"] is not None]
    table = Table(
        title,
        ["variant", "slots %", "tokens/s", "low to high", "% resident", *[named[b] for b in bases], "ms p95",
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
                percent(row["against_resident"]),
                *[number(row[f"against_{base}"], 2) for base in bases],
                figures(row["ms_p95"]),
                percent(row["stall_share"]) if row["hit_rate"] is not None else "–",
                percent(row["copies_hidden"]),
            ]
        )
    groups(table, rows)
    table.notes = [
        "Decoding, from the first token on; ratios are medians over the rounds of one run. Stall: "
        "waiting for experts. Hidden: share of the copy time during which nobody waited.",
        *[f"{row['variant']}: {row['about']}." for row in {r["variant"]: r for r in rows}.values()],
    ]
    return table


def ranking_table(rows: Sequence[Row], title: str) -> Table:
    """The policies of specgate.offload at each budget, fastest first."""
    table = Table(
        title,
        ["slots %", "variant", "tokens/s", "low to high", "× LRU", "hit %", "MB copied", "MB wasted",
         "stall %", "J/token"],
        left=2,
    )  # fmt: skip
    shares = sorted({row["residency"] for row in rows})
    for share in shares:
        mine = [row for row in rows if row["residency"] == share]
        table.sections.add(len(table.rows))
        for row in sorted(mine, key=lambda r: -r["tokens_per_second"]):
            copied = (row["demand_bytes"] + row["prefetch_bytes"]) * 1e-6
            table.rows.append(
                [
                    share_of(row),
                    row["variant"],
                    figures(row["tokens_per_second"]),
                    f"{figures(row['tokens_per_second_low'])} to {figures(row['tokens_per_second_high'])}",
                    number(row["against_lru"], 2),
                    percent(row["hit_rate"]),
                    figures(copied),
                    figures(row["wasted_bytes"] * 1e-6),
                    percent(row["stall_share"]),
                    number(row["joules_per_token"], 2),
                ]
            )
    table.notes = [
        "Fastest first at each budget; × LRU: median over the rounds of the ratio to the cache that evicts "
        "by LRU at the same budget. MB and joules: per generated token, the prompts included."
    ]
    return table


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows of budgets at which several policies ran."""
    mine = [row for row in rows if row["budgeted"] and row["hit_rate"] is not None]
    counts = Counter(row["residency"] for row in mine)
    return [row for row in mine if counts[row["residency"]] > 1]


def prefill_table(rows: Sequence[Row], title: str) -> Table:
    """Prompts, and what was computed."""
    table = Table(
        title,
        ["variant", "slots %", "first token ms", "prompt tokens/s", "same tokens", "same logits"],
        left=1,
    )
    for row in rows:
        table.rows.append(
            [
                row["variant"],
                share_of(row),
                figures(row["ms_first"]),
                figures(row["prefill_tokens_per_second"]),
                "yes" if row["tokens_equal"] else "no",
                "yes" if row["logits_equal"] else "no",
            ]
        )
    groups(table, rows)
    table.notes = [
        "First token: median time until it is there; the prompt's tokens over that time. Same: as the "
        "resident model's (the first row's) at every step of every round, logits bit for bit."
    ]
    return table


def memory_table(rows: Sequence[Row], title: str) -> Table:
    """Memory and energy."""
    table = Table(
        title,
        ["variant", "slots %", "slots", "budget GB", "device GB", "host GB", "experts on host GB", "J/token"],
        left=1,
    )
    for row in rows:
        table.rows.append(
            [
                row["variant"],
                share_of(row),
                str(row["slots"]) if row["slots"] else "–",
                number(row["budget_gb"], 3),
                *[figures(None if v is None else v * 1e-9) for v in (row["device_peak"], row["host_peak"])],
                figures(row["host_bytes"] * 1e-9),
                number(row["joules_per_token"], 2),
            ]
        )
    groups(table, rows)
    table.notes = [
        "Device: of all programs, at its peak. Host: memory of the process that lies in RAM, at its peak"
        + (" (the CPU stands in for the device)." if rows[0]["device_peak"] is None else ".")
    ]
    return table


def setting_lines(record: Mapping[str, Any]) -> list[str]:
    """What was run, in words."""
    about = record["live"]
    lines = [
        f"{record['model']}: {about['layers']} MoE layers of {about['experts']} experts, {about['top_k']} "
        f"per token, {gb(about['slot_bytes'])} each in {about['dtype']}, {gb(about['dense_bytes'])} "
        f"besides; on {about['device']}, codec {about['codec']}.",
        f"{about['prompts']} prompts of {about['prompt_tokens']} tokens of the bundled text, "
        f"{about['new_tokens']} tokens generated after each, {about['repeats']} rounds.",
    ]
    if about["forced"]:
        why = "a model of random weights would repeat itself" if about["random_weights"] else "as asked for"
        lines.append(f"Each step is computed and compared as ever, and then the document goes on ({why}).")
    if about["random_weights"]:
        lines.append(
            "Its routing is that of random weights: nearly even, and so hard on any cache or forecast."
        )
    if not about["energy"]:
        lines.append("Energy is left out: no NVML counter here.")
    if about["resumed"]:
        lines.append(f"{about['resumed']} measurements are from an interrupted run.")
    return lines


def verdict_lines(rows: Sequence[Row]) -> list[str]:
    """What it comes to, at the budget nearest a quarter."""
    budgeted = [row for row in rows if row["budgeted"]]
    if not budgeted:
        return []
    share = min({row["residency"] for row in budgeted}, key=lambda r: abs(r - 0.25))
    mine = [row for row in budgeted if row["residency"] == share]
    words = {
        "on_demand": "without a cache",
        "resident": "the resident model",
        "accelerate_cpu": "accelerate's CPU offload",
        "accelerate_disk": "accelerate's disk offload",
    }
    out = []
    for base, text in words.items():
        if mine[0][f"against_{base}"] is not None:
            each = ", ".join(f"{row['variant']} {row[f'against_{base}']:.2f}×" for row in mine)
            out.append(f"At {100 * share:g} % of the experts, tokens/s against {text}: {each}.")
    return out


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table of such a record."""
    rows, name = record["rows"], record["model"]
    tables = [
        speed_table(rows, f"Generating with {name}"),
        prefill_table(rows, f"Prompts and values: {name}"),
    ]
    offloaded = [row for row in rows if row["hit_rate"] is not None]
    if offloaded:
        tables.append(bytes_table(offloaded, f"Bytes per generated token (prompts included): {name}"))
    if several := ranked(rows):
        tables.insert(1, ranking_table(several, f"Policies by speed: {name}"))
    return [*tables, memory_table(rows, f"Memory and energy: {name}")]


def publish_live(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write pictures, ``tables.md`` and ``report.html``, print the tables; returns the page's path."""
    tables = tables_of(record)
    pictures = draw(record, directory / "plots", slug(record["model"]), record["model"], PARTS)
    lines = [*setting_lines(record), *verdict_lines(record["rows"])]
    return write_page(record, directory, console, TITLE, INTRODUCTION, lines, tables, pictures)


def is_live(record: Mapping[str, Any]) -> bool:
    """Whether a record is of mode=live."""
    return record.get("mode") == "live"


def slim_live(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record: everything but the timelines."""
    return {key: record[key] for key in ("model", "live", "rows", "skipped", "threads") if key in record}


def live_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    lines = [*setting_lines(record), *verdict_lines(record["rows"])]
    return section(INTRODUCTION, lines, tables_of(record))
