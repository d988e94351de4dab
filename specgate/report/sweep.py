"""A sweep ends with one ranked table and one picture over its runs; by hand:
``python -m specgate.report.sweep outputs/multirun/2026-01-01/12-00-00``.

``sweep.json``, ``sweep.md`` and ``sweep.png`` go into the sweep's folder. Runs that differ only in their seed
are one line, mean ± standard deviation over the seeds; lines are ranked by recall@K on the validation split,
averaged over the horizons that all runs foresee. Jobs that failed or were interrupted are listed below.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.measure import Measurement

from specgate.errors import SpecgateError
from specgate.report.runs import (
    FILE_NAME,
    WITHIN,
    Group,
    all_horizons,
    by_trace,
    common_horizons,
    group_runs,
    read_runs,
    trace_name,
)

if TYPE_CHECKING:
    from specgate.report.tables import Table

JOB = "job.json"
SKIPPED = "SKIPPED"
_STATUS = {"FAILED": "failed", SKIPPED: "skipped"}
SPLITS = ("validation", "test")


class SweepReport(Callback):
    """Hydra's callback that reports on a sweep, however it ends.

    A job that fails leaves its reason in its folder. Hydra gives up on a sweep with a failed job and does not
    say so to callbacks, hence the report is made when the process ends, if it was not made before.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.process = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the sweep's folder."""
        self.folder, self.process = os.path.abspath(str(config.hydra.sweep.dir)), os.getpid()
        atexit.register(self.finish)

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """In the job's own process: how it ended."""
        status = job_return.status.name
        record = {"status": status}
        if status == "FAILED":
            error = job_return._return_value
            record["error"] = f"{type(error).__name__}: {error}"
        folder = Path(str(config.hydra.runtime.output_dir))
        if (folder / JOB).is_file() and status == "COMPLETED":
            return  # it said itself that it was passed over
        if folder.is_dir() and str(config.hydra.mode).endswith("MULTIRUN"):
            (folder / JOB).write_text(json.dumps(record) + "\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """All jobs returned."""
        self.finish()

    def finish(self) -> None:
        """Report once, in the process that started the sweep."""
        folder, self.folder = self.folder, None
        if folder is None or self.process != os.getpid() or not Path(folder).is_dir():
            return
        try:
            report(Path(folder), Console())
        except SpecgateError as error:
            print(error, file=sys.stderr)


def skip(folder: str, error: Exception) -> None:
    """Leave word in a job's folder that it was passed over, and why."""
    (Path(folder) / JOB).write_text(json.dumps({"status": SKIPPED, "error": str(error)}) + "\n")


def unfinished(folder: Path) -> list[dict[str, Any]]:
    """Jobs without a metrics.json: ``job``, ``overrides``, ``error`` and ``status`` (failed, skipped or
    interrupted)."""
    found = []
    for hydra in sorted(folder.rglob(".hydra")):
        job = hydra.parent
        if job == folder or (job / FILE_NAME).is_file():
            continue
        overrides = hydra / "overrides.yaml"
        ended = json.loads((job / JOB).read_text()) if (job / JOB).is_file() else {}
        found.append(
            {
                "job": job.relative_to(folder).as_posix(),
                "overrides": list(OmegaConf.load(overrides)) if overrides.is_file() else [],
                "status": _STATUS.get(str(ended.get("status")), "interrupted"),
                "error": ended.get("error"),
            }
        )
    return found


def report(folder: Path, console: Console) -> Path | None:
    """Write the three files of a sweep and print the table; the path of ``sweep.json`` comes last.

    Returns:
        That path, or None if nothing in the folder is a run of train.py.

    Raises:
        SpecgateError: if the folder does not exist or a metrics.json in it is damaged.
    """
    runs, left = read_runs([folder]), unfinished(folder)
    if not runs and not left:
        return None
    # Not at the top: every start of train.py imports this module, few end a sweep.
    from specgate.report.dots import dot_plot
    from specgate.report.record import write_json

    parts = [(trace_name(mine[0]), group_runs(mine)) for mine in by_trace(runs).values()]
    tables = [sweep_table(name, groups) for name, groups in parts]
    write_json(
        folder / "sweep.json",
        {
            "schema_version": 1,
            "groups": [entry for name, groups in parts for entry in _plain(name, groups)],
            "unfinished": left,
            "runs": runs,
        },
    )
    text = [f"**{table.title}**\n\n{table.to_markdown()}\n" for table in tables]
    text += [
        "\n".join([f"{len(left)} of {len(left) + len(runs)} jobs have no result:", "", *_lines(left)])
    ] * bool(left)
    (folder / "sweep.md").write_text("\n".join(text))
    if parts:
        drawn = dot_plot(
            [(name, _dots(groups)) for name, groups in parts], "recall@K on validation documents"
        )
        drawn.savefig(folder / "sweep.png", metadata={"Software": None})
    for table, (name, groups) in zip(tables, parts, strict=True):
        whole = table.to_rich()
        needed = Measurement.get(console, console.options.update_width(1000), whole).maximum
        console.print(whole if needed <= console.width else narrow_table(name, groups).to_rich())
    for line in _lines(left):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(str(folder / "sweep.json"), markup=False, highlight=False, soft_wrap=True)
    return folder / "sweep.json"


def _lines(left: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"- job {one['job']} {one['status']}: {' '.join(one['overrides'])}"
        + (f" ({one['error']})" if one["error"] else "")
        for one in left
    ]


def sweep_table(name: str, groups: Sequence[Group]) -> Table:
    """The ranked table of one trace."""
    from specgate.report.tables import Table

    common, horizons = common_horizons(groups), all_horizons(groups)
    tested = any(group.score("test", WITHIN, h, "recall_at_k") for group in groups for h in horizons)
    columns = ["#", "run", "seeds", "recall %", *[f"N+{h} %" for h in horizons], "ECE"]
    columns += [f"test N+{h} %" for h in horizons] if tested else []
    table = Table(f"Sweep on {name}, best first", [*columns, "parameters", "train s"], left=2)
    for rank, group in enumerate(groups, 1):
        pruned = sum(run["pruned"] is not None for run in group.runs)
        cells = [str(rank), group.label + (f" ({pruned} stopped early)" if pruned else "")]
        cells += [str(len(group.runs)), _text(group.recall, 100, 2)]
        cells += [_text(group.score("validation", WITHIN, h, "recall_at_k"), 100, 1) for h in horizons]
        cells.append(_text(group.mean_score("validation", WITHIN, common, "ece"), 1, 4))
        if tested:
            cells += [_text(group.score("test", WITHIN, h, "recall_at_k"), 100, 1) for h in horizons]
        parameters = group.runs[0]["parameters"]
        cells += [
            "–" if parameters is None else f"{parameters:,}",
            _text(group.value("training_seconds"), 1, 0),
        ]
        table.rows.append(cells)
    table.strong = {0}
    averaged = ", ".join(f"N+{h}" for h in common)
    table.notes = [
        f"Ranked by recall@K on the validation split, targets within the token, mean of {averaged}; "
        "± is the standard deviation over seeds."
    ]
    return table


def narrow_table(name: str, groups: Sequence[Group]) -> Table:
    """The same ranking for a terminal of 80 columns; ``sweep.md`` has every horizon."""
    from specgate.report.tables import Table

    common, full = common_horizons(groups), sweep_table(name, groups)
    table = Table(
        full.title, ["run", "seeds", "recall %", "test %", "ECE"], notes=full.notes, strong=full.strong
    )
    for group in groups:
        tested = group.mean_score("test", WITHIN, common, "recall_at_k")
        cells = [str(len(group.runs)), _text(group.recall, 100, 2), _text(tested, 100, 2)]
        table.rows.append(
            [group.label, *cells, _text(group.mean_score("validation", WITHIN, common, "ece"), 1, 4)]
        )
    return table


def _text(spread: Any, scale: float, digits: int) -> str:
    return "–" if spread is None else str(spread.text(scale, digits))


def _plain(name: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The ranking as JSON."""
    rows = []
    for rank, group in enumerate(groups, 1):
        scores = {}
        for split in SPLITS:
            of = {h: group.score(split, WITHIN, h, "recall_at_k") for h in all_horizons(groups)}
            scores[split] = {str(h): spread.plain() for h, spread in of.items() if spread}
        rows.append(
            {
                "rank": rank,
                "trace": name,
                "run": group.label,
                "seeds": group.seeds,
                "jobs": [run["source"] for run in group.runs],
                "pruned": [run["pruned"] for run in group.runs],
                "recall": group.recall.plain() if group.recall else None,
                "recall_at_k": scores,
            }
        )
    return rows


def _dots(groups: Sequence[Group]) -> list[tuple[str, dict[int, Any], str]]:
    of = all_horizons(groups)
    return [
        (g.label, {h: s for h in of if (s := g.score("validation", WITHIN, h, "recall_at_k"))}, "")
        for g in groups
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m specgate.report.sweep", description="Rank a sweep's runs."
    )
    parser.add_argument("folder", type=Path, help="the sweep's folder, with one folder per job")
    folder = parser.parse_args(arguments).folder
    try:
        if report(folder, Console()) is None:
            raise SpecgateError(f"{folder} holds no run of train.py: give the folder of a sweep")
    except SpecgateError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
