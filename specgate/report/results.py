"""docs/RESULTS.md, made from metrics.json files: ``python -m specgate.report.results outputs/... --out
docs/RESULTS.md``.

Each given run is stored, without its curves, as ``results/<name>.json`` beside the page; the page is then
made from everything stored there and nothing else, so that anyone can make it again and get the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specgate.errors import SpecgateError
from specgate.report import zoo
from specgate.report.calibration_page import calibration_section, is_calibration, slim_calibration
from specgate.report.file_tier_page import file_tier_section, is_file_tier, slim_file_tier
from specgate.report.live_page import is_live, live_section, slim_live
from specgate.report.quantized_page import is_quantized, quantized_section, slim_quantized
from specgate.report.record import describe_hardware, read_record, write_json
from specgate.report.replay_page import is_replay, replay_section, slim_replay
from specgate.report.running import is_running, running_section, slim_running
from specgate.report.simulate_page import (
    draw_simulations,
    is_simulation,
    simulation_pictures,
    simulation_section,
    slim_simulation,
)
from specgate.report.simulator_page import (
    is_simulator_speed,
    simulator_speed_section,
    slim_simulator_speed,
)
from specgate.report.speculation_page import is_speculation, slim_speculation, speculation_section
from specgate.report.store_paths_page import is_store_paths, slim_store_paths, store_paths_section
from specgate.report.style import scored_rows, slug, traces_of
from specgate.report.tables import calibration_table, detail_table, summary_table, trace_table
from specgate.report.uncertainty_page import is_uncertainty, slim_uncertainty, uncertainty_section
from specgate.report.validate_page import (
    draw_validations,
    is_validation,
    slim_validation,
    validation_section,
)
from specgate.report.verdict import verdict

DROPPED = ("thresholds", "reliability", "reliability_uncalibrated", "per_layer")
KEPT = (
    "schema_version",
    "entry",
    "mode",
    "command",
    "started",
    "wall_seconds",
    "git",
    "hardware",
    "versions",
    "split",
    "traces",
    "rows",
    "calibration",
    "load",
    "skipped",
)
HEAD = """# Results

Made by `python -m specgate.report.results`; do not edit. Every number comes from the JSON files in
[`results/`](results/), each the metrics.json of one run. All documents scored are from locked test splits
unless a heading says otherwise; probabilities were scaled on validation documents.
"""


Record = Mapping[str, Any]
OTHERS: tuple[
    tuple[Callable[[Record], bool], Callable[[Record], dict[str, Any]], Callable[[Record], list[str]]], ...
] = (
    (is_running, slim_running, running_section),
    (is_calibration, slim_calibration, calibration_section),
    (is_uncertainty, slim_uncertainty, uncertainty_section),
    (is_quantized, slim_quantized, quantized_section),
    (is_replay, slim_replay, replay_section),
    (is_simulation, slim_simulation, simulation_section),
    (is_validation, slim_validation, validation_section),
    (is_live, slim_live, live_section),
    (is_simulator_speed, slim_simulator_speed, simulator_speed_section),
    (is_store_paths, slim_store_paths, store_paths_section),
    (is_speculation, slim_speculation, speculation_section),
    (is_file_tier, slim_file_tier, file_tier_section),
)
"""Records that are no scores of predictors: how to tell one, what to keep of it, its section."""


def slim(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of a record: no curves, no per-layer columns, no configuration with local
    paths.
    """
    kept = {key: record[key] for key in KEPT if key in record}
    for is_it, slimmed, _ in OTHERS:
        if is_it(record):
            return kept | slimmed(record)
    kept["rows"] = [{k: v for k, v in row.items() if k not in DROPPED} for row in scored_rows(record)]
    if "load" in kept:
        kept["load"] = {
            name: {k: v for k, v in load.items() if k != "share"} for name, load in kept["load"].items()
        }
    return kept


