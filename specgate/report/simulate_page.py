"""What a simulation shows: tables, pictures, a page, and its section of docs/RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from specgate.report.canvas import panels, tidy
from specgate.report.offload_page import section, write_page
from specgate.report.replay_page import figures
from specgate.report.simulate_learned_page import (
    against_table,
    agents_line,
    bandit_table,
    cell_title,
    draw_regret,
    has_bandit,
    is_oracle,
    seeds_table,
)
from specgate.report.style import Look, Row, slug
from specgate.report.tables import Table, percent

TITLE = "What is each policy worth?"
INTRODUCTION = (
    "A simulation in virtual time: a real trace says which experts every token uses, a cost model how long "
    "copies and kernels take. Every policy is fitted on training documents and runs the same scored ones."
)
CAPTION = (
    "Tokens per second over the share of the experts that have a slot on the device, on logarithmic axes. "
    "Stars: what one reaches who knows the future."
)
REGRET = (
    "What choosing gave up against the best arm of each document, summed over documents in their order: "
    "bandits (black) and always the same arm."
)
KEPT = (
    "rows",
    "traces",
    "shape",
    "simulate",
    "hardware_profiles",
    "mode",
    "split",
    "skipped",
    "agents",
    "choices",
)
COLORS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDAA33", "#CC6677", "#882255", "#AA4499",
          "#661100", "#6699CC", "#EE7733", "#0077BB", "#8a8a8a")  # fmt: skip
MARKERS = "osD^v<>pPhX*d"
FIXED = {
    "oracle": Look("#117733", "*"),
    "priced": Look("#CC3311", "o"),
    "lru": Look("#AA4499", "^"),
    "on_demand": Look("#8a8a8a", "_", ":"),
}


def is_simulation(record: Mapping[str, Any]) -> bool:
    """Whether a record is one of mode=simulate."""
    return record.get("mode") == "simulate"


def slim_simulation(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a record in docs/results."""
    kept = {key: record[key] for key in KEPT if key in record}
    kept["rows"] = [{k: v for k, v in row.items() if k != "rules"} for row in record["rows"]]
    if "agents" in kept:
        kept["agents"] = [{k: v for k, v in agent.items() if k != "curve"} for agent in record["agents"]]
    return kept


