"""What docs/RESULTS.md keeps of many runs of train.py, benchmarks and costs: one JSON file per trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specgate.errors import SpecgateError
from specgate.report.record import SCHEMA_VERSION, describe_hardware, read_record, write_json
from specgate.report.runs import SCORES, Run, by_trace, read_runs, trace_key
from specgate.report.style import slug

KIND = "zoo"
_COST = (
    "settings",
    "predictor",
    "precision",
    "parameters",
    "bytes",
    "flops_per_token_layer",
    "share_of_host",
    "us",
)


def store(
    folder: Path,
    runs: Sequence[str | Path],
    accuracy: Sequence[str | Path] = (),
    cost: Sequence[str | Path] = (),
) -> list[Path]:
    """Write ``folder/zoo-<trace>.json`` for every trace that the runs were scored on.

    Raises:
        SpecgateError: if the runs cannot be read, or there are none.
    """
    found = read_runs(runs)
    if not found:
        raise SpecgateError(
            f"no run of train.py in {', '.join(map(str, runs))}: give folders or .tar.gz of runs"
        )
    scored, costs = [read_record(path) for path in accuracy], [read_record(path) for path in cost]
    paths = []
    for mine in by_trace(found).values():
        trace = min((run["trace"] for run in mine), key=lambda trace: len(trace["sha256"]))
        ids = "-ids" if trace.get("hidden_size") is None else ""
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "trace": trace,
            "runs": [
                {**run, "settings": few} for run, few in zip(mine, differing_settings(mine), strict=True)
            ],
            "others": [one for whole in scored for one in others(whole, trace)],
            "cost": [one for whole in costs for one in cost_rows(whole, trace)],
        }
        paths.append(
            folder / f"zoo-{slug('-'.join((trace['name'], trace['stack'], trace['phase'])))}{ids}.json"
        )
        write_json(paths[-1], record)
    return paths


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run's settings without those that all runs share (that were trained, where it is no setting of the
    predictor), so that groups stay the same."""
    every = sorted({key for run in runs for key in run["settings"]})

    def values(key: str) -> set[str]:
        own = key.startswith("model.")
        return {repr(run["settings"].get(key, "absent")) for run in runs if own or run["steps"]}

    kept = [key for key in every if len(values(key)) > 1]
    return [{key: run["settings"][key] for key in kept if key in run["settings"]} for run in runs]


def others(record: Mapping[str, Any], trace: Mapping[str, Any]) -> list[Run]:
    """The predictors of a benchmark on this trace, as runs of no seed."""
    same = [t for t in record["traces"] if is_trace(t, trace)]
    found: dict[str, Run] = {}
    for row in record["rows"]:
        if not any(row["trace"] == t["name"] for t in same):
            continue
        run = found.setdefault(
            row["predictor"],
            {
                "source": "benchmark",
                **{key: record[key] for key in ("command", "git", "hardware", "wall_seconds")},
                **dict.fromkeys(("training_seconds", "steps", "tokens_seen", "pruned", "parameters", "seed")),
                "predictor": row["predictor"],
                "learned": row["learned"],
                "settings": {},
                "trace": dict(trace),
                "scores": {},
            },
        )
        kinds = run["scores"].setdefault(row["split"], {}).setdefault(row["kind"], {})
        kinds[str(row["horizon"])] = {name: row[name] for name in SCORES if name in row}
    return list(found.values())


def cost_rows(record: Mapping[str, Any], trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What forecasts on traces like this one cost, by predictor."""
    names = {t["name"] for t in record["traces"] if is_stack(t, trace)}
    hardware = describe_hardware(record["hardware"])
    return [
        {**{key: row.get(key) for key in _COST}, "hardware": hardware}
        for row in record["rows"]
        if row["trace"] in names
    ]


def is_trace(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether what is scored on two traces can be compared."""
    return trace_key({"trace": one}) == trace_key({"trace": other})


def is_stack(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two traces are of the same stack and phase of one host, whatever the text: forecasts on them
    cost the same."""

    def key(trace: Mapping[str, Any]) -> tuple[Any, ...]:
        hosts = tuple(dict.fromkeys(trace.get("revision") or trace["sha256"]))
        return trace["stack"], trace["phase"], trace.get("hidden_size") is None, hosts

    return key(one) == key(other)
