"""Tables and pictures of what is compared with ``priced`` in mode=simulate: its variants, rl, the bandit."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from specgate.policy.registry import LEARNED, ORACLES, SELECTION
from specgate.report.canvas import panels, tidy
from specgate.report.replay_page import figures
from specgate.report.style import Row
from specgate.report.tables import Table, percent

MAIN = "priced"
LINES = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDAA33", "#CC6677", "#882255", "#AA4499")
STYLES = ("-", "--", ":", "-.")


def is_oracle(label: str) -> bool:
    """Whether a policy knows the future, whatever its options."""
    return label.split()[0] in ORACLES


def cell_title(row: Row) -> str:
    """A machine and batch in words."""
    return row["hardware"] if row["batch"] == 1 else f"{row['hardware']}, batches of {row['batch']}"


def against_table(rows: Sequence[Row]) -> Table | None:
    """One cell: the speed of each variant of ``priced`` and of what learns, in multiples of its own."""
    names = [
        name
        for name in dict.fromkeys(row["policy"] for row in rows)
        if name != MAIN and name.split()[0] in (MAIN, *LEARNED)
    ]
    shares = sorted({row["residency"] for row in rows})
    by = {(row["policy"], row["residency"]): row for row in rows if row.get("against_main") is not None}
    names = [name for name in names if any((name, share) in by for share in shares)]
    if not names:
        return None
    table = Table(
        f"{cell_title(rows[0])}: speed in multiples of priced's, on the same documents [95 % interval]",
        ["policy", *[f"{100 * share:g} %" for share in shares]],
        left=1,
    )
    for name in names:
        table.rows.append([name, *[_ratio(by.get((name, share))) for share in shares]])
    table.notes = ["Below 1: slower than priced with its defaults. The intervals are of the ratio itself."]
    return table


def _ratio(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["against_main_low"] is None:
        return f"{row['against_main']:.3f}"
    return f"{row['against_main']:.3f} [{row['against_main_low']:.3f}, {row['against_main_high']:.3f}]"


def seedless(label: str) -> str:
    """A policy's label without its seed."""
    return " ".join(word for word in label.split() if not word.startswith("seed="))


