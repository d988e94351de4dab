"""Tables of results, built once from rows and shown in a terminal (rich), in Markdown or in HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import rich.table

from specgate.report.style import (
    FOOTNOTES,
    KIND_NOTES,
    KIND_TITLES,
    Row,
    best_free,
    horizon_name,
    kinds_of,
    main_predictor,
    ranked,
    select,
    trace_title,
    traces_of,
)

MARKS = "†‡§¶"


@dataclass
class Table:
    """Text in rows and columns; ``sections`` are indices of rows that start a group, ``strong`` those to
    stress.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)
    strong: set[int] = field(default_factory=set)
    left: int = 1  # so many leading columns hold words, the others numbers

    def to_rich(self) -> rich.table.Table:
        """For the terminal."""
        table = rich.table.Table(title=self.title, caption="\n".join(self.notes), caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.left else "right", no_wrap=i >= self.left)
        for i, row in enumerate(self.rows):
            if i in self.sections and i:
                table.add_section()
            table.add_row(*row, style="bold" if i in self.strong else None)
        return table

    def to_markdown(self) -> str:
        """A Markdown table with its notes below."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---" if i < self.left else "---:" for i in range(len(self.columns))]
        lines = [line(self.columns), line(rule)]
        for i, row in enumerate(self.rows):
            lines.append(line([f"**{cell}**" if i in self.strong and cell else cell for cell in row]))
        if self.notes:
            lines += ["", *[f"{note}  " for note in self.notes]]
        return "\n".join(lines)

    def to_html(self) -> str:
        """An HTML ``<figure>`` with a caption and the notes."""

        def cells(tag: str, row: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{'' if i < self.left else ' class=n'}>{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(row)
            )

        body = []
        for i, row in enumerate(self.rows):
            classes = [
                name for name, those in (("section", self.sections), ("strong", self.strong)) if i in those
            ]
            body.append(f'<tr class="{" ".join(classes)}">{cells("td", row)}</tr>')
        notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<figure class=table><figcaption>{html.escape(self.title)}</figcaption><div class=scroll><table>"
            f"<thead><tr>{cells('th', self.columns)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
            f"{notes}</figure>"
        )


def number(value: float | None, digits: int = 3) -> str:
    """A number of fixed width, a dash for "undefined"."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent with one decimal, a dash for "undefined"."""
    return "–" if value is None else f"{100 * value:.1f}"


def _per_horizon(rows: Sequence[Row], column: str, show: Callable[[float | None], str]) -> str:
    return " / ".join(show(row[column]) for row in sorted(rows, key=lambda row: row["horizon"]))


def _marks(rows: Sequence[Row]) -> tuple[dict[str, str], list[str]]:
    """Footnote marks of predictors whose row needs an explanation, and the footnotes."""
    marks: dict[str, str] = {}
    texts: dict[str, str] = {}
    for name in ranked(rows):
        if name in FOOTNOTES and any(row["phase"] == "prefill" for row in select(rows, predictor=name)):
            mark = texts.setdefault(FOOTNOTES[name], MARKS[len(texts)])
            marks[name] = f" {mark}"
    return marks, [f"{mark} {text}." for text, mark in texts.items()]


def _horizons(rows: Sequence[Row]) -> list[int]:
    return sorted({row["horizon"] for row in rows})


def _join(horizons: Sequence[int]) -> str:
    return " / ".join(horizon_name(h) for h in horizons)


