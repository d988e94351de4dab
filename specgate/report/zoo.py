"""All predictors side by side, several seeds each: one table and one picture per trace in docs/RESULTS.md.

    python -m specgate.report.zoo RUNS... --accuracy BENCHMARK --cost COST

``RUNS`` are folders of train.py runs (a sweep's, say) or ``.tar.gz`` archives of their metrics.json files,
``BENCHMARK`` a run of ``benchmark.py mode=accuracy`` (for the oracle, and for free predictors that nobody
ran with train.py), ``COST`` one of ``mode=cost``. What is needed of them is stored as
``results/zoo-<trace>.json`` beside the page; page and pictures are made from what is stored and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specgate.errors import SpecgateError
from specgate.report.cost_page import pareto
from specgate.report.dots import dot_plot
from specgate.report.record import describe_hardware
from specgate.report.runs import WITHIN, Group, Spread, all_horizons, group_runs, trace_name
from specgate.report.style import KIND_TITLES, ORACLE, horizon_name
from specgate.report.tables import Table
from specgate.report.zoo_store import KIND, store

REFERENCES = ("shadow",)
FROM = "router_lookahead"
HORIZONS = (1, 2, 3)
TRAINING_ONLY = tuple(
    f"model.{name}"
    for name in ("dropout", "block_dropout", "regress", "distill", "lr", "weight_decay", "warmup")
)
"""Settings of a predictor that a forecast costs nothing more by."""
CHEAP = 0.25
"""Share of a host layer's operations up to which a predictor counts as cheap."""
SECTIONS = ("free", "learned", "reference", ORACLE)


# ---------------------------------------------------------------------- reading


