"""The table of ``benchmarks.file_tier``, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgate.report.tables import Table, number, percent


def is_file_tier(record: Mapping[str, Any]) -> bool:
    """Whether a record is of ``benchmarks.file_tier``."""
    return "file_tier" in record


def slim_file_tier(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record: no local paths."""
    return {"file_tier": record["file_tier"]}


def table_of(record: Mapping[str, Any]) -> Table:
    """Speed of every plain loop, then of the file reader; the best plain loop is stressed."""
    found = record["file_tier"]
    how = "past the page cache" if found["direct"] else "through the page cache"
    table = Table(
        f"File reader against plain reads of one file, {how}",
        [
            "what reads",
            "MiB per read",
            "threads or requests",
            "GB/s",
            "slowest",
            "fastest",
            "% of the best plain loop",
        ],
    )
    for row in found["plain"]:
        if row == found["best_plain"]:
            table.strong.add(len(table.rows))
        table.rows.append(["pread loop", str(row["block_mib"]), str(row["threads"]), *_speeds(row)])
    table.sections = {0, len(table.rows)}
    for row in found["reader"]:
        name = f"file reader, {row['backend']}" + (", checksum" if row["checksum"] else "")
        table.rows.append([name, str(row["request_mib"]), str(found["requests"]), *_speeds(row)])
    cache = "all read with O_DIRECT" if found["direct"] else "O_DIRECT is refused here, all read without it"
    best = found["best_plain"]
    table.notes = [
        f"{found['file_bytes'] / 1e9:.2f} GB read once per round by each variant, {found['rounds']} "
        f"interleaved rounds; {cache}, the file's cached pages dropped before every pass. GB/s (10^9 bytes) "
        "from the median time; slowest and fastest are single rounds.",
        f"The best plain loop ({best['block_mib']} MiB x {best['threads']} threads, "
        f"{number(best['gb_per_s'], 3)} GB/s) is the one of {len(found['plain'])} with the highest median, "
        "chosen after the fact; the last column divides medians.",
        f"Pread loops: that many threads. File reader: {found['requests']} requests under way; with "
        "checksum, it also checks a CRC-32C of each.",
    ]
    return table


def _speeds(row: Mapping[str, Any]) -> list[str]:
    speeds = [number(row[key], 3) for key in ("gb_per_s", "slowest", "fastest")]
    return [*speeds, percent(row["share_of_best_plain"])]


def file_tier_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of a record, without heading and origin."""
    table = table_of(record)
    return [f"**{table.title}**", "", table.to_markdown(), ""]
