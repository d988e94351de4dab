"""``python -m specgate.report.readme [RUN]``: writes the generated parts of README.md.

The parts stand between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. With the output folder of a
finished demo (``outputs/demo``) its numbers and pictures are taken over first, into ``docs/demo.json`` and
``docs/images/``; without one, the numbers kept there are written again. Nothing between the marks is typed by
hand.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specgate.errors import SpecgateError
from specgate.moe.families import BROKEN, FAMILIES, TRANSFORMERS_RANGE
from specgate.report.record import describe_hardware, read_record, write_json
from specgate.report.style import traces_of
from specgate.report.tables import summary_table
from specgate.report.verdict import verdict

ROOT = Path(__file__).parents[2]
KEPT = Path("docs") / "demo.json"
IMAGES = Path("docs") / "images"


def trimmed(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a demo's metrics.json: rows without their curves, steps, machine, versions."""
    keys = (
        "schema_version",
        "entry",
        "command",
        "started",
        "git",
        "hardware",
        "versions",
        "seconds",
        "cpu_seconds",
        "steps",
    )
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in record["rows"]]
    return {**{key: record[key] for key in keys}, "pictures": shown(record), "rows": rows}


def shown(record: Mapping[str, Any]) -> list[str]:
    """The pictures that the README shows: accuracy against horizon, one per trace."""
    return [picture for picture in record["pictures"] if Path(picture).stem.endswith("-accuracy")]


def demo_part(record: Mapping[str, Any]) -> str:
    """Result table, verdicts and times of a demo run, as Markdown; targets within the token."""
    rows = [row for row in record["rows"] if row["kind"] == "within"]
    lines = [summary_table(rows).to_markdown(), ""]
    for trace in traces_of(rows):
        lines += [f"**{trace}.** " + " ".join(verdict(rows, trace)), ""]
    versions = record["versions"]
    where = (
        f"{describe_hardware(record['hardware'])} with Python {versions['python']}, torch {versions['torch']}"
    )
    lines += [
        f"`make demo` took {clock(record['seconds'])} ({clock(record['cpu_seconds'])} of processor time) on "
        f"{where}:",
        "",
        "| step | command | seconds | of processor time |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {s['name']} | `{s['command']}` | {s['seconds']:.0f} | {s['cpu_seconds']:.0f} |"
        for s in record["steps"]
    ]
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Seconds as ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def families_part() -> str:
    """The table of supported architectures, as Markdown."""
    low, high = TRANSFORMERS_RANGE
    lines = [
        "| model family | `model_type` | stacks | what a recorded weight is |",
        "| --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        lines.append(f"| {family.title} | `{name}` | {', '.join(family.stacks)} | {family.semantics} |")
    lines += [f"| – | `{name}` | refused | {reason} |" for name, reason in BROKEN.items()]
    lines += ["", f"For transformers {low[0]}.{low[1]} up to, not including, {high[0]}.{high[1]}."]
    return "\n".join(lines)


def replace_part(text: str, name: str, part: str) -> str:
    """``text`` with ``part`` between the marks called ``name``.

    Raises:
        SpecgateError: if the marks are not there exactly once.
    """
    pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    new, count = pattern.subn(lambda match: match[1] + part + "\n" + match[2], text)
    if count != 1:
        raise SpecgateError(f"README.md has {count} parts marked <!-- {name}:begin --> ... end: it needs one")
    return new


def render(text: str, record: Mapping[str, Any]) -> str:
    """README.md's text with every generated part written anew."""
    return replace_part(replace_part(text, "families", families_part()), "demo", demo_part(record))


def take_over(run: Path, root: Path = ROOT) -> None:
    """Keeps a demo's numbers in docs/demo.json and its pictures in docs/images/."""
    record = read_record(run)
    if record["entry"] != "demo":
        raise SpecgateError(f"{run} is a run of {record['entry']}: give the output folder of make demo")
    write_json(root / KEPT, trimmed(record))
    (root / IMAGES).mkdir(parents=True, exist_ok=True)
    for picture in shown(record):
        shutil.copyfile(run / picture, root / IMAGES / Path(picture).name)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m specgate.report.readme", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", nargs="?", type=Path, help="output folder of a demo to take numbers from")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    try:
        if options.run is not None:
            take_over(options.run)
        readme.write_text(render(readme.read_text(), read_record(ROOT / KEPT)))
    except SpecgateError as error:
        print(f"readme: {error}", file=sys.stderr)
        return 1
    print(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
