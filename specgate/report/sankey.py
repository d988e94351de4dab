"""A picture of routing flows: experts as blocks, transitions as grey ribbons, mined paths in colour on top.

Letters: L MoE layers, E experts per layer, S samples along a ribbon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from specgate.report.canvas import figure

Array = np.ndarray[Any, Any]
BLOCK = 0.07
"""Half the width of an expert's block, in layers."""
GAP = 0.35
"""Height of all gaps between the experts of a layer, as a share of their own."""
COLORS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#44AA99", "#882255", "#6699CC", "#999933")
SAMPLES = 24
FAINTEST = 1e-3
"""Transitions of a smaller share of the tokens are not drawn."""


def order_experts(pair_LEE: Array) -> list[Array]:
    """An order of each layer's experts with few crossings: a layer's experts by the mean place of those
    before them that feed them more than by chance.

    Shapes:
        pair_LEE: ``[L - 1, E, E]`` shares of tokens; output: L permutations of E.
    """
    first = np.argsort(-pair_LEE[0].sum(1), kind="stable")
    orders, place_E = [first], np.empty(len(first))
    for pair_EE in pair_LEE:
        place_E[orders[-1]] = np.arange(len(place_E))
        chance_EE = pair_EE.sum(1, keepdims=True) * pair_EE.sum(0, keepdims=True)
        more_EE = np.maximum(pair_EE - chance_EE, 0) + 1e-12
        orders.append(np.argsort((more_EE * place_E[:, None]).sum(0) / more_EE.sum(0), kind="stable"))
    return orders


def layout(pair_LEE: Array) -> tuple[Array, Array, Array, Array]:
    """Where blocks and ribbons lie, from top 0 downwards.

    Returns:
        bottom and height of each block (``[L, E]``) and the middle of each ribbon where it leaves its source
        and where it reaches its target (``[L - 1, E, E]``): ribbons are stacked in the order of the blocks
        they join.
    """
    orders = order_experts(pair_LEE)
    L, E = len(orders), len(orders[0])
    # The middle layers' shares are seen from both sides; they are the same tokens.
    height_LE = np.stack([pair_EE.sum(1) for pair_EE in pair_LEE] + [pair_LEE[-1].sum(0)])
    bottom_LE = np.empty((L, E))
    for layer, order in enumerate(orders):
        heights = height_LE[layer, order]
        bottom_LE[layer, order] = np.cumsum(heights) - heights + GAP / E * np.arange(E)
    leave_LEE, reach_LEE = np.empty_like(pair_LEE), np.empty_like(pair_LEE)
    for layer, pair_EE in enumerate(pair_LEE):
        near, far = orders[layer], orders[layer + 1]
        by_far = pair_EE[:, far]
        leave_LEE[layer][:, far] = bottom_LE[layer][:, None] + by_far.cumsum(1) - by_far / 2
        by_near = pair_EE[near]
        reach_LEE[layer][near] = bottom_LE[layer + 1][None] + by_near.cumsum(0) - by_near / 2
    return bottom_LE, height_LE, leave_LEE, reach_LEE


def ribbon(x: tuple[float, float], y: tuple[float, float], width: float) -> Array:
    """A smooth band of constant height from (x0, y0) to (x1, y1): ``[2 S, 2]`` corners."""
    t_S = np.linspace(0, 1, SAMPLES)
    middle_S = y[0] + (y[1] - y[0]) * t_S * t_S * (3 - 2 * t_S)
    x_S = x[0] + (x[1] - x[0]) * t_S
    upper, lower = np.stack([x_S, middle_S - width / 2], 1), np.stack([x_S, middle_S + width / 2], 1)
    return np.concatenate([upper, lower[::-1]])