def cells(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Machines and batches, in the order of the rows."""
    return list(dict.fromkeys((row["hardware"], row["batch"]) for row in rows))


def of_cell(rows: Sequence[Row], cell: tuple[str, int]) -> list[Row]:
    """The rows of one machine and batch."""
    return [row for row in rows if (row["hardware"], row["batch"]) == cell]


def policies_of(rows: Sequence[Row]) -> list[str]:
    """Policies, the slowest first by the mean of their speeds; the oracles last."""
    names = list(dict.fromkeys(row["policy"] for row in rows))

    def rank(name: str) -> tuple[bool, float]:
        mine = [row["tokens_per_second"] for row in rows if row["policy"] == name]
        return is_oracle(name), sum(mine) / len(mine)

    return sorted(names, key=rank)


def title_of(cell: tuple[str, int]) -> str:
    """A machine and batch in words."""
    return cell_title({"hardware": cell[0], "batch": cell[1]})


def speed_table(rows: Sequence[Row], cell: tuple[str, int]) -> Table:
    """Tokens per second of every policy at every budget."""
    mine = of_cell(rows, cell)
    shares = sorted({row["residency"] for row in mine})
    table = Table(
        f"{title_of(cell)}: tokens/s [95 % interval over documents] by share of experts on the device",
        ["policy", *[f"{100 * share:g} %" for share in shares]],
        left=1,
    )
    best = {
        share: max(
            (
                r["tokens_per_second"]
                for r in mine
                if r["residency"] == share and not is_oracle(r["policy"]) and not r.get("low_rate")
            ),
            default=None,
        )
        for share in shares
    }
    for name in policies_of(mine):
        if is_oracle(name) and not table.sections:
            table.sections.add(len(table.rows))
        texts = []
        for share in shares:
            found = [r for r in mine if r["policy"] == name and r["residency"] == share]
            if not found:
                texts.append("–")
                continue
            row = found[0]
            speed, low, high = (row[f"tokens_per_second{x}"] for x in ("", "_low", "_high"))
            text = f"{figures(speed)} [{figures(low)}, {figures(high)}]"
            texts.append(f"**{text}**" if speed == best[share] else text)
        table.rows.append([name, *texts])
    resident = next(iter(mine))
    several = cell[1] > 1
    scored = (
        f"{resident['documents']} {'documents' if 'groups' in resident or not several else 'batches'} scored"
    )
    if several and "groups" in resident:
        scored += (
            f", dealt into {resident['groups']} batches; the intervals know which of these share documents"
        )
    table.notes = [
        f"{scored}; {resident['tokens']:,} tokens. With all experts on the device: "
        f"{figures(resident['tokens_per_second'] / resident['against_resident'])} tokens/s. Bold: the best "
        "that knows no future and changes no value; below the line those that do."
    ]
    return table


def gain_table(rows: Sequence[Row], cell: tuple[str, int]) -> Table | None:
    """Shares of the oracle's gain over LRU."""
    mine = [row for row in of_cell(rows, cell) if row.get("share_of_gain") is not None]
    if not mine:
        return None
    shares = sorted({row["residency"] for row in mine})
    table = Table(
        f"{title_of(cell)}: % of the time that the oracle saves over LRU [95 % interval]",
        ["policy", *[f"{100 * share:g} %" for share in shares]],
        left=1,
    )
    for name in policies_of(mine):
        texts = []
        for share in shares:
            found = [r for r in mine if r["policy"] == name and r["residency"] == share]
            texts.append(
                f"{percent(found[0]['share_of_gain'])} "
                f"[{percent(found[0]['share_low'])}, {percent(found[0]['share_high'])}]"
                if found
                else "–"
            )
        table.rows.append([name, *texts])
    table.notes = ["The oracle evicts by the next use and fetches the next calls' experts ahead."]
    return table


def bytes_table(rows: Sequence[Row], cell: tuple[str, int], share: float) -> Table:
    """What is moved and waited for, at one budget."""
    mine = [row for row in of_cell(rows, cell) if row["residency"] == share]
    table = Table(
        f"{title_of(cell)}, {100 * share:g} % of the experts on the device",
        ["policy", "hit %", "late %", "MB demanded", "MB ahead", "MB wasted", "stall ms", "link busy %"],
        left=1,
    )
    approximate = any(row.get("low_rate") for row in mine)
    if approximate:
        table.columns.insert(3, "approximate %")
    by_name = {row["policy"]: row for row in mine}
    for name in policies_of(mine):
        row = by_name[name]
        table.rows.append(
            [
                name,
                percent(row["hit_rate"]),
                percent(row["late_rate"]),
                *([percent(row["low_rate"])] if approximate else []),
                *[figures(row[f"{x}_bytes"] * 1e-6) for x in ("demand", "prefetch", "wasted")],
                figures(row["stall_ms_per_token"]),
                percent(row["link_share"]),
            ]
        )
    table.notes = [
        "Per token. Hit: on the device when it is asked for; late: on its way. Wasted: fetched ahead and "
        "evicted unused."
        + (" Approximate: a smaller copy was used, which changes values." if approximate else "")
    ]
    return table


def verdicts(rows: Sequence[Row]) -> list[str]:
    """How ``priced`` compares with the best reference policy of each cell, in sentences."""
    lines = []
    compared = [row for row in rows if row["policy"] == "priced" and row.get("against_best") is not None]
    if compared:
        behind = [row for row in compared if (row["against_best_high"] or 1.0) < 1]
        worst = min(compared, key=lambda row: row["against_best"])
        lines.append(
            f"priced against the fastest reference policy of each cell: {worst['against_best']:.2f} to "
            f"{max(row['against_best'] for row in compared):.2f} times its speed; slower beyond noise in "
            f"{len(behind)} of {len(compared)} cells."
        )
        lines += [
            f"Slower: {title_of((row['hardware'], row['batch']))}, {100 * row['residency']:g} %: "
            f"{row['against_best']:.3f} [{row['against_best_low']:.3f}, {row['against_best_high']:.3f}] "
            f"of {row['best_reference']}."
            for row in behind
        ]
        gains = [row for row in compared if row.get("share_of_gain") is not None]
        if gains:
            text = ", ".join(
                f"{title_of((row['hardware'], row['batch']))} at {100 * row['residency']:g} %: "
                f"{percent(row['share_of_gain'])} %"
                for row in gains
            )
            lines.append(f"Of the time that the oracle saves over LRU, priced saves: {text}.")
    return lines


def about(record: Mapping[str, Any]) -> list[str]:
    """What was simulated, in sentences."""
    s, shape = record["simulate"], record["shape"]
    layers = s.get("layers", shape["layers"])
    stacks = "" if layers == shape["layers"] else f" that decode (of {shape['layers']})"
    chunk = (
        f"stopped for a demand every {s['piece_mib']:g} MiB" if s["piece_mib"] else "not stopped for a demand"
    )
    lines = [
        f"{shape['name']}: {layers} MoE layers{stacks} of {shape['experts']} experts, {shape['top_k']} per "
        f"token, {s['block_bytes'] * 1e-6:.3g} MB each with codec {s['codec']}; "
        f"a context of {s['context']} tokens, "
        f"launches of runtime {s['runtime']}; a forecast's copy is {chunk}.",
        f"Forecasts: {_foresight(s)}, known {s['forecast_us']:g} µs after the router's choice.",
    ]
    if record.get("agents"):
        lines.append(agents_line(record["agents"]))
    return lines + left_out(record.get("skipped", [])) + verdicts(record["rows"])


def left_out(skipped: Sequence[Mapping[str, str]]) -> list[str]:
    """What could not run, and why; a policy that several cells left out in one sentence."""
    reasons: dict[str, list[tuple[str, str]]] = {}
    for left in skipped:
        name, _, where = left["policy"].partition(" (")
        reasons.setdefault(name, []).append((where.rstrip(")"), left["reason"]))
    lines = []
    for name, found in reasons.items():
        places = "; ".join(where for where, _ in found if where)
        lines.append(f"{name} is left out{f' ({places})' if places else ''}: {found[0][1]}.")
    return lines


def _foresight(settings: Mapping[str, Any]) -> str:
    if not settings["predictor"]:
        return "none"
    ahead = settings.get("lookahead")
    return f"{settings['predictor']}" + (f", {ahead} MoE layers ahead" if ahead else "")


def tables_of(record: Mapping[str, Any]) -> list[Table]:
    """Every table."""
    rows = record["rows"]
    out: list[Table] = []
    for cell in cells(rows):
        out.append(speed_table(rows, cell))
        gains = gain_table(rows, cell)
        out += [gains] if gains is not None else []
        for more in (against_table, seeds_table):
            table = more(of_cell(rows, cell))
            out += [table] if table is not None else []
        shares = sorted({row["residency"] for row in of_cell(rows, cell)})
        out.append(bytes_table(rows, cell, 0.25 if 0.25 in shares else shares[len(shares) // 2]))
    return [*out, bandit_table(record["choices"])] if has_bandit(record) else out


def look_of(name: str, names: Sequence[str]) -> Look:
    """Colour and marker of a policy."""
    if name in FIXED:
        return FIXED[name]
    i = [n for n in names if n not in FIXED].index(name)
    return Look(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])


def draw(rows: Sequence[Row]) -> Figure:
    """Tokens per second over the budget, a panel per machine and batch."""
    wanted = cells(rows)
    drawn, axes = panels(1.6 + 4.2 * len(wanted), 4.8, 1, len(wanted))
    names = policies_of(rows)
    for cell, ax in zip(wanted, axes[0], strict=True):
        mine = of_cell(rows, cell)
        shares = sorted({100 * row["residency"] for row in mine})
        for name in names:
            look = look_of(name, names)
            points = sorted((r for r in mine if r["policy"] == name), key=lambda r: r["residency"])
            strong = name in ("priced", "oracle")
            ax.plot(
                [100 * r["residency"] for r in points], [r["tokens_per_second"] for r in points],
                color=look.color, marker=look.marker, linestyle=look.line, label=name,
                linewidth=2.4 if strong else 1.2, markersize=8 if strong else 5, zorder=3 if strong else 2,
            )  # fmt: skip
        first = mine[0]
        ax.axhline(
            first["tokens_per_second"] / first["against_resident"], color="black", linestyle="--",
            linewidth=1, label="all on the device",
        )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(shares, [f"{share:g} %" for share in shares])
        ax.minorticks_off()
        ticks = _ticks([r["tokens_per_second"] for r in mine], first)
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_title(title_of(cell), fontsize=10)
        ax.set_xlabel("experts that have a slot on the device")
        tidy(ax)
    axes[0][0].set_ylabel("tokens per second")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    return drawn


def _ticks(speeds: Sequence[float], row: Row) -> list[float]:
    """1, 2 and 5 times powers of ten near the speeds, or round numbers where these are too close together."""
    low, high = min(speeds), max([*speeds, row["tokens_per_second"] / row["against_resident"]])
    every = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
    found = [tick for tick in every if low * 0.8 <= tick <= high * 1.25]
    return found if len(found) > 2 else [float(tick) for tick in MaxNLocator(5).tick_values(low, high)]


def publish_simulation(record: Mapping[str, Any], directory: Path, console: Console | None = None) -> Path:
    """Write pictures, tables and the page; print the tables. Returns the page's path."""
    plots = directory / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    name = slug("-".join([record["traces"][0]["name"], "policies"]))
    draw(record["rows"]).savefig(plots / f"{name}.png", metadata={"Software": None})
    pictures = [(plots / f"{name}.png", CAPTION)]
    if has_bandit(record):
        regret = plots / f"{slug(record['traces'][0]['name'] + '-regret')}.png"
        draw_regret(record["choices"]).savefig(regret, metadata={"Software": None})
        pictures.append((regret, REGRET))
    return write_page(
        record, directory, console, TITLE, INTRODUCTION, about(record), tables_of(record), pictures
    )


def simulation_section(record: Mapping[str, Any]) -> list[str]:
    """Markdown of a record, without heading and origin."""
    return section(INTRODUCTION, about(record), tables_of(record))


def draw_simulations(records: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """The pictures that :func:`simulation_pictures` names."""
    for name, record in records.items():
        if not is_simulation(record):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        plain = [row for row in record["rows"] if " " not in row["policy"] and row["policy"] != "bandit"]
        draw(plain).savefig(folder / f"{name}-policies.png", metadata={"Software": None})
        if has_bandit(record):
            draw_regret(record["choices"]).savefig(folder / f"{name}-regret.png", metadata={"Software": None})


def simulation_pictures(name: str, record: Mapping[str, Any]) -> list[str]:
    """Markdown that shows a record's pictures; none of another mode's record."""
    if not is_simulation(record):
        return []
    about_them = [("policies", CAPTION), *([("regret", REGRET)] if has_bandit(record) else [])]
    return [
        line for kind, text in about_them for line in (f"![{text}](images/{name}-{kind}.png)", "", text, "")
    ]