def default_name(record: Mapping[str, Any]) -> str:
    """A file name that says what ran: ``benchmark-accuracy-switch_ref_encoder``."""
    named = "stacks" in record or is_live(record)
    subject = [record["model"]] if named else traces_of(record.get("rows", []))
    words = [Path(record["entry"]).stem, record.get("mode", ""), *subject]
    return slug("-".join(word for word in words if word))


def store(run: str | Path, folder: Path, name: str | None = None) -> Path:
    """Keep a run's record, slimmed, in ``folder`` and return the file.

    Raises:
        SpecgateError: if the run has no metrics.json or that has no rows.
    """
    record = read_record(run)
    if not (record.get("rows") or any(is_it(record) for is_it, _, _ in OTHERS)):
        raise SpecgateError(
            f"{run} measured no accuracy (no rows): give a run of benchmark.py mode=accuracy, of collect.py "
            "or of benchmarks.recorder_overhead"
        )
    path = folder / f"{name or default_name(record)}.json"
    write_json(path, slim(record))
    return path


def markdown(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from slim records by name (in their names' order)."""
    parts = [HEAD, *zoo.summary(records)]
    for name in sorted(records):
        parts += _section(name, records[name])
    if not records:
        parts.append("Nothing is stored yet.\n")
    return "\n".join(parts)


def _section(name: str, record: Mapping[str, Any]) -> list[str]:
    if zoo.is_zoo(record):
        return zoo.section(name, record)
    for is_it, _, section in OTHERS:
        if is_it(record):
            picture = simulation_pictures(name, record)
            return [f"## {name}", "", *_origin(record), "", *section(record), *picture, ""]
    rows, load = scored_rows(record), record.get("load", {})
    split = record.get("split", "test")
    parts = [f"## {name}" + ("" if split == "test" else f" ({split} split)"), "", *_origin(record), ""]
    if record.get("traces"):
        parts += [_titled(trace_table(record["traces"], load)), ""]
    parts += [_titled(summary_table(rows)), ""]
    for trace in traces_of(rows):
        parts += [f"### {name}: {trace}", "", " ".join(verdict(rows, trace, load.get(trace))), ""]
        parts += [_titled(detail_table(rows, trace)), "", _titled(calibration_table(rows, trace)), ""]
    for left in record.get("skipped", []):
        parts.append(f"- {left['predictor']} was left out of {left['trace']}: {left['reason']}.")
    return [*parts, ""]


def _titled(table: Any) -> str:
    return f"**{table.title}**\n\n{table.to_markdown()}"


def _origin(record: Mapping[str, Any]) -> list[str]:
    git = record.get("git")
    commit = (
        "outside a repository"
        if git is None
        else git["commit"][:12] + (" with changes" if git["dirty"] else "")
    )
    lines = [
        f"- command: `{record['command']}`",
        f"- hardware: {describe_hardware(record['hardware'])}; {record['wall_seconds']:.0f} s",
        f"- code: {commit}; " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()),
    ]
    for trace in record.get("traces", []):
        digests = ", ".join(digest[:16] for digest in trace["sha256"])
        lines.append(f"- trace `{trace['name']}`: header sha256 {digests}")
    return lines


def make(out: Path, runs: Sequence[str] = (), name: str | None = None) -> Path:
    """Store ``runs`` beside ``out`` and write the page.

    Raises:
        SpecgateError: if a run cannot be read, or ``name`` is given for more than one run.
    """
    if name is not None and len(runs) != 1:
        raise SpecgateError(f"--name {name} is for one run, not {len(runs)}: give one run at a time")
    folder = out.parent / "results"
    for run in runs:
        store(run, folder, name)
    records = {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(records), encoding="utf-8")
    zoo.draw_all(records, out.parent / "images")
    draw_validations(records, out.parent / "images")
    draw_simulations(records, out.parent / "images")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m specgate.report.results", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "runs", nargs="*", help="output directories or metrics.json files to add (none: make it again)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/RESULTS.md"), help="the page (docs/RESULTS.md)"
    )
    parser.add_argument("--name", help="name of the section and its file, for a single run")
    options = parser.parse_args(arguments)
    try:
        print(make(options.out, options.runs, options.name))
    except SpecgateError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