class Zoo:
    """One stored record, in groups.

    Attributes:
        groups: worst first within free, learned, reference, oracle.
        split: ``test`` if any run was scored on it, else ``validation``.
        left_out: folders of runs that were not scored on it.
        horizons: of targets within the token.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, runs = record, list(record["runs"])
        known = {run["predictor"] for run in runs}
        runs += [run for run in record["others"] if run["predictor"] not in known]
        tested = any("test" in run["scores"] for run in record["runs"])
        self.split = "test" if tested else "validation"
        self.left_out = [run["source"] for run in runs if self.split not in run["scores"]]
        runs = [run for run in runs if self.split in run["scores"]]
        groups = group_runs(runs)
        self.horizons = [h for h in all_horizons(groups) if h <= 3]
        names = [group.predictor for group in groups]
        for group in groups:
            if names.count(group.predictor) == 1:
                group.label = group.predictor
                run = group.runs[0]["settings"].get("model.experts_run")
                if group.predictor in REFERENCES and run:  # one of its forms alone must not pass for all
                    group.label += f" experts_run={run}"
        self.groups = sorted(groups, key=lambda g: (SECTIONS.index(section_of(g)), self.recall(g), g.label))
        self.name = trace_name(record)

    def score(
        self, group: Group, horizon: int, name: str = "recall_at_k", kind: str = WITHIN
    ) -> Spread | None:
        return group.score(self.split, kind, horizon, name)

    def mean(self, group: Group, name: str) -> Spread | None:
        """Mean over the horizons that there are, at most N+3, in each run."""
        for last in range(len(self.horizons), 0, -1):
            found = group.mean_score(self.split, WITHIN, self.horizons[:last], name)
            if found:
                return found
        return None

    def recall(self, group: Group) -> float:
        """What lines are ordered by."""
        spread = self.mean(group, "recall_at_k")
        return spread.mean if spread else 0.0

    def baseline(self) -> Group | None:
        """Where the gap begins: the target's router on today's hidden state, else the best free predictor."""
        free = [group for group in self.groups if section_of(group) == "free"]
        return next((group for group in free if group.predictor == FROM), free[-1] if free else None)

    def gap_closed(self, group: Group, horizon: int) -> Spread | None:
        """Share of the way from the baseline to the oracle at a horizon, in each run."""
        ends = (self.baseline(), next((g for g in self.groups if g.predictor == ORACLE), None))
        low, high = (None if end is None else self.score(end, horizon) for end in ends)
        if low is None or high is None or high.mean <= low.mean:
            return None
        values = [value for run in group.runs if (value := self.score(Group([run]), horizon)) is not None]
        return Spread.of([(value.mean - low.mean) / (high.mean - low.mean) for value in values])

    def cost(self, group: Group) -> Mapping[str, Any] | None:
        """The cost row of the predictor with these settings of its own, with the times of all such rows (of
        other machines); a row that tells no settings is taken for the only variant of its predictor."""
        settings = group.runs[0]["settings"]
        mine = {k: v for k, v in settings.items() if k.startswith("model.") and k not in TRAINING_ONLY}
        found: list[Mapping[str, Any]] = []
        for row in self.record["cost"]:
            if row["predictor"].split(" (")[0] == group.predictor:
                told = row.get("settings")
                alone = told is None and group.label == group.predictor
                if alone or (told is not None and all(told.get(k) == v for k, v in mine.items())):
                    found.append(row)
        if not found:
            return None
        times = {device: us for row in reversed(found) for device, us in (row["us"] or {}).items()}
        return {**found[0], "us": times}

    def unequal(self) -> list[str]:
        """Lines scored on another number of targets than most."""
        counts = {g.label: self.score(g, self.horizons[0], "n") for g in self.groups}
        means = {label: spread.mean for label, spread in counts.items() if spread}
        usual = max(means.values(), key=list(means.values()).count)
        return [f"{label} ({n:,.0f} instead of {usual:,.0f})" for label, n in means.items() if n != usual]


def section_of(group: Group) -> str:
    """``free``, ``learned``, ``reference`` or ``oracle``."""
    if group.predictor == ORACLE:
        return ORACLE
    if group.predictor in REFERENCES:
        return "reference"
    return "learned" if group.runs[0]["learned"] else "free"


# ---------------------------------------------------------------------- showing


def zoo_table(zoo: Zoo) -> Table:
    """The table of one trace; the best value of each column among free and learned predictors is bold."""
    devices = list(dict.fromkeys(d for row in zoo.record["cost"] for d in row["us"] or ()))
    columns: list[tuple[str, int, list[tuple[float | None, str]]]] = []  # title, sign of good, (value, text)

    def column(
        title: str, sign: int, values: Iterable[Spread | float | None], scale: float, digits: int
    ) -> None:
        cells: list[tuple[float | None, str]] = []
        for value in values:
            spread = Spread(float(value), None, 1) if isinstance(value, int | float) else value
            cells.append((None, "–") if spread is None else (spread.mean, spread.text(scale, digits)))
        if any(value is not None for value, _ in cells):
            columns.append((title, sign, cells))

    groups, costs = zoo.groups, [zoo.cost(group) for group in zoo.groups]
    for h in zoo.horizons:
        column(f"{horizon_name(h)} %", 1, [zoo.score(g, h) for g in groups], 100, 1)
    for h in zoo.horizons:
        column(f"closed {horizon_name(h)} %", 1, [zoo.gap_closed(g, h) for g in groups], 100, 1)
    column("ECE", -1, [zoo.mean(g, "ece") for g in groups], 1, 4)
    column("NLL", -1, [zoo.mean(g, "nll") for g in groups], 1, 4)
    column("k parameters", 0, [g.value("parameters") for g in groups], 1e-3, 1)
    column("FLOPs, % of host", 0, [row["share_of_host"] if row else None for row in costs], 100, 2)
    for device in devices:
        for size in ("1", "64"):
            times = [(row["us"] or {}).get(device, {}).get(size) if row else None for row in costs]
            column(f"µs {device}×{size}", 0, times, 1, 0)
    column("training s", 0, [g.value("training_seconds") for g in groups], 1, 0)

    table = Table(f"Predictors on {zoo.name}, {zoo.split} documents", ["predictor", "seeds"], left=1)
    table.columns += [title for title, _, _ in columns]
    rivals = [i for i, g in enumerate(groups) if section_of(g) in ("free", "learned")]
    for i, group in enumerate(groups):
        seeds = {run["seed"] for run in group.runs} - {None}
        row = [f"{group.label} ({section_of(group)})", str(len(seeds)) if seeds else "–"]
        for _, sign, cells in columns:
            value, text = cells[i]
            best = max((sign * v for j in rivals if (v := cells[j][0]) is not None), default=None)
            bold = sign != 0 and i in rivals and value is not None and sign * value == best
            row.append(f"**{text}**" if bold else text)
        table.rows.append(row)
    table.notes = _notes(zoo)
    return table


def _notes(zoo: Zoo) -> list[str]:
    told = any(zoo.gap_closed(group, h) for group in zoo.groups for h in zoo.horizons)
    start = zoo.baseline() if told else None
    notes = [
        "recall@K of targets within the token; ± is the standard deviation over seeds; bold is the best of "
        "free and learned predictors. ECE and NLL: mean over the same horizons."
    ]
    if start is not None:
        notes.append(
            f"closed: share of the gap between the recall of {start.label} and the oracle's that is closed."
        )
    if any(section_of(group) == "reference" for group in zoo.groups):
        notes.append("reference: runs layers of the host itself, an upper reference and no prefetcher.")
    places: dict[str, list[str]] = {}
    for row in zoo.record["cost"]:
        devices = places.setdefault(row["hardware"], [])
        devices += [device for device in row["us"] or () if device not in devices]
    notes += [
        f"µs {' and '.join(devices)}: one call at run time for 1 or 64 sequences, {place}."
        for place, devices in places.items()
    ]
    if zoo.baseline() is None:
        notes.append("The free predictors and the oracle have not been scored on this text yet.")
    if zoo.left_out:
        notes.append(f"Left out for want of {zoo.split} scores: {', '.join(sorted(set(zoo.left_out)))}.")
    if unequal := zoo.unequal():
        notes.append(f"Scored on another number of targets: {'; '.join(unequal)}.")
    return notes


def kinds_table(zoo: Zoo) -> Table | None:
    """recall@K of targets that are not within the token: before the first layer, and in the next token."""
    found = [
        (kind, h)
        for kind in KIND_TITLES
        if kind != WITHIN
        for h in all_horizons(zoo.groups, kind)
        if h <= 3 and any(zoo.score(g, h, kind=kind) for g in zoo.groups)
    ]
    if not found:
        return None
    columns = [f"{KIND_TITLES[kind]}, {horizon_name(h)} %" for kind, h in found]
    table = Table(f"Other targets on {zoo.name}: recall@K", ["predictor", *columns])
    for group in zoo.groups:
        cells = [zoo.score(group, h, kind=kind) for kind, h in found]
        table.rows.append([group.label, *["–" if c is None else c.text(100, 1) for c in cells]])
    return table


def section(name: str, record: Mapping[str, Any]) -> list[str]:
    """The Markdown of one trace."""
    zoo, runs = Zoo(record), record["runs"]
    states = [run["git"] for run in runs if run["git"]]
    commits = sorted({git["commit"][:12] + " with changes" * git["dirty"] for git in states})
    places = list(dict.fromkeys(describe_hardware(run["hardware"]) for run in runs))
    hours = sum(run["wall_seconds"] for run in runs) / 3600
    lines = [
        f"## {name}",
        "",
        f"- {len(runs)} runs of train.py, {hours:.1f} hours in all; code: {', '.join(commits)}",
    ]
    lines += [f"- hardware: {place}" for place in places]
    lines += [f"- first command: `{runs[0]['command']}`"]
    lines += [f"- header sha256 {', '.join(digest[:16] for digest in record['trace']['sha256'])}", ""]
    for table in (zoo_table(zoo), kinds_table(zoo)):
        if table is not None:
            lines += [f"**{table.title}**", "", table.to_markdown(), ""]
    lines += [f"![{zoo.name}: recall of every predictor](images/{name}.png)", ""]
    if priced(zoo):
        lines += [f"![{zoo.name}: recall against cost](images/{name}-cost.png)", ""]
    return lines


def draw(record: Mapping[str, Any], path: Path) -> Path:
    """The picture of one trace: recall@K per horizon with error bars, best predictor on top."""
    zoo = Zoo(record)
    lines = [
        (g.label, {h: s for h in zoo.horizons if (s := zoo.score(g, h))}, section_of(g))
        for g in sorted(zoo.groups, key=lambda g: (-zoo.recall(g), g.label))
        if g.predictor != ORACLE
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = dot_plot([(f"{zoo.name}, {zoo.split} documents", lines)], "recall@K, targets within the token")
    drawn.savefig(path, metadata={"Software": None})
    return path


def summary(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The Markdown that all traces share: who comes first on each, and first among the cheap."""
    table = Table(
        "The best on every trace", ["trace", "predictor", *(f"{horizon_name(h)} %" for h in HORIZONS)], left=2
    )
    table.columns += [*(f"closed {horizon_name(h)} %" for h in HORIZONS), "FLOPs, % of host"]
    for name in sorted(name for name, record in records.items() if is_zoo(record)):
        zoo = Zoo(records[name])
        first = next((g for g in reversed(zoo.groups) if section_of(g) == "learned"), None)
        cheap = [g for g in zoo.groups if section_of(g) == "learned" and _share(zoo, g) <= CHEAP]
        rows = [_summary_row(zoo, group) for group in (first, *cheap[-1:]) if group is not None]
        table.rows += rows[:1] if rows[1:] == rows[:1] else rows
    if not table.rows:
        return []
    table.notes = [
        "The learned predictor with the highest recall@K (mean of N+1 to N+3), and the one among those that "
        f"cost at most {100 * CHEAP:.0f} % of the operations of a layer of the host; ± is the standard "
        f"deviation over seeds. closed: share of the gap between {FROM} (without hidden states the best free "
        "predictor) and the oracle. Everyone's numbers are below."
    ]
    return ["## The best on every trace", "", table.to_markdown(), ""]