def seeds_table(rows: Sequence[Row]) -> Table | None:
    """One cell: agents that differ in their seed alone."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(row["policy"] for row in rows):
        if seedless(name) != name:
            groups.setdefault(seedless(name), []).append(name)
    groups = {name: seeds for name, seeds in groups.items() if len(seeds) > 1}
    if not groups:
        return None
    shares = sorted({row["residency"] for row in rows})
    by = {(row["policy"], row["residency"]): row for row in rows}
    table = Table(
        f"{cell_title(rows[0])}: tokens/s over seeds, mean ± standard deviation (least to most)",
        ["policy", "seeds", *[f"{100 * share:g} %" for share in shares]],
        left=1,
    )
    for name, seeds in groups.items():
        texts = []
        for share in shares:
            speeds = [by[seed, share]["tokens_per_second"] for seed in seeds if (seed, share) in by]
            texts.append(_spread(speeds) if len(speeds) > 1 else "–")
        table.rows.append([name, str(len(seeds)), *texts])
    if any(row["policy"] == MAIN for row in rows):
        found = [by.get((MAIN, share)) for share in shares]
        speeds_of_main = ["–" if row is None else figures(row["tokens_per_second"]) for row in found]
        table.rows.append([MAIN, "–", *speeds_of_main])
    return table


def _spread(speeds: Sequence[float]) -> str:
    mean, deviation = statistics.mean(speeds), statistics.stdev(speeds)
    return f"{figures(mean)} ± {figures(deviation)} ({figures(min(speeds))} to {figures(max(speeds))})"


def agents_line(agents: Sequence[Mapping[str, Any]]) -> str:
    """How the agents were trained."""
    points = sorted({agent["points"] for agent in agents})
    documents = sorted({agent["documents"] for agent in agents})
    seconds = [agent["seconds"] for agent in agents]
    between = f"{min(seconds):.0f} to {max(seconds):.0f} s" if len(seconds) > 1 else f"{seconds[0]:.0f} s"
    return (
        f"rl: one agent for each machine, batch, budget and seed ({len(agents)} in all), trained on "
        f"{' or '.join(map(str, documents))} documents (or batches) that are not scored, for "
        f"{' or '.join(f'{p:,}' for p in points)} points; {between} each on one CPU core."
    )


def bandit_table(choices: Sequence[Mapping[str, Any]]) -> Table:
    """What each bandit earned and gave up, cell by cell."""
    table = Table(
        "Choosing a policy per document: mean speed in multiples of LRU's, and regret",
        ["bandit", "machine", "on the device", "bandit", "best fixed arm", "best of each", "at random",
         "regret to fixed", "regret to each", "best arm picked"],
        left=3,
    )  # fmt: skip
    for found in choices:
        D, fixed = found["documents"], found["arms"].index(found["best_fixed"])
        hit = sum(choice == fixed for choice in found["choices"]) / D
        table.rows.append(
            [
                found["policy"],
                cell_title(found),
                f"{100 * found['residency']:g} %",
                f"{found['reward']:.3f}",
                f"{found['best_fixed_reward']:.3f} ({found['best_fixed']})",
                f"{found['best_each_reward']:.3f}",
                f"{found['random_reward']:.3f}",
                f"{found['regret_fixed'][-1]:+.3f}",
                f"{found['regret_each'][-1]:.3f}",
                f"{percent(hit)} %",
            ]
        )
    learned = sorted({found["learned_on"] for found in choices})
    table.notes = [
        f"Learned on {' or '.join(map(str, learned))} other documents (or batches) first, then one choice "
        "for each scored one, learning on; regret is summed over these. Best fixed arm: in hindsight. The "
        "cache that a document meets is the one that the same arm left."
    ]
    return table


def draw_regret(choices: Sequence[Mapping[str, Any]]) -> Figure:
    """Cumulative regret against the best arm of each document: bandits and fixed arms, a panel per cell."""
    where = list(dict.fromkeys((c["hardware"], c["batch"], c["residency"]) for c in choices))
    columns = min(4, len(where))
    height = -(-len(where) // columns)
    drawn, axes = panels(2.4 + 3.4 * columns, 0.8 + 2.9 * height, height, columns)
    arms = list(dict.fromkeys(arm for found in choices for arm in found["arms"]))
    for ax in axes.flat[len(where) :]:
        ax.set_visible(False)
    for cell, ax in zip(where, axes.flat, strict=False):
        mine = [c for c in choices if (c["hardware"], c["batch"], c["residency"]) == cell]
        for a, arm in enumerate(arms):
            curve = mine[0]["regret_arms"].get(arm)
            if curve is not None:
                ax.plot(range(1, len(curve) + 1), curve, color=LINES[a % len(LINES)], linewidth=1, label=arm)
        for i, found in enumerate(mine):
            curve = found["regret_each"]
            ax.plot(
                range(1, len(curve) + 1), curve, color="black", linewidth=2.2, label=found["policy"],
                linestyle=STYLES[i % len(STYLES)],
            )  # fmt: skip
        ax.set_yscale("symlog", linthresh=0.02)
        ax.set_ylim(bottom=0)
        ax.set_title(f"{cell_title(mine[0])}, {100 * cell[2]:g} %", fontsize=9)
        ax.set_xlabel("scored documents")
        tidy(ax)
    axes[0][0].set_ylabel("regret, in LRU's speed")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    return drawn


def has_bandit(record: Mapping[str, Any]) -> bool:
    """Whether a bandit was judged."""
    return bool(record.get("choices")) and any(c["policy"].split()[0] == SELECTION for c in record["choices"])