def summary_table(rows: Sequence[Row]) -> Table:
    """recall@K and ECE of every predictor on every trace: one row per trace, kind of target and predictor."""
    horizons = _horizons(rows)
    table = Table(
        "recall@K in % and calibration error (ECE) after scaling, by MoE layers ahead",
        ["trace", "target", "predictor"]
        + [f"{horizon_name(h)} %" for h in horizons]
        + [f"ECE {horizon_name(h)}" for h in horizons],
        left=3,
    )
    marks, notes = _marks(rows)
    for trace in traces_of(rows):
        mine = select(rows, trace=trace)
        chance = percent(mine[0]["top_k"] / mine[0]["experts"])
        for i, kind in enumerate(kinds_of(mine)):
            table.sections.add(len(table.rows))
            title = "" if i else trace_title(mine[0])
            blank = [""] * len(horizons)
            table.rows.append([title, KIND_TITLES[kind], "chance (K/E)", *[chance] * len(horizons), *blank])
            of_kind = select(mine, kind=kind)
            for name in ranked(of_kind):
                of = {row["horizon"]: row for row in select(of_kind, predictor=name)}
                if name == main_predictor(mine):
                    table.strong.add(len(table.rows))
                table.rows.append(
                    ["", "", name + marks.get(name, "")]
                    + [percent(of[h]["recall_at_k"]) if h in of else "–" for h in horizons]
                    + [number(of[h]["ece"]) if h in of else "–" for h in horizons]
                )
    table.notes = [
        "recall@K: share of the K experts used that are among the K most probable. The oracle knows them.",
        *[KIND_NOTES[kind] for kind in kinds_of(rows)],
        *notes,
    ]
    return table


def accuracy_table(rows: Sequence[Row]) -> rich.table.Table:
    """The summary for a terminal of 80 columns: a block of rows per trace and kind of target."""
    summary = summary_table(rows)
    horizons = _horizons(rows)
    names = [cell for h in horizons for cell in (f"{horizon_name(h)} %", "ECE")]
    table = Table(summary.title, ["predictor", *names], notes=summary.notes)
    trace = ""
    for i, (title, target, name, *cells) in enumerate(summary.rows):
        trace = title or trace
        if i in summary.sections:
            table.sections.add(len(table.rows))
            table.rows.append([f"{trace}: {target}", *[""] * len(names)])
        if i in summary.strong:
            table.strong.add(len(table.rows))
        pairs = zip(cells[: len(horizons)], cells[len(horizons) :], strict=True)
        table.rows.append([f"  {name}", *[cell for pair in pairs for cell in pair]])
    return table.to_rich()


def detail_table(rows: Sequence[Row], trace: str) -> Table:
    """Every score of every predictor on one trace; one row per kind of target and predictor."""
    mine = select(rows, trace=trace)
    columns: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "recall@K %": ("recall_at_k", percent),
        "recall@2K %": ("recall_at_2k", percent),
        "exact set %": ("exact_set", percent),
        "top-1 %": ("top1", percent),
        "precision at p ≥ ½ %": ("precision_at_half", percent),
        "ECE": ("ece", number),
        "Brier": ("brier", number),
        "NLL": ("nll", number),
    }
    table = Table(
        f"{trace_title(mine[0])}: scores at {_join(_horizons(mine))}",
        ["target", "predictor", *columns],
        left=2,
    )
    marks, notes = _marks(mine)
    for kind in kinds_of(mine):
        of_kind = select(mine, kind=kind)
        table.sections.add(len(table.rows))
        for i, name in enumerate(ranked(of_kind)):
            scores = select(of_kind, predictor=name)
            if name == main_predictor(mine):
                table.strong.add(len(table.rows))
            cells = [_per_horizon(scores, column, show) for column, show in columns.values()]
            table.rows.append(["" if i else KIND_TITLES[kind], name + marks.get(name, ""), *cells])
    nll = "−ln p of the used expert" if mine[0]["top_k"] == 1 else "mean binary log loss over the experts"
    table.notes = [
        *[KIND_NOTES[kind] for kind in kinds_of(mine)],
        f"ECE: 20 equal bins over all experts' probabilities. NLL: {nll}. –: no expert reaches p ≥ ½.",
        *notes,
    ]
    return table


