"""Tables, page and docs/RESULTS.md section of benchmark.py mode=calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from specgate.report.calibration_plots import draw_calibration
from specgate.report.html import plain_page
from specgate.report.style import KIND_TITLES, Row, horizon_name, kinds_of, select, trace_title
from specgate.report.tables import Table, number, percent

INTRODUCTION = (
    "A runtime that weighs bytes against the chance that an expert is used needs honest probabilities: of "
    "all experts given 30 %, 30 % must be used. This page shows how honest they are after each calibrator, "
    "fitted on validation documents and judged on documents that nothing was fitted on; how large prefetch "
    "sets with guaranteed coverage are; how trust falls with the horizon; and what all this is worth on text "
    "of other domains, and whether a monitor that only sees the routing notices."
)
CAPTIONS = {
    "reliability": "Honest probabilities lie on the diagonal. One line per calibrator.",
    "domains": "Calibration error per domain, in domain (left) and on other text of the same host. The "
    "lines are the error on all in-domain documents and three times that. DRIFT: the monitor raised an "
    "alarm.",
    "coverage": "Measured against nominal coverage of conformal prefetch sets, with 95 % intervals from "
    "resampled documents; right, what it costs in experts fetched.",
    "decay": "Accuracy and confidence over the horizons with the law that fits best.",
}
NAMES = ("trace", "predictor")


def subjects(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(trace, predictor) pairs in the order of the rows."""
    return list(dict.fromkeys((row["trace"], row["predictor"]) for row in record["rows"]))


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table of a record, predictor by predictor."""
    tables = []
    for trace, predictor in subjects(record):
        own = {"trace": trace, "predictor": predictor}
        tables.append(calibrator_table(select(record["rows"], **own)))
        tables.append(coverage_table(select(record["conformal"], **own)))
        if record["budget"]:
            tables.append(budget_table(select(record["budget"], **own)))
        if any("fit" in row for row in record["decay"]):
            tables.append(decay_table(select(record["decay"], **own)))
        tables.append(drift_table(select(record["drift"], **own)[0], select(record["shift"], **own)))
    return tables


def calibrator_table(rows: Sequence[Row]) -> Table:
    """ECE, classwise ECE, Brier and NLL per calibrator, kind and horizon."""
    horizons = sorted({row["horizon"] for row in rows})
    columns = {"ECE": ("ece", 4), "classwise": ("ece_classwise", 4), "Brier": ("brier", 4), "NLL": ("nll", 4)}
    table = Table(
        f"{trace_title(rows[0])}: {rows[0]['predictor']} after each calibrator, at "
        + " / ".join(map(horizon_name, horizons)),
        ["target", "calibrator", *columns],
        left=2,
    )
    for kind in kinds_of(rows):
        table.sections.add(len(table.rows))
        for i, name in enumerate(dict.fromkeys(row["calibrator"] for row in rows)):
            mine = sorted(select(rows, kind=kind, calibrator=name), key=lambda row: row["horizon"])
            cells = [" / ".join(number(row[key], digits) for row in mine) for key, digits in columns.values()]
            table.rows.append(["" if i else KIND_TITLES[kind], name, *cells])
    table.notes = [
        "ECE: 20 equal bins over all experts' probabilities. Classwise: of each expert of each layer by "
        "itself, averaged; its few cells per bin alone make it larger than zero."
    ]
    return table


def coverage_table(rows: Sequence[Row]) -> Table:
    """Coverage and size of conformal sets per mode, kind, horizon and level."""
    levels = sorted({row["level"] for row in rows})
    table = Table(
        f"{trace_title(rows[0])}: conformal prefetch sets of {rows[0]['predictor']}, coverage in % "
        "[95 % interval over documents] and experts per set",
        ["covered", "target", "horizon", *[f"{level:.0%} nominal" for level in levels]],
        left=3,
    )
    for mode in dict.fromkeys(row["mode"] for row in rows):
        title = "all K used experts" if mode == "all" else "each used expert"
        table.sections.add(len(table.rows))
        for kind in kinds_of(rows):
            for horizon in sorted({row["horizon"] for row in select(rows, kind=kind, mode=mode)}):
                cells = []
                for level in levels:
                    (row,) = select(rows, mode=mode, kind=kind, horizon=horizon, level=level)
                    low, high = percent(row["low"]), percent(row["high"])
                    cells.append(f"{percent(row['coverage'])} [{low}, {high}], {row['mean_size']:.1f}")
                table.rows.append([title, KIND_TITLES[kind], horizon_name(horizon), *cells])
                title = ""
    table.notes = [
        f"{coverage_said(rows)} All: P(all K used experts are in the set); each: expected share of them that "
        "is."
    ]
    return table


def coverage_said(rows: Sequence[Row]) -> str:
    """How far coverage is from nominal, and how much of that is which documents were drawn."""
    worst = max(rows, key=lambda row: abs(row["gap"]))
    text = (
        f"Conformal sets cover within {100 * abs(worst['gap']):.2f} points of nominal on "
        f"{worst['documents']} documents"
    )
    if "gap_low" in worst:
        low, high = 100 * worst["gap_low"], 100 * worst["gap_high"]
        text += (
            f" (the largest gap is {100 * worst['gap']:+.2f}, 95 % interval [{low:+.2f}, {high:+.2f}] when "
            f"these and the {worst['fit_documents']} documents fitted on are both drawn anew"
        )
        if all("same_mix" in row for row in rows):
            mixed = max(abs(row["same_mix"] - row["level"]) for row in rows)
            text += f"; with every domain as frequent as among those, within {100 * mixed:.2f}"
        text += ")"
    return text + "."


def budget_table(rows: Sequence[Row]) -> Table:
    """Coverage under byte budgets, within the token."""
    horizons = sorted({row["horizon"] for row in rows})
    table = Table(
        f"{trace_title(rows[0])}: sets under a byte budget, same token: coverage in % (promised by the "
        "calibration data) and experts fetched, by horizon",
        ["covered", "budget, experts", "filled up", *map(horizon_name, horizons)],
        left=1,
    )
    for mode in dict.fromkeys(row["mode"] for row in rows):
        table.sections.add(len(table.rows))
        for budget in sorted({row["budget"] for row in rows}):
            for fill in (False, True):
                found = {r["horizon"]: r for r in select(rows, mode=mode, budget=budget, fill=fill)}
                cells = [
                    f"{percent(found[h]['coverage'])} ({percent(found[h]['promised'])}), "
                    f"{found[h]['mean_size']:.1f}"
                    for h in horizons
                ]
                table.rows.append([mode, str(budget), "yes" if fill else "no", *cells])
    table.notes = ["No set is ever larger than its budget. Filled up: with the next most probable experts."]
    return table


def decay_table(entries: Sequence[Row]) -> Table:
    """Half-lives and goodness of fit of accuracy and confidence."""
    table = Table(
        f"{trace_title(entries[0])}: how trust in {entries[0]['predictor']} falls with the horizon",
        ["target", "of", "N+1 %", "half-life, layers", "R²", "best law", "R² of it", "RMSE, points"],
        left=2,
    )
    for entry in entries:
        for i, (column, fit) in enumerate(entry.get("fit", {}).items()):
            plain, best = fit["laws"]["exponential"], fit["laws"][fit["best"]]
            half = plain["half_life"]
            table.rows.append(
                [
                    "" if i else KIND_TITLES[entry["kind"]],
                    column,
                    percent(entry[column][0]),
                    "over 1000" if half is None else f"{half:.1f}",
                    number(plain["r2"]),
                    fit["best"],
                    number(best["r2"]),
                    f"{100 * best['rmse']:.2f}",
                ]
            )
    table.notes = [
        "Half-life: layers further ahead until half of what the forecast knows beyond guessing is left, if "
        "it falls exponentially towards guessing (K/E)."
    ]
    return table


def drift_table(drift: Row, shifted: Sequence[Row]) -> Table:
    """Per domain: error, ratio to in-domain, and what the monitor said."""
    alarms = drift["false_alarms"]
    table = Table(
        f"{trace_title(drift)}: {drift['predictor']} per domain, and what the drift monitor says",
        [
            "text",
            "domain",
            "ECE",
            "of noise",
            "of in-domain",
            "recall@K N+1 %",
            "drift",
            "after tokens",
            "statistic",
        ],
        left=2,
    )
    for text, domains in [("in domain", drift["in_domain"]), *[(s["shift"], s["domains"]) for s in shifted]]:
        table.sections.add(len(table.rows))
        for i, found in enumerate(sorted(domains, key=lambda found: found["domain"])):
            report = found["monitor"]
            table.rows.append(
                [
                    "" if i else text,
                    found["domain"],
                    number(found["ece"], 4),
                    number(found["ece_noise"], 4),
                    "–" if found["ratio"] is None else f"{found['ratio']:.1f} ×",
                    percent(found["errors"][0]["recall_at_k"]),
                    "DRIFT" if report["drifted"] else "–",
                    f"{report['alarm_at']:,}" if report["drifted"] else f"none in {report['tokens']:,}",
                    f"{report['peak']:.1f}",
                ]
            )
            if report["drifted"]:
                table.strong.add(len(table.rows) - 1)
    settings = drift["settings"]
    short = ""
    if "rate_beginnings" in alarms:
        short = f", of the first {settings['half']} tokens of each {alarms['rate_beginnings']:.1%}"
    table.notes = [
        f"The monitor's threshold is {drift['threshold']:.1f}, for false alarms in "
        f"{settings['alarm_rate']:.0%} of streams of {settings['stream']:,} in-domain tokens (from "
        f"{drift['documents']} validation documents); on the scored documents {alarms['rate']:.1%} of "
        f"{alarms['streams']} such streams raised one{short}. In-domain rows are streams of one domain "
        "alone, which it was not made to pass. Of noise: the error that honest probabilities would show on "
        "so few events."
    ]
    return table


def verdict(record: Mapping[str, Any]) -> list[str]:
    """The record in sentences made of nothing but its numbers, one predictor at a time."""
    text = []
    for trace, predictor in subjects(record):
        own = {"trace": trace, "predictor": predictor}
        rows = select(record["rows"], **own, calibrator=record["main"])
        worst = max(rows, key=lambda row: row["ece"])
        (drift,) = select(record["drift"], **own)
        line = (
            f"{trace}, {predictor}: after calibration ({record['main']}) the calibration error is at most "
            f"{worst['ece']:.4f} (at {horizon_name(worst['horizon'])}, {KIND_TITLES[worst['kind']]}). "
            f"{coverage_said(select(record['conformal'], **own))} "
            f"{drift['false_alarms']['rate']:.1%} of in-domain streams of {drift['settings']['stream']:,} "
            "tokens raise a drift alarm."
        )
        for shift in select(record["shift"], **own):
            tripled = [found for found in shift["domains"] if (found["ratio"] or 0) >= 3]
            flagged = [found for found in tripled if found["monitor"]["drifted"]]
            line += (
                f" On {shift['shift']} the error at least triples in {len(tripled)} of "
                f"{len(shift['domains'])} domains; the monitor flags {len(flagged)} of these."
            )
        text.append(line)
    return text


def calibration_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of one record for docs/RESULTS.md, without heading and origin."""
    parts = [f"- {line}" for line in verdict(record)]
    for table in tables_of(record):
        parts += ["", f"**{table.title}**", "", table.to_markdown()]
    return parts


def is_calibration(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of mode=calibration."""
    return record.get("mode") == "calibration"


def slim_calibration(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of a record: no curves."""
    kept = {key: record[key] for key in ("main", "conformal", "budget", "shift", "drift") if key in record}
    dropped = ("reliability", "per_domain")
    return kept | {
        "rows": [{k: v for k, v in row.items() if k not in dropped} for row in record["rows"]],
        "decay": record["decay"],
    }


def publish_calibration(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write ``plots/*.png``, ``tables.md`` and ``report.html`` and print the tables; returns the page's
    path.
    """
    tables = tables_of(record)
    pictures = [
        (path, f"{trace}, {predictor}. {CAPTIONS[name]}")
        for trace, predictor in subjects(record)
        for name, path in draw_calibration(record, trace, predictor, directory / "plots").items()
    ]
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    if console is not None:
        for table in tables:
            console.print(table.to_rich())
        for line in verdict(record):
            console.print(line, highlight=False)
    page = directory / "report.html"
    introduction = " ".join([INTRODUCTION, *verdict(record)])
    page.write_text(
        plain_page(record, "How honest are the probabilities?", introduction, tables, pictures),
        encoding="utf-8",
    )
    return page
