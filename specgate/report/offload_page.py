"""What the pages of mode=live and mode=replay have in common: how they are written and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.report.html import plain_page
from specgate.report.tables import Table


def write_page(
    record: Mapping[str, Any],
    directory: Path,
    console: Console | None,
    title: str,
    introduction: str,
    lines: Sequence[str],
    tables: Sequence[Table],
    pictures: Any,
) -> Path:
    """Write ``tables.md`` and ``report.html``, print the tables; returns the page's path."""
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    if console is not None:
        for table in tables:
            console.print(table.to_rich())
        for line in lines:
            console.print(line, highlight=False)
        if record.get("timelines"):
            files = f"{directory}/timeline-*.json"
            console.print(f"Timelines, for ui.perfetto.dev: {files}", soft_wrap=True, highlight=False)
    page = directory / "report.html"
    text = " ".join([introduction, *lines])
    page.write_text(plain_page(record, title, text, list(tables), pictures), encoding="utf-8")
    return page


def section(introduction: str, lines: Sequence[str], tables: Sequence[Table]) -> list[str]:
    """Markdown of a record, without heading and origin."""
    text = [introduction, "", *[f"- {line}" for line in lines], ""]
    for table in tables:
        text += [f"**{table.title}**", "", table.to_markdown(), ""]
    return text
