"""What an ensemble's uncertainty is worth, as tables, pictures and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from specgate.report.canvas import horizon_ticks, line_of, panels, tidy
from specgate.report.html import plain_page
from specgate.report.style import KIND_TITLES, Row, horizon_name, kinds_of, select, traces_of
from specgate.report.tables import Table, number, percent

INTRODUCTION = (
    "Several predictors that differ only in their random start (or in their class) foresee the same routing. "
    "The doubt that all of them have is aleatoric: more training does not remove it. Where they disagree, "
    "the doubt is epistemic: they are outside of what they were trained on. Total = aleatoric + epistemic, "
    "in nats."
)
TOGETHER = "ensemble"
HOME, AWAY, PLAIN = "#332288", "#CC6677", "#9aa0a8"
PARTS = {"epistemic": "-", "total": "--", "aleatoric": ":"}
BY = {"total": "total uncertainty", "epistemic": "epistemic uncertainty", "low_confidence": "1 − confidence"}
Show = Callable[[float | None], str]
CAPTIONS = {
    "nll": "Negative log-likelihood of each member (thin) and of the ensemble (thick), less that of the best "
    "member at the same horizon: below 0 the ensemble beats all of its members.",
    "domains": "Mean uncertainty per forecast by kind of text, one MoE layer ahead; right, the epistemic "
    "part alone on its own scale. Blue: the domain that members were trained on. Red: shifted.",
    "histogram": "Sequences by their mean epistemic uncertainty: what a runtime would look at to notice that "
    "text has changed. Bars that do not overlap are told apart without error.",
    "auroc": "Area under the ROC curve (0.5 is guessing, 1 without error). Left: telling shifted text from "
    "text in domain, from one token or one sequence. Right: telling forecasts that miss an expert from "
    "those that do not.",
}


def fine(value: float | None) -> str:
    """Four decimals: ensembles gain little."""
    return number(value, 4)


def shown_horizons(rows: Sequence[Row]) -> list[int]:
    """All horizons, or of more than three the nearest, the middle and the farthest."""
    found = sorted({row["horizon"] for row in rows})
    return found if len(found) <= 3 else [found[0], found[len(found) // 2], found[-1]]


def at(horizons: Sequence[int]) -> str:
    """at N+1 / N+2 / N+3"""
    return "at " + " / ".join(map(horizon_name, horizons))


def joined(rows: Sequence[Row], column: str, horizons: Sequence[int], show: Show) -> str:
    """One cell with a number per horizon."""
    of = {row["horizon"]: row for row in rows}
    return " / ".join(show(of[h][column]) if h in of else "–" for h in horizons)


def score_table(record: Mapping[str, Any]) -> Table:
    """Scores of the ensemble beside each member's, per trace and kind of target."""
    scores = record["scores"]
    horizons = shown_horizons(scores)
    show: dict[str, tuple[str, Show]] = {
        "NLL": ("nll", fine),
        "recall@K %": ("recall_at_k", percent),
        "ECE": ("ece", number),
    }
    title = f"The ensemble and its members {at(horizons)}"
    table = Table(title, ["trace", "target", "predictor", *show], left=3)
    for trace in traces_of(scores):
        for k, kind in enumerate(kinds_of(select(scores, trace=trace))):
            mine = select(scores, trace=trace, kind=kind)
            table.sections.add(len(table.rows))
            for i, name in enumerate(dict.fromkeys(row["predictor"] for row in mine)):
                if name == TOGETHER:
                    table.strong.add(len(table.rows))
                scored = select(mine, predictor=name)
                cells = [joined(scored, column, horizons, f) for column, f in show.values()]
                first = ["" if i or k else trace, "" if i else KIND_TITLES[kind]]
                table.rows.append([*first, name, *cells])
    nll = "−ln p of the used expert" if scores[0]["top_k"] == 1 else "mean binary log loss over the experts"
    table.notes = [f"Calibrated forecasts. NLL: {nll}.", *gain_notes(record)]
    return table


