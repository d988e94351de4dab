"""The table of ``benchmarks.simulator``, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specgate.report.tables import Table, number, percent


def is_simulator_speed(record: Mapping[str, Any]) -> bool:
    """Whether a record is of ``benchmarks.simulator``."""
    return "simulator" in record


def slim_simulator_speed(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of such a record."""
    return {"simulator": record["simulator"], "config": record["config"]}


def table_of(record: Mapping[str, Any]) -> Table:
    """Speed by rule."""
    found = record["simulator"]
    table = Table(
        "Simulator: million expert events per second, one core",
        ["rules", "median", "best", "hits %", "prefetches per event"],
    )
    for row in found["rows"]:
        table.rows.append(
            [
                row["rules"],
                number(row["million_expert_events_per_second"], 2),
                number(row["best"], 2),
                percent(row["hit_rate"]),
                number(row["prefetches_per_event"], 2),
            ]
        )
    config = record["config"]
    table.notes = [
        f"{config['layers']} layers of {config['experts']} experts, {config['top_k']} per token, slots for "
        f"{100 * config['share']:g} %. Forecasts, for the rules that look at them, name "
        f"{found['foreseen_per_point']:.1f} experts per point. Time that the core worked; median of "
        f"{config['rounds']} rounds."
    ]
    return table


def simulator_speed_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of a record, without heading and origin."""
    table = table_of(record)
    return [f"**{table.title}**", "", table.to_markdown(), ""]