def _share(zoo: Zoo, group: Group) -> float:
    """What a forecast costs, as a share of the host's layer; infinite if nobody has measured it."""
    row = zoo.cost(group)
    share = None if row is None else row["share_of_host"]
    return float("inf") if share is None else float(share)


def _summary_row(zoo: Zoo, group: Group) -> list[str]:
    spreads = [zoo.score(group, h) for h in HORIZONS] + [zoo.gap_closed(group, h) for h in HORIZONS]
    share = _share(zoo, group)
    cells = ["–" if spread is None else spread.text(100, 1) for spread in spreads]
    return [zoo.name, group.label, *cells, f"{100 * share:.2f}" if share < float("inf") else "–"]


def priced(zoo: Zoo) -> list[dict[str, Any]]:
    """Rows of recall and cost, as ``cost_page.pareto`` takes them, of every group that has both."""
    rows = []
    for group in zoo.groups:
        row, name = zoo.cost(group), {"predictor": group.label, "trace": zoo.name}
        recalls = {f"recall_n{h}": s.mean for h in zoo.horizons if (s := zoo.score(group, h))}
        if row and recalls:
            times = {f"us_{device}_{b}": t for device, us in row["us"].items() for b, t in us.items()}
            about = {key: zoo.record["trace"][key] for key in ("stack", "phase")}
            rows.append({**row, **about, **name, **recalls, **times})
    return rows


