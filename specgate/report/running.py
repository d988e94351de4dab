"""Sections of docs/RESULTS.md about running things: how long collecting took, and what the recorder costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgate.report.tables import Table

COLLECTED = (
    "model",
    "trace",
    "seconds",
    "tokens",
    "tokens_per_second",
    "routing_control",
    "stacks",
    "threads",
)


def is_running(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a collection or of the recorder's cost, rather than of accuracy."""
    return "stacks" in record or "overhead" in record


def slim_running(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record: no expert shares, no favourites."""
    if "overhead" in record:
        return {"overhead": record["overhead"], "threads": record["threads"]}
    kept = {key: record[key] for key in COLLECTED if key in record}
    kept["threads"] = record["threads"]
    kept["stacks"] = {
        name: {k: v for k, v in stack.items() if k not in ("layers", "verdict")}
        for name, stack in record["stacks"].items()
    }
    return kept


def running_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one such record, without heading and origin."""
    return _overhead(record) if "overhead" in record else _collection(record)


def _collection(record: Mapping[str, Any]) -> list[str]:
    table = Table(
        title=f"Routing of {record['model']}",
        columns=[
            "stack",
            "sequences",
            "tokens",
            "least load entropy",
            "dropped",
            "popularity recall@K",
            "chance",
        ],
    )
    for name, stack in record["stacks"].items():
        drops = "-" if stack["drop_rate"] is None else f"{stack['drop_rate']:.1%}"
        table.rows.append(
            [
                name,
                f"{stack['sequences']:,}",
                f"{stack['tokens']:,}",
                f"{stack['entropy_min']:.3f}",
                drops,
                f"{stack['popularity_recall']:.3f}",
                f"{stack['chance']:.3f}",
            ]
        )
    control = record["routing_control"]
    lines = [f"**{table.title}**", "", table.to_markdown(), ""]
    if record.get("tokens_per_second"):
        lines.append(
            f"{record['tokens']:,} tokens in {record['seconds']:.0f} s with {record['threads']} thread(s), "
            f"{record['tokens_per_second']:,.0f} tokens/s, recording, routing control and writing included."
        )
    lines.append(
        f"Popularity: recall@K of the most used experts. Routing control: {control['agreement']:.2%} of "
        f"{control['decisions']:,} decisions recomputed by hand are what executed."
    )
    return lines


def _overhead(record: Mapping[str, Any]) -> list[str]:
    table = Table(
        title="Cost of recording, against the bare forward pass",
        columns=["model", "variant", "wall ms", "wall ratio", "processor ms", "processor ratio"],
        left=2,
    )
    for result in record["overhead"]:
        for variant, row in result["variants"].items():
            table.rows.append(
                [
                    result["model"],
                    variant,
                    f"{row['wall_ms']:.1f}",
                    f"{row['wall_ratio']:.3f}",
                    f"{row['cpu_ms']:.1f}",
                    f"{row['cpu_ratio']:.3f}",
                ]
            )
    first = record["overhead"][0]
    return [
        f"**{table.title}**",
        "",
        table.to_markdown(),
        "",
        f"Medians of {first['rounds']} interleaved rounds of {first['batch']} x {first['length']} tokens, "
        f"{record['threads']} thread(s).",
    ]