def gain_notes(record: Mapping[str, Any]) -> list[str]:
    """Where the ensemble's NLL lies below its best member's, counted."""
    notes = []
    for trace in traces_of(record["scores"]):
        pairs = list(best_and_together(record, trace).values())
        below = sum(mine < best for best, mine in pairs)
        notes.append(
            f"{trace}: the ensemble's NLL is below its best member's in {below} of {len(pairs)} pairs of"
            " target and horizon."
        )
    return notes


def best_and_together(record: Mapping[str, Any], trace: str) -> dict[tuple[str, int], tuple[float, float]]:
    """(NLL of the best member, of the ensemble) by kind and horizon."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    mine = select(record["scores"], trace=trace)
    for row in select(mine, predictor=TOGETHER):
        place = {"kind": row["kind"], "horizon": row["horizon"]}
        members = [other["nll"] for other in select(mine, **place) if other["predictor"] != TOGETHER]
        found[row["kind"], row["horizon"]] = (min(members), row["nll"])
    return found


def doubt_table(record: Mapping[str, Any]) -> Table:
    """Mean uncertainty by trace and domain of text."""
    kind = kinds_of(record["rows"])[0]
    mine = select(record["rows"], kind=kind)
    horizons, parts = shown_horizons(mine), ("aleatoric", "epistemic")
    title = f"Mean uncertainty per forecast in nats, {KIND_TITLES[kind]}, {at(horizons)}"
    table = Table(title, ["trace", "text", "forecasts at N+1", *parts], left=2)
    for trace in traces_of(mine):
        of_trace = select(mine, trace=trace)
        table.sections.add(len(table.rows))
        table.strong.add(len(table.rows))
        for i, domain in enumerate(dict.fromkeys(row["domain"] for row in of_trace)):
            of = select(of_trace, domain=domain)
            count = joined(of, "n", horizons[:1], lambda n: f"{n:,}")
            cells = [joined(of, part, horizons, fine) for part in parts]
            table.rows.append(["" if i else trace, domain, count, *cells])
    return table


def shift_table(record: Mapping[str, Any]) -> Table:
    """AUROC of telling shifted from in-domain text, by trace and domain of text."""
    kind = kinds_of(record["shift"])[0]
    mine = select(record["shift"], kind=kind)
    horizons = shown_horizons(mine)
    shown = [(level, part) for level in ("sequence", "token") for part in ("epistemic", "total")]
    title = f"AUROC: shifted against in domain, {KIND_TITLES[kind]}, {at(horizons)}"
    columns = [f"{part}, per {level}" for level, part in shown]
    table = Table(title, ["trace", "text", *columns], left=2)
    for trace in dict.fromkeys(row["trace"] for row in mine):
        of_trace = select(mine, trace=trace)
        table.sections.add(len(table.rows))
        table.strong.add(len(table.rows))
        for i, domain in enumerate(dict.fromkeys(row["domain"] for row in of_trace)):
            of = select(of_trace, domain=domain)
            cells = [
                joined(select(of, level=level), f"auroc_{part}", horizons, number) for level, part in shown
            ]
            table.rows.append(["" if i else trace, domain, *cells])
    table.notes = [f"Each against all text of {record['home']}. 0.5: guessing; 1: told apart without error."]
    return table


def error_table(record: Mapping[str, Any]) -> Table:
    """AUROC of finding the forecasts that miss."""
    rows = record["errors"]
    table = Table(
        "AUROC: forecasts that miss an expert against those that do not",
        ["trace", "target", "horizon", "missed %", *BY.values()],
        left=3,
    )
    for trace in traces_of(rows):
        table.sections.add(len(table.rows))
        for i, row in enumerate(select(rows, trace=trace)):
            cells = [percent(row["missed"]), *[number(row[f"auroc_{name}"]) for name in BY]]
            first = ["" if i else trace, KIND_TITLES[row["kind"]], horizon_name(row["horizon"])]
            table.rows.append([*first, *cells])
    table.notes = ["Missed: the K most probable experts are not exactly the K used."]
    return table


# ------------------------------------------------------------------ pictures


def nll_picture(record: Mapping[str, Any]) -> Figure:
    """NLL over the horizons, less the best member's: a column per trace, a row per kind of target."""
    scores = record["scores"]
    traces, kinds = traces_of(scores), kinds_of(scores)
    drawn, axes = panels(4.2 * len(traces) + 0.6, 3.0 * len(kinds), len(kinds), len(traces))
    for i, kind in enumerate(kinds):
        for j, trace in enumerate(traces):
            panel, mine = axes[i, j], select(scores, trace=trace, kind=kind)
            if not mine:
                panel.set_axis_off()
                continue
            best = best_and_together(record, trace)
            panel.axhline(0, color="#555555", linestyle=":", linewidth=1)
            for name in dict.fromkeys(row["predictor"] for row in mine):
                strong = name == TOGETHER
                horizons, values = line_of(select(mine, predictor=name), "nll")
                panel.plot(
                    horizons,
                    [value - best[kind, h][0] for h, value in zip(horizons, values, strict=True)],
                    color=(HOME if trace == record["home"] else AWAY) if strong else PLAIN,
                    linewidth=2.4 if strong else 1.0,
                    marker="o" if strong else ".",
                    zorder=3 if strong else 2,
                    label="ensemble" if strong else "members",
                )
            horizon_ticks(panel, sorted({row["horizon"] for row in mine}))
            panel.set_title(f"{trace}: {KIND_TITLES[kind]}", fontsize=9)
            tidy(panel)
            _legend_once(panel)
        axes[i, 0].set_ylabel("NLL above the best member's")
    return drawn