def chosen(paths: Sequence[Mapping[str, Any]], most: int = 24) -> list[Mapping[str, Any]]:
    """The first paths of the list that share no step with one taken before (windows of one long flow do)."""
    taken: set[tuple[int, int, int]] = set()
    found: list[Mapping[str, Any]] = []
    for path in paths:
        steps = {(path["start"] + m, e, f) for m, (e, f) in enumerate(pairwise(path["experts"]))}
        if not steps & taken and len(found) < most:
            taken |= steps
            found.append(path)
    return found


def flow_plot(pair_LEE: Array, paths: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Flows of the heaviest expert through all layers.

    Args:
        pair_LEE: share of the tokens that go from e in layer l to f in layer l + 1.
        paths: the mined ones to draw in colour, as :func:`specgate.report.flows.mine` gives them.
    """
    L, E = len(pair_LEE) + 1, pair_LEE.shape[1]
    bottom_LE, height_LE, leave_LEE, reach_LEE = layout(pair_LEE)
    drawn = figure(float(np.clip(1.2 * L + 1.5, 7, 17)), 7.2)
    axes: Axes = drawn.subplots()
    bands, shade = [], []
    for layer, pair_EE in enumerate(pair_LEE):
        chance_EE = pair_EE.sum(1, keepdims=True) * pair_EE.sum(0, keepdims=True)
        for e, f in zip(*np.nonzero(pair_EE > FAINTEST), strict=True):
            x = (layer + BLOCK, layer + 1 - BLOCK)
            bands.append(ribbon(x, (leave_LEE[layer, e, f], reach_LEE[layer, e, f]), pair_EE[e, f]))
            # The more it exceeds chance, the darker: what everybody does stays pale.
            excess = np.log2(pair_EE[e, f] / chance_EE[e, f]) / 4
            shade.append((0.45, 0.48, 0.55, float(np.clip(0.06 + 0.34 * excess, 0.04, 0.4))))
    axes.add_collection(PolyCollection(bands, facecolors=shade, linewidths=0, zorder=1))
    marked: set[tuple[int, int]] = set()
    for i, path in enumerate(paths):
        color, width = COLORS[i % len(COLORS)], max(path["share"], 0.004)
        start, experts = path["start"], path["experts"]
        marked |= {(start + m, e) for m, e in enumerate(experts)}
        pieces, last = [], None
        for m, (e, f) in enumerate(pairwise(experts)):
            layer = start + m
            leave, reach = leave_LEE[layer, e, f], reach_LEE[layer, e, f]
            enter = leave if last is None else last
            pieces.append(ribbon((layer - BLOCK, layer + BLOCK), (enter, leave), width))
            pieces.append(ribbon((layer + BLOCK, layer + 1 - BLOCK), (leave, reach), width))
            last = reach
        end = start + len(experts) - 1
        assert last is not None  # a path has at least two layers
        pieces.append(ribbon((end - BLOCK, end + BLOCK), (last, last), width))
        axes.add_collection(PolyCollection(pieces, facecolors=color, alpha=0.85, linewidths=0, zorder=3))
    for layer in range(L):
        for e in range(E):
            y, height = bottom_LE[layer, e], height_LE[layer, e]
            axes.add_patch(
                Rectangle((layer - BLOCK, y), 2 * BLOCK, height, facecolor="#c3c8d1", linewidth=0, zorder=2)
            )
            if (layer, e) in marked or (E <= 16 and height > 0.02):
                axes.text(
                    layer,
                    y + height / 2,
                    str(e),
                    ha="center",
                    va="center",
                    fontsize=7,
                    zorder=4,
                    bbox={
                        "boxstyle": "round,pad=0.12",
                        "facecolor": "white",
                        "edgecolor": "none",
                        "alpha": 0.85,
                    },
                )
    axes.set_xlim(-0.4, L - 0.6)
    axes.set_ylim(float((bottom_LE + height_LE).max()) + 0.01, -0.02)
    axes.set_xticks(range(L), [str(layer) for layer in range(L)])
    axes.set_xlabel(
        "MoE layer. A block is an expert (its number where it matters), as high as its share of the tokens"
    )
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    drawn.suptitle(title, fontsize=11)
    return drawn
