"""The simulator against a replay: ``python -m specgate.report.validate RUN --script FILE --hardware FILE``.

Every row of one or more runs of benchmark.py mode=replay is simulated on the same documents, with the same
warm-up and the same decisions, twice: with costs from a measured profile alone, and with the time of an event
and the speed of the link from the run's own rows. Rows that cannot be simulated are listed with the reason.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.errors import BudgetError, ConfigError, SpecgateError
from specgate.policy.costs import Costs
from specgate.policy.hardware import Hardware, local
from specgate.report.record import Run, read_record
from specgate.report.replay_script import load_script
from specgate.report.replay_shape import ModelShape, check_trace
from specgate.report.validate_costs import (
    all_hits_row,
    costs_by_profile,
    costs_by_rows,
    is_all_hits,
    profile_costs,
)
from specgate.report.validate_handover import HandOvers
from specgate.report.validate_page import publish_validation
from specgate.report.validate_rules import RowCase, RowCases, check_same, settings_of
from specgate.runtime.simulator import simulate

Row = Mapping[str, Any]
WITHIN = 0.10
"""Relative error that is aimed at."""


@dataclass(frozen=True)
class Predicted:
    """A simulated row, per token of the measured documents.

    Attributes:
        tokens_per_second, hit_rate, late_rate: as in a replay's row.
        demand_bytes, prefetch_bytes: over the link. stall_share: of the time.
    """

    tokens_per_second: float
    hit_rate: float
    late_rate: float
    demand_bytes: float
    prefetch_bytes: float
    stall_share: float


def predict(case: RowCase, costs: Costs) -> Predicted:
    """Simulates a row.

    Raises:
        BudgetError: an event needs more than the slots.
    """
    work = case.workload
    warm = range(work.layers * work.experts) if case.warm else ()
    result = simulate(work, costs, case.rules, case.slots, case.host_slots, warm=warm)

    def total(name: str) -> float:
        return float(result.of_documents(name)[case.warmup :].sum())

    tokens, seconds = float(result.tokens_D[case.warmup :].sum()), total("total_ns") * 1e-9
    asked = sum(total(name) for name in ("hits", "late", "host_hits", "misses", "low_hits"))
    return Predicted(
        tokens_per_second=tokens / seconds,
        hit_rate=total("hits") / asked,
        late_rate=total("late") / asked,
        demand_bytes=total("demand_bytes") / tokens,
        prefetch_bytes=total("prefetch_bytes") / tokens,
        stall_share=total("stall_ns") * 1e-9 / seconds,
    )


def compare(row: Row, by_profile: Predicted, by_rows: Predicted | None, fitted: bool) -> dict[str, Any]:
    """A row of the result: what was measured, what was predicted, predicted over measured."""
    measured = float(row["tokens_per_second"])
    names = ("hit_rate", "late_rate", "demand_bytes", "prefetch_bytes", "stall_share")
    out: dict[str, Any] = {
        "variant": row["variant"],
        "residency": row["residency"],
        "slots": row["slots"],
        "budgeted": row["budgeted"],
        "all_hits": fitted,
        "measured": measured,
        "measured_low": float(row["tokens_per_second_low"]),
        "measured_high": float(row["tokens_per_second_high"]),
        **{f"measured_{name}": row[name] for name in names},
    }
    for way, found in (("profile", by_profile), ("rows", by_rows)):
        out[f"by_{way}"] = None if found is None else found.tokens_per_second
        out[f"ratio_{way}"] = None if found is None else found.tokens_per_second / measured
        out |= {f"{way}_{name}": None if found is None else getattr(found, name) for name in names}
    return out


def summary_of(rows: Sequence[Row], way: str) -> dict[str, Any] | None:
    """Errors of one way of predicting; rows that a prediction was made from are not counted."""
    counted = [r for r in rows if r[f"ratio_{way}"] is not None and not (way == "rows" and r["all_hits"])]
    if not counted:
        return None
    errors = [abs(r[f"ratio_{way}"] - 1) for r in counted]
    worst = max(range(len(counted)), key=errors.__getitem__)
    return {
        "rows": len(counted),
        "within": sum(e <= WITHIN for e in errors),
        "worst": errors[worst],
        "worst_row": f"{counted[worst]['variant']} at {100 * counted[worst]['residency']:g} %",
        "mean": sum(errors) / len(errors),
        "order": order_kept(counted, way),
    }


def order_kept(rows: Sequence[Row], way: str) -> float | None:
    """Of the pairs of variants at one budget that were measured clearly apart (low to high), how many the
    prediction puts in the same order.
    """
    kept = pairs = 0
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            if a["residency"] != b["residency"]:
                continue
            fast, slow = (a, b) if a["measured"] > b["measured"] else (b, a)
            if fast["measured_low"] > slow["measured_high"]:
                pairs += 1
                kept += fast[f"by_{way}"] > slow[f"by_{way}"]
    return kept / pairs if pairs else None


def validate(
    records: Sequence[Mapping[str, Any]],
    script_file: Path,
    hardware: Hardware,
    handover_us: float | None = None,
) -> dict[str, Any]:
    """What metrics.json holds besides its origin.

    Args:
        records: of replays of one shape with one script.
        handover_us: the host's time to hand over forecasts; None: see
            :class:`specgate.report.validate_handover.HandOvers`.

    Raises:
        SpecgateError: for what does not belong together.
    """
    for record in records:
        if record.get("mode") != "replay":
            raise ConfigError(
                f"A run of {record['entry']} is no replay; give runs of benchmark.py mode=replay."
            )
    all_settings = [settings_of(record) for record in records]
    check_same(all_settings)
    settings, first = all_settings[0], records[0]
    if any(
        r["shape"] != first["shape"] or r["replay"]["device"] != first["replay"]["device"] for r in records
    ):
        raise ConfigError(
            "The runs replayed several shapes, or on several devices; validate them one by one."
        )
    shape = ModelShape(
        **{k: v for k, v in first["config"]["shape"].items() if k in ("name", "config", "dtype")}
    )
    script = load_script(script_file)
    made = script.identity
    check_trace(shape, script.trace, made["layers"], made["experts"], made["top_k"])
    if any(trace["sha256"] != made["sha256"] for r in records for trace in r["traces"]):
        raise ConfigError(
            f"{script_file} is of another trace than the run; name the script that it replayed."
        )
    script = script.part(settings.warmup + settings.documents, settings.tokens)
    device = str(first["replay"]["device"])
    parts = profile_costs(shape, settings, device, bool(first["replay"].get("graphs")))
    cases, blocks = RowCases(settings, script, shape.experts), shape.layers * shape.experts
    handovers = HandOvers(settings, script, shape, first["hardware"], handover_us)
    if (event := handovers.event(device)) is not None:
        parts = (replace(parts[0], event_us=event["us"]), *parts[1:])
    rows, skipped = [], []
    for number, record in enumerate(records):
        for row in record["rows"]:
            case = cases.of(row)
            if isinstance(case, str):
                skipped.append({"variant": row["variant"], "residency": row["residency"], "reason": case})
                continue
            handover = handovers.of(row)
            costs = costs_by_profile(parts, hardware, case.workload, handover["us"] if handover else 0.0)
            own = all_hits_row(row, record["rows"], blocks) is not None
            try:
                by_rows = costs_by_rows(costs, row, record["rows"], blocks, shape.layers) if own else None
                compared = compare(
                    row,
                    predict(case, costs),
                    None if by_rows is None else predict(case, by_rows),
                    is_all_hits(row, blocks),
                )
            except BudgetError as error:
                reason = str(error).rstrip(".")
                skipped.append({"variant": row["variant"], "residency": row["residency"], "reason": reason})
                continue
            rows.append({"trace": row["trace"], "run": number, **compared, "handover": handover})
    if not rows:
        raise ConfigError("None of the rows can be simulated; replay lru, lfru, priced or oracle too.")
    return {
        "mode": "validate",
        "traces": [dict(made)],
        "shape": first["shape"],
        "replay": first["replay"],
        "replayed_on": first["hardware"],
        "profile": {k: v for k, v in hardware.describe().items() if k != "readings"},
        "handover": handovers.how,
        "event": event,
        "rows": rows,
        "summary": {way: summary_of(rows, way) for way in ("profile", "rows")},
        "skipped": skipped,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m specgate.report.validate", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders (or metrics.json) of mode=replay")
    parser.add_argument("--script", type=Path, required=True, help="that they replayed (replay.script=)")
    parser.add_argument("--hardware", type=Path, help="measured profile of the machine (hardware=local)")
    parser.add_argument(
        "--handover-us",
        type=float,
        help="host's time to hand over forecasts; else read, on the replay's machine",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/validate"), help="folder of the result")
    options = parser.parse_args(arguments)
    words = shlex.join(["python", "-m", "specgate.report.validate", *(arguments or sys.argv[1:])])
    config = {
        name: [str(v) for v in value] if isinstance(value, list) else str(value)
        for name, value in vars(options).items()
    }
    log = Run("validate.py", config)
    try:
        runs, profile = [read_record(run) for run in options.runs], local(options.hardware)
        found = validate(runs, options.script, profile, options.handover_us)
        path = log.write(options.out, command=words, **found)
    except SpecgateError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, soft_wrap=True)
        return 1
    publish_validation(
        read_record(path), options.out, Console() if sys.stdout.isatty() else Console(width=132)
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