def draw_costs(record: Mapping[str, Any], path: Path) -> Path | None:
    """Recall against time and operations; None if no cost is known."""
    zoo = Zoo(record)
    rows = priced(zoo)
    drawn = pareto(rows, zoo.name) if rows else None
    if drawn is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Software": None})
    return path


def draw_all(records: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """The pictures of all zoo records, as ``folder/<name>.png``."""
    found = []
    for name, record in sorted(records.items()):
        if is_zoo(record):
            costs = draw_costs(record, folder / f"{name}-cost.png")
            found += [draw(record, folder / f"{name}.png"), *([costs] if costs else [])]
    return found


def is_zoo(record: Mapping[str, Any]) -> bool:
    """Whether a stored record is one of these."""
    return record.get("kind") == KIND


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from specgate.report.results import make

    parser = argparse.ArgumentParser(
        prog="python -m specgate.report.zoo", description="Store many runs and write docs/RESULTS.md anew."
    )
    parser.add_argument("runs", nargs="+", help="folders of train.py runs, or .tar.gz of metrics.json files")
    parser.add_argument("--accuracy", nargs="*", default=[], help="runs of benchmark.py mode=accuracy")
    parser.add_argument("--cost", nargs="*", default=[], help="runs of benchmark.py mode=cost")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/RESULTS.md"), help="the page (docs/RESULTS.md)"
    )
    options = parser.parse_args(arguments)
    try:
        for path in store(options.out.parent / "results", options.runs, options.accuracy, options.cost):
            print(path)
        print(make(options.out))
    except SpecgateError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
