"""What a finished trace says about its model: load, drops, favourites, and whether foreseeing it is worth
the trouble.

Letters: N flat tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from specgate.traces.schema import SPLITS
from specgate.traces.store import StackView, TraceReader

CHUNK = 1 << 18  # tokens looked at at once
SHOWN = 3  # favourite experts in the table
SKEWED, EVEN = 3.0, 1.6  # popularity's recall over chance: from here on, and up to here


@dataclass
class LayerLoad:
    """How one MoE layer spreads its tokens.

    Attributes:
        layer: its number within the stack.
        entropy: of the share of choices per expert, over its maximum: 1 is perfectly even.
        drop_rate: share of tokens dropped by capacity (Switch), or None.
        top_experts: the favourites and their shares of all choices, most used first.
        popularity_recall: share of a token's experts among the K most popular ones of the training documents.
        load: share of choices of each expert.
    """

    layer: int
    entropy: float
    drop_rate: float | None
    top_experts: list[tuple[int, float]]
    popularity_recall: float
    load: list[float]


def normalised_entropy(counts_E: np.ndarray) -> float:
    """Entropy of a histogram over its maximum; 1 is uniform, 0 is a single bin."""
    total = counts_E.sum()
    if total == 0 or len(counts_E) < 2:
        return 0.0
    p = counts_E[counts_E > 0] / total
    return float(-(p * np.log(p)).sum() / np.log(len(counts_E)))


def count_choices(view: StackView, tokens: np.ndarray, dropped: bool = False) -> np.ndarray:
    """How often each expert was chosen, or with ``dropped`` how many tokens were dropped.

    Shapes:
        tokens: int64 ``[N]``; output: ``[L, E]``, or ``[L]`` with ``dropped``.
    """
    L, E = view.info.layers, view.info.experts
    counts = np.zeros(L if dropped else L * E, dtype=np.int64)
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        if dropped:
            counts += view.gather("dropped", part).astype(bool).sum(0)
        else:
            flat = view.gather("experts", part).astype(np.int64) + np.arange(L)[:, None] * E
            counts += np.bincount(flat.reshape(-1), minlength=L * E)
    return counts if dropped else counts.reshape(L, E)


def _tokens_of(view: StackView, split: str) -> np.ndarray:
    """Every token of a split's sequences."""
    table = view.sequences
    chosen = table.split_S == SPLITS.index(split)
    start, length = table.start_S[chosen], table.length_S[chosen]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return np.repeat(start, length) + within


def loads(view: StackView) -> list[LayerLoad]:
    """The load of every layer of a stack.

    Entropy, drops and favourites are over all tokens. Popularity is learned on the training documents and
    scored on the validation documents (on the training ones where there are no others); the test documents
    stay locked.
    """
    by_split = {split: _tokens_of(view, split) for split in SPLITS}
    counts = {split: count_choices(view, tokens) for split, tokens in by_split.items()}
    total_LE = np.sum(list(counts.values()), axis=0)
    known = counts["train"] if counts["train"].any() else total_LE
    scored = counts["validation"] if counts["validation"].any() else known
    dropped_L = None
    if view.info.has_dropped:
        dropped_L = np.sum(
            [count_choices(view, tokens, dropped=True) for tokens in by_split.values()], axis=0
        )
    rows = []
    for layer in range(view.info.layers):
        share_E = total_LE[layer] / max(1, total_LE[layer].sum())
        ranked = np.argsort(-share_E, kind="stable")
        popular = np.argsort(-known[layer], kind="stable")[: view.info.top_k]
        rows.append(
            LayerLoad(
                layer=layer,
                entropy=normalised_entropy(total_LE[layer]),
                drop_rate=None if dropped_L is None else float(dropped_L[layer]) / max(1, view.num_tokens),
                top_experts=[(int(e), float(share_E[e])) for e in ranked[: max(SHOWN, view.info.top_k)]],
                popularity_recall=float(scored[layer][popular].sum() / max(1, scored[layer].sum())),
                load=[float(x) for x in share_E],
            )
        )
    return rows