def calibration_table(rows: Sequence[Row], trace: str) -> Table:
    """Calibration error, confidence and accuracy per horizon of one trace's main predictor, before and
    after.
    """
    mine = select(rows, trace=trace)
    name = main_predictor(mine)
    table = Table(
        f"{trace_title(mine[0])}: confidence and accuracy of {name} over the horizons",
        [
            "target",
            "horizon",
            "accuracy %",
            "confidence %",
            "before scaling %",
            "ECE",
            "before scaling",
            "NLL",
            "before",
        ],
        left=2,
    )
    for kind in kinds_of(mine):
        table.sections.add(len(table.rows))
        for i, row in enumerate(
            sorted(select(mine, predictor=name, kind=kind), key=lambda row: row["horizon"])
        ):
            table.rows.append(
                [
                    "" if i else KIND_TITLES[kind],
                    horizon_name(row["horizon"]),
                    percent(row["mean_accuracy"]),
                    percent(row["mean_confidence"]),
                    percent(row["mean_confidence_uncalibrated"]),
                    number(row["ece"], 4),
                    number(row["ece_uncalibrated"], 4),
                    number(row["nll"]),
                    number(row["nll_uncalibrated"]),
                ]
            )
    table.notes = [
        "Confidence: mean probability of the K experts predicted; accuracy: the share of them that is used."
    ]
    return table


def domain_table(rows: Sequence[Row], trace: str, limit: int = 20) -> Table:
    """recall@K per domain at the nearest horizon: the main predictor, the best free one, the oracle's 100
    left out.
    """
    mine = select(rows, trace=trace)
    kind = kinds_of(mine)[0]
    mine = select(mine, kind=kind)
    names = list(dict.fromkeys([n for n in (best_free(mine), main_predictor(mine)) if n]))
    horizons = _horizons(mine)  # a shallow stack has fewer within the token
    table = Table(
        f"{trace_title(mine[0])}: recall@K (%) per domain, {KIND_TITLES[kind]}",
        ["domain", "events at N+1", *[f"{name} {horizon_name(h)}" for name in names for h in horizons]],
    )
    of = {(row["predictor"], row["horizon"]): row["per_domain"] for row in mine}
    counts = {domain: score["n"] for domain, score in of[names[-1], horizons[0]].items()}
    shown = sorted(counts, key=lambda domain: (-counts[domain], domain))[:limit]
    for domain in sorted(shown):
        cells = [of[name, h].get(domain, {}).get("recall_at_k") for name in names for h in horizons]
        table.rows.append([domain, f"{counts[domain]:,}", *map(percent, cells)])
    if len(counts) > limit:
        table.notes = [f"The {limit} largest of {len(counts)} domains."]
    return table


def trace_table(traces: Sequence[Mapping[str, Any]], load: Mapping[str, Mapping[str, Any]]) -> Table:
    """What was traced: host, shape, size of the splits, how evenly its experts are used."""
    table = Table(
        "What was traced",
        [
            "trace",
            "model",
            "stack, phase",
            "MoE layers",
            "experts",
            "per token",
            "tokens train / validation / test",
            "documents",
            "domains",
            "load entropy",
            "busiest ¼ takes",
        ],
        left=3,
    )
    for trace in traces:
        skew = load.get(trace["name"])
        entropy = "–" if skew is None else number(sum(skew["entropy"]) / len(skew["entropy"]))
        hot = "–" if skew is None else f"{percent(sum(skew['hot_quarter']) / len(skew['hot_quarter']))} %"
        table.rows.append(
            [
                trace["name"],
                ", ".join(dict.fromkeys(trace["model"])),
                f"{trace['stack']}, {trace['phase']}",
                str(trace["layers"]),
                str(trace["experts"]),
                str(trace["top_k"]),
                " / ".join(f"{trace['tokens'][split]:,}" for split in ("train", "validation", "test")),
                " / ".join(f"{trace['documents'][split]:,}" for split in ("train", "validation", "test")),
                str(len(trace["domains"])),
                entropy,
                hot,
            ]
        )
    table.notes = [
        "Load entropy: 1 if all experts of a layer are used equally often. Busiest ¼: share of all uses that "
        "falls on the busiest quarter of a layer's experts (25 % if even). Test split, mean over layers."
    ]
    return table
