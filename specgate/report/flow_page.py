"""Pictures, tables and the page of ``mode=transitions``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from safetensors.numpy import load_file

from specgate.report.canvas import horizon_color, panels, tidy
from specgate.report.html import plain_page
from specgate.report.sankey import chosen, flow_plot
from specgate.report.style import horizon_name, slug
from specgate.report.tables import Table, number, percent, trace_table

Array = np.ndarray[Any, Any]
SHOWN = 15
"""Paths of a ranking in a table; metrics.json holds them all."""
INTRODUCTION = (
    "Which experts follow which: counted over the training documents, before anything is predicted. A "
    "transition matrix says how often an expert of a later MoE layer is used by the tokens that used an "
    "expert of this one; a flow is a path through several layers that many tokens take. Lift compares with "
    "layers that choose independently of one another: 1 is chance."
)
CAPTIONS = {
    "matrices": "Lift of using the target expert (column) given the source expert (row), from one MoE layer "
    "to the next; red is more than its popularity, blue less. Columns are ordered by the source that raises "
    "them most, since an expert's number means nothing across layers.",
    "information": "Left: how much of the target layer's choice one expert of the source layer tells (mutual "
    "information over entropy; of K experts one is drawn at random, so K > 1 tells less per expert). Right: "
    "how few paths half of all tokens take.",
    "flows": "Flows of each token's heaviest expert. Grey: transitions, the darker the further above chance. "
    "In colour: the strongest mined paths that share no step, drawn at least 0.4 % high to be seen.",
}


def matrix_plot(arrays: Mapping[str, Array], title: str, most: int = 6) -> Figure:
    """Lift of N+1 transitions between up to ``most`` pairs of neighbouring layers, log colours."""
    within_L = np.nonzero(arrays["kind_LH"][:, 0] == 0)[0]
    sources = within_L[np.unique(np.linspace(0, len(within_L) - 1, most).round().astype(int))]
    columns = min(3, len(sources))
    rows = -(-len(sources) // columns)
    drawn, axes = panels(3.5 * columns + 1.1, 3.5 * rows + 0.7, rows, columns)
    drawn.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    image: Any = None
    for panel, layer in zip(axes.flat, sources, strict=False):
        with np.errstate(divide="ignore"):
            log_EE = np.log2(np.nan_to_num(arrays["lift_LHEE"][layer, 0], nan=1.0))
        order = np.lexsort((-log_EE.max(0), log_EE.argmax(0)))
        norm = TwoSlopeNorm(0.0, -3.0, 3.0)
        image = panel.imshow(log_EE[:, order].clip(-3, 3), cmap="RdBu_r", norm=norm, interpolation="nearest")
        panel.set_title(f"layer {layer} → {layer + 1}", fontsize=10)
        panel.set_ylabel(f"source expert, layer {layer}", fontsize=8)
        panel.set_xlabel("target expert", fontsize=8)
        step = 1 if len(order) <= 12 else 2 if len(order) <= 32 else 8
        places = range(0, len(order), step)
        panel.set_xticks(places, [str(order[i]) for i in places], rotation=90 if step > 1 else 0)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(length=2, labelsize=6)
    for panel in axes.flat[len(sources) :]:
        panel.set_axis_off()
    bar = drawn.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["⅛", "¼", "½", "1", "2", "4", "8"])
    bar.set_label("lift over the target's popularity")
    drawn.suptitle(title, fontsize=11)
    return drawn


def information_plot(pairs: Sequence[Mapping[str, Any]], flows: Mapping[str, Any], title: str) -> Figure:
    """Information share per source layer and horizon; number of paths that half of the tokens take."""
    heaviest = flows.get("heaviest")
    drawn, axes = panels(9.6 if heaviest else 6.4, 3.9, 1, 2 if heaviest else 1)
    horizons = sorted({row["horizon"] for row in pairs})
    for horizon in horizons:
        color = horizon_color(horizon, horizons)
        for kind, line, marker in (("within", "-", "o"), ("wrapped", ":", "D")):
            mine = [row for row in pairs if row["horizon"] == horizon and row["kind"] == kind]
            label = horizon_name(horizon) if kind == "within" else None
            x, y = [row["source_layer"] for row in mine], [row["information_share"] for row in mine]
            axes[0, 0].plot(x, y, color=color, linestyle=line, marker=marker, markersize=4, label=label)
    wrapped = any(row["kind"] == "wrapped" for row in pairs)
    axes[0, 0].set_xlabel("source MoE layer" + (" (diamonds: into the next token)" if wrapped else ""))
    axes[0, 0].set_ylabel("share of the target's entropy known")
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False, fontsize=8)
    if heaviest:
        starts = heaviest["starts"]
        place = np.arange(len(starts))
        axes[0, 1].bar(
            place - 0.2, [s["distinct"] for s in starts], 0.4, color="#c9d3e6", label="paths that occur"
        )
        axes[0, 1].bar(
            place + 0.2,
            [s["half"] for s in starts],
            0.4,
            color="#332288",
            label="that half of the tokens take",
        )
        axes[0, 1].set_yscale("log")
        axes[0, 1].set_ylim(1, axes[0, 1].get_ylim()[1] * 4)
        axes[0, 1].set_xlabel(f"first MoE layer of a path of {heaviest['length']}")
        axes[0, 1].set_ylabel("paths of the heaviest expert")
        axes[0, 1].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    for panel in axes[0]:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(panel, "y")
    drawn.suptitle(title, fontsize=11)
    return drawn


def transition_table(name: str, found: Mapping[str, Any]) -> Table:
    """A row per source layer: information share at each horizon, and the strongest transition to the next
    layer."""
    pairs = found["pairs"]
    horizons = sorted({row["horizon"] for row in pairs})
    table = Table(
        f"{name}: what a layer's expert tells of later layers, and its strongest transition",
        ["source layer", *[f"{horizon_name(h)} %" for h in horizons], "strongest", "P %", "lift", "tokens"],
    )
    for layer in sorted({row["source_layer"] for row in pairs}):
        of = {row["horizon"]: row for row in pairs if row["source_layer"] == layer}
        best = of.get(1, {}).get("strongest")
        cells = [percent(of[h]["information_share"]) if h in of else "–" for h in horizons]
        told = ["–"] * 4
        if best is not None:
            told = [
                f"{best['source']} → {best['target']}",
                percent(best["p"]),
                number(best["lift"], 1),
                f"{best['tokens']:,}",
            ]
        table.rows.append([str(layer), *cells, *told])
    table.notes = [
        f"Over {found['tokens']:,} tokens. %: mutual information of one expert of the source layer and one "
        "of the target layer, over the target's entropy. Strongest: highest lift from this layer to the "
        "next; P: share of the source's tokens that use the target.",
    ]
    return table


def path_table(name: str, flow: Mapping[str, Any], ranking: str) -> Table:
    """The frequent or the strong paths of one mining."""
    what = "the heaviest expert" if flow["columns"] == 1 else f"all {flow['columns']} experts"
    table = Table(
        f"{name}: {'most frequent' if ranking == 'frequent' else 'strongest'} paths of {what} over "
        f"{flow['length']} MoE layers",
        ["layers", "experts", "tokens", "share %", "lift", "beyond the chain"],
        left=2,
    )
    for path in flow[ranking][:SHOWN]:
        layers = f"{path['start']}–{path['start'] + flow['length'] - 1}"
        experts = " → ".join(map(str, path["experts"]))
        share = f"{100 * path['share']:.2f}"
        row = [
            layers,
            experts,
            f"{path['count']:,}",
            share,
            number(path["lift"], 1),
            number(path["lift_chain"], 2),
        ]
        table.rows.append(row)
    ranked = "by tokens" if ranking == "frequent" else "by share × log₂ lift"
    table.notes = [
        f"Ranked {ranked}, over {flow['tokens']:,} tokens. Lift: over layers that choose independently. "
        "Beyond the chain: over what the steps alone make of it (1: one layer back is all that matters).",
    ]
    return table


def draw(record: Mapping[str, Any], directory: Path) -> list[tuple[Path, str]]:
    """Write the pictures of every trace below ``directory/plots``; returns paths and captions in reading
    order."""
    made: list[tuple[Path, str]] = []
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    for name, found in record["transitions"].items():
        arrays, flows = load_file(directory / found["export"]), record["flows"].get(name, {})
        figures: dict[str, Figure] = {}
        if (arrays["kind_LH"][:, 0] == 0).any():
            figures["matrices"] = matrix_plot(arrays, f"Expert transitions: {name}")
        if found["pairs"]:
            figures["information"] = information_plot(
                found["pairs"], flows, f"What routing tells of later routing: {name}"
            )
        if "heaviest" in flows:
            heaviest = flows["heaviest"]
            title = f"Routing flows: {name}, {heaviest['tokens']:,} tokens"
            figures["flows"] = flow_plot(np.array(arrays["first_LEE"]), chosen(heaviest["strong"]), title)
        for kind, drawn in figures.items():
            path = directory / "plots" / f"{slug(name)}-{kind}.png"
            # The same numbers make the same bytes; flows are wide and full of shades.
            drawn.savefig(path, metadata={"Software": None}, dpi=110 if kind == "flows" else "figure")
            made.append((path, f"{name}: {CAPTIONS[kind]}"))
    return made


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table of the record."""
    tables = [trace_table(record["traces"], {})] if record["traces"] else []
    for name, found in record["transitions"].items():
        tables.append(transition_table(name, found))
        for flow in record["flows"].get(name, {}).values():
            tables += [path_table(name, flow, ranking) for ranking in ("strong", "frequent")]
    return tables


def publish_transitions(record: Mapping[str, Any], directory: Path, console: Console | None) -> Path:
    """Write ``plots/*.png``, ``tables.md`` and ``report.html``; print the tables of transitions and strong
    paths."""
    pictures, tables = draw(record, directory), tables_of(record)
    text = "\n\n".join(f"**{table.title}**\n\n{table.to_markdown()}" for table in tables)
    (directory / "tables.md").write_text(text + "\n", encoding="utf-8")
    page = directory / "report.html"
    page.write_text(plain_page(record, "Where tokens go", INTRODUCTION, tables, pictures), encoding="utf-8")
    if console is not None:
        for name, found in record["transitions"].items():
            console.print(transition_table(name, found).to_rich())
            for flow in record["flows"].get(name, {}).values():
                console.print(path_table(name, flow, "strong").to_rich())
    return page