def verdict(view: StackView, rows: list[LayerLoad]) -> str:
    """Whether the stack's routing is worth foreseeing, in one sentence."""
    recall = float(np.mean([row.popularity_recall for row in rows]))
    chance = view.info.top_k / view.info.experts
    says = f"always naming the most popular experts finds {recall:.0%} of the choices (chance {chance:.0%})"
    if recall > SKEWED * chance or recall > 0.8:
        return f"{says}: a fixed set of experts serves much of it, so keep those resident before predicting"
    if recall < EVEN * chance:
        return f"{says}: no hot set to lean on, so a predictor has everything to gain"
    return f"{says}: a hot set helps a little, a predictor is worth trying"


def report(reader: TraceReader, folder: Path, console: Console) -> dict[str, Any]:
    """Prints the table of every stack, draws ``expert_load.png`` into ``folder``, returns the numbers."""
    found: dict[str, Any] = {}
    tables: dict[str, list[LayerLoad]] = {}
    for name in sorted(reader.header.stacks, reverse=True):  # the encoder runs before the decoder
        view = reader.stack(name)
        rows = tables[name] = loads(view)
        console.print(_table(name, view, rows))
        says = verdict(view, rows)
        console.print(f"  {name}: {says}.\n")
        found[name] = {
            "tokens": view.num_tokens,
            "sequences": len(view.sequences),
            "entropy_mean": float(np.mean([row.entropy for row in rows])),
            "entropy_min": min(row.entropy for row in rows),
            "drop_rate": None if rows[0].drop_rate is None else float(np.mean([r.drop_rate for r in rows])),
            "popularity_recall": float(np.mean([row.popularity_recall for row in rows])),
            "chance": view.info.top_k / view.info.experts,
            "verdict": says,
            "layers": [asdict(row) for row in rows],
        }
    header = reader.header
    heat_map(tables, f"{header.model_id}, {' and '.join(header.phases)}", folder / "expert_load.png")
    return found


def _table(name: str, view: StackView, rows: list[LayerLoad]) -> Table:
    info = view.info
    table = Table(
        title=f"{name}: top-{info.top_k} of {info.experts} experts, {view.num_tokens:,} tokens in "
        f"{len(view.sequences):,} sequences",
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    table.add_column("load entropy", justify="right")
    if info.has_dropped:
        table.add_column("dropped", justify="right")
    table.add_column("most used experts", no_wrap=True)
    table.add_column("popularity", justify="right")
    for row in rows:
        cells = [str(row.layer), f"{row.entropy:.3f}"]
        if row.drop_rate is not None:
            cells.append(f"{row.drop_rate:.1%}")
        cells.append(", ".join(f"{e} ({share:.0%})" for e, share in row.top_experts[:SHOWN]))
        table.add_row(*cells, f"{row.popularity_recall:.3f}")
    return table


def heat_map(tables: dict[str, list[LayerLoad]], title: str, path: Path) -> None:
    """Draws each expert's share of its layer's choices, one panel per stack, into a PNG.

    The colour is the share relative to an even load: 1 (light) is even, darker red is more, blue is less.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    grids = {name: np.array([row.load for row in rows]) * len(rows[0].load) for name, rows in tables.items()}
    peak = max(2.0, *(float(grid.max()) for grid in grids.values()))
    width = max(5.5, min(15.0, 1.8 + 0.32 * max(grid.shape[1] for grid in grids.values())))
    heights = [0.95 + 0.3 * grid.shape[0] for grid in grids.values()]
    figure = Figure(figsize=(width, sum(heights) + 0.7), dpi=150, layout="constrained")
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=peak)
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        layers, experts = grid.shape
        image = axis.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel("MoE layer")
        axis.set_yticks(range(0, layers, max(1, -(-layers // 16))))
        axis.set_xticks(range(0, experts, max(1, -(-experts // 32))))
        axis.tick_params(length=0, labelsize=8)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        axis.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.0 if experts <= 64 else 0.3)
        axis.tick_params(which="minor", length=0)
        if experts <= 16:  # wide cells have room for the number
            for (layer, expert), value in np.ndenumerate(grid):
                strong = value < 0.35 or value > 1 + 0.6 * (peak - 1)
                axis.text(
                    expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7,
                    color="white" if strong else "#333333",
                )  # fmt: skip
    axes[-1].set_xlabel("expert")
    figure.suptitle(f"Expert load of {title}", fontsize=11, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.9, pad=0.015)
    bar.set_label("load relative to an even spread", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