def domain_picture(record: Mapping[str, Any]) -> Figure:
    """Bars per domain of text: aleatoric and epistemic stacked; epistemic alone."""
    kind = kinds_of(record["rows"])[0]
    rows = select(record["rows"], kind=kind, horizon=1)
    shown = [row for trace in traces_of(rows) for row in select(rows, trace=trace)]
    names = [row["domain"] if row["domain"] != "all" else f"all of {row['trace']}" for row in shown]
    drawn, axes = panels(10.5, 0.27 * len(shown) + 1.3, 1, 2, sharey=True)
    colors = [AWAY if row["shifted"] else HOME for row in shown]
    aleatoric, epistemic = ([row[part] for row in shown] for part in ("aleatoric", "epistemic"))
    place = list(range(len(shown)))[::-1]
    axes[0, 0].barh(place, aleatoric, color=colors, alpha=0.35, label="aleatoric")
    axes[0, 0].barh(place, epistemic, left=aleatoric, color=colors, label="epistemic")
    axes[0, 1].barh(place, epistemic, color=colors)
    axes[0, 0].set_yticks(place, names, fontsize=8)
    for label, row in zip(axes[0, 0].get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if row["domain"] == "all" else "normal")
    for panel, title in zip(axes[0], ("aleatoric (pale) + epistemic", "epistemic alone"), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("nats per forecast, N+1")
        tidy(panel, "x")
    return drawn


def histogram_picture(record: Mapping[str, Any]) -> Figure:
    """Sequences by their epistemic uncertainty, a panel per horizon."""
    kind = kinds_of(record["histograms"])[0]
    rows = select(record["histograms"], kind=kind)
    horizons = sorted({row["horizon"] for row in rows})
    drawn, axes = panels(3.6 * len(horizons) + 0.5, 3.2, 1, len(horizons))
    others = [trace for trace in traces_of(rows) if trace != record["home"]]
    for panel, h in zip(axes[0], horizons, strict=True):
        for row in select(rows, horizon=h):
            width = row["top"] / len(row["share"])
            edges = [width * i for i in range(len(row["share"]))]
            home = row["trace"] == record["home"]
            hatch = None if home or others.index(row["trace"]) == 0 else "///"
            panel.bar(
                edges,
                row["share"],
                width=width,
                align="edge",
                color=HOME if home else AWAY,
                alpha=0.55,
                hatch=hatch,
                label=row["trace"],
            )
        panel.set_title(horizon_name(h), fontsize=10)
        panel.set_xlabel("mean epistemic uncertainty, nats")
        tidy(panel, "y")
    axes[0, 0].set_ylabel("share of sequences")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return drawn


def auroc_picture(record: Mapping[str, Any]) -> Figure:
    """Areas under the ROC curve over the horizons: shift, per shifted trace, and errors in domain."""
    shift = select(record["shift"], domain="all")
    kind = kinds_of(record["errors"])[0]
    traces = list(dict.fromkeys(row["trace"] for row in shift))
    drawn, axes = panels(4.6 * (len(traces) + 1), 3.8, 1, len(traces) + 1, sharey=True)
    for panel, trace in zip(axes[0], traces, strict=False):
        for level, color in (("sequence", "#882255"), ("token", "#44AA99")):
            mine = select(shift, trace=trace, level=level, kind=kind)
            for part, line in PARTS.items():
                shown = [row for row in mine if row[f"auroc_{part}"] is not None]
                if shown:
                    panel.plot(
                        *line_of(shown, f"auroc_{part}"),
                        color=color,
                        linestyle=line,
                        marker="o",
                        label=f"{part}, per {level}",
                    )
        panel.set_title(f"{trace} against {record['home']}", fontsize=10)
    errors = select(record["errors"], trace=record["home"], kind=kind)
    for name, color in zip(BY, (HOME, AWAY, "#117733"), strict=True):
        shown = [row for row in errors if row[f"auroc_{name}"] is not None]
        if shown:
            axes[0, -1].plot(*line_of(shown, f"auroc_{name}"), color=color, marker="s", label=BY[name])
    axes[0, -1].set_title(f"misses on {record['home']}", fontsize=10)
    for panel in axes[0]:
        panel.axhline(0.5, color="#555555", linestyle=":", linewidth=1)
        horizon_ticks(panel, sorted({row["horizon"] for row in select(record["errors"], kind=kind)}))
        panel.set_ylim(bottom=min(0.4, panel.get_ylim()[0]), top=1.02)
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
        tidy(panel)
    axes[0, 0].set_ylabel("area under the ROC curve")
    return drawn


def _legend_once(panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    panel.legend(once.values(), once.keys(), frameon=False, fontsize=8)


def is_uncertainty(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of mode=uncertainty."""
    return record.get("mode") == "uncertainty"


def slim_uncertainty(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the repository keeps of a record: no histograms."""
    return {key: record[key] for key in ("home", "ensemble", "rows", "scores", "errors", "shift")}


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table, most important first."""
    shift = [shift_table(record)] if record["shift"] else []
    return [score_table(record), doubt_table(record), *shift, error_table(record)]


def uncertainty_section(record: Mapping[str, Any]) -> list[str]:
    """Lines of docs/RESULTS.md."""
    one = record["ensemble"]
    intro = f"An ensemble ({one['combine']}) of {', '.join(one['members'])}."
    tables = [f"**{table.title}**\n\n{table.to_markdown()}\n" for table in tables_of(record)]
    return [intro, "", *tables]


def publish_uncertainty(record: Mapping[str, Any], directory: Path, console: Console | None) -> Path:
    """Write ``plots/*.png``, ``tables.md`` and ``report.html``; print the tables. Returns the page's path."""
    tables = tables_of(record)
    drawn = {"nll": nll_picture(record), "domains": domain_picture(record)}
    drawn["histogram"] = histogram_picture(record)
    drawn["auroc"] = auroc_picture(record)
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    pictures = []
    for name, figure in drawn.items():
        path = directory / "plots" / f"uncertainty-{name}.png"
        figure.savefig(path, metadata={"Software": None})
        pictures.append((path, CAPTIONS[name]))
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    page = directory / "report.html"
    title = "What is an ensemble's doubt worth?"
    page.write_text(plain_page(record, title, INTRODUCTION, tables, pictures), encoding="utf-8")
    if console is not None:
        for table in tables:
            console.print(table.to_rich())
    return page
