"""Tables of ``benchmarks.store_paths``, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgate.report.tables import Table, number, percent


def is_store_paths(record: Mapping[str, Any]) -> bool:
    """Whether a record is of ``benchmarks.store_paths``."""
    return "store_paths" in record


def slim_store_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record."""
    return {"store_paths": record["store_paths"], "threads": record["threads"]}


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """A table per question that was asked."""
    found = record["store_paths"]
    makers = {"copies": _copies, "hits": _hits, "resident": _resident}
    return [make(found) for name, make in makers.items() if found[name]]


def _copies(found: Mapping[str, Any]) -> Table:
    gpu = str(found["device"]).startswith("cuda")
    where = "from pinned memory to the GPU" if gpu else "from memory to memory, on the CPU"
    table = Table(
        f"Copy engine against bare copies, {where}",
        ["MiB per expert", "bare GB/s", "demanded GB/s", "% of bare", "forecast GB/s", "% of bare"],
    )
    for row in found["copies"]:
        table.rows.append(
            [
                f"{row['mib']:g}",
                number(row["bare_gb_per_s"], 2),
                number(row["demanded_gb_per_s"], 2),
                percent(row["demanded_share"]),
                number(row["forecast_gb_per_s"], 2),
                percent(row["forecast_share"]),
            ]
        )
    table.notes = [
        f"Medians of {found['copies'][0]['rounds']} interleaved rounds; GB are 10^9 bytes. Bare: "
        "asynchronous torch copies in one stream. Demanded: events of 4 experts, none of them there. "
        "Forecast: as many as the slots hold at once."
    ]
    return table


def _hits(found: Mapping[str, Any]) -> Table:
    table = Table(
        "Experts that are there: nanoseconds of a call",
        [
            "experts",
            "acquire, native",
            "release, native",
            "acquire, Python",
            "release, Python",
            "prefetch, Python",
        ],
    )
    columns = ("core_acquire", "core_release", "python_acquire", "python_release", "python_prefetch")
    for row in found["hits"]:
        table.rows.append([str(row["experts"]), *[f"{row[f'{column}_ns']:,.0f}" for column in columns]])
    table.notes = [f"Medians of {found['hits'][0]['calls']:,} calls."]
    return table


def _resident(found: Mapping[str, Any]) -> Table:
    table = Table(
        "Everything in slots against plain transformers: tokens per second",
        ["model", "transformers", "specgate.offload", "ratio"],
    )
    for row in found["resident"]:
        table.rows.append(
            [row["model"], number(row["resident"], 1), number(row["offload"], 1), number(row["ratio"], 3)]
        )
    first = found["resident"][0]
    table.notes = [f"Median ratio of {first['rounds']} rounds of {first['tokens']} tokens, in turns."]
    return table


def store_paths_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    lines: list[str] = []
    for table in tables_of(record):
        lines += [f"**{table.title}**", "", table.to_markdown(), ""]
    return lines
