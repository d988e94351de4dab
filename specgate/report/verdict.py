"""Is a host worth predicting? Sentences made of nothing but the numbers in metrics.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specgate.report.style import (
    ORACLE,
    Row,
    best_free,
    horizon_name,
    kinds_of,
    main_predictor,
    select,
)
from specgate.report.tables import percent

HOT_SET = 2.0
"""From this many times chance on, popularity alone counts as a hot set."""


def verdict(rows: Sequence[Row], trace: str, load: Mapping[str, Any] | None = None) -> list[str]:
    """What one trace's rows say, for a reader who has never seen a table of recalls.

    Args:
        rows: of all predictors; only those of ``trace`` are read, in its first kind of target.
        load: what ``specgate.report.identity.expert_load`` found, if known.
    """
    mine = select(rows, trace=trace)
    kind = kinds_of(mine)[0]
    of_kind = select(mine, kind=kind)
    near = {row["predictor"]: row for row in select(of_kind, horizon=1)}
    name, free = main_predictor(mine), best_free(mine)
    row = near[name]
    recall, chance = row["recall_at_k"], row["top_k"] / row["experts"]
    text = [_headline(name, recall, free, near[free]["recall_at_k"] if free else None, chance)]
    many = (
        f"names {percent(recall)} % of the experts that will be used among its {row['top_k']} most probable "
        "ones"
    )
    one = f"names the expert that will be used in {percent(recall)} % of cases"
    text.append(
        f"One layer ahead, {name} {one if row['top_k'] == 1 else many}; guessing finds {percent(chance)} %."
    )
    if ORACLE in near:
        text.append(f"The oracle, which knows the answer, finds {percent(near[ORACLE]['recall_at_k'])} %.")
    if "popularity" in near and name != "popularity":
        times = near["popularity"]["recall_at_k"] / chance
        text.append(
            f"Always naming the most popular experts finds {percent(near['popularity']['recall_at_k'])} %, "
            f"{times:.2f} times chance: "
            + (
                "part of the routing is a fixed hot set."
                if times >= HOT_SET
                else "a fixed hot set explains little."
            )
        )
    if free and free != name:
        text.append(_gain(name, recall, free, near[free]["recall_at_k"]))
    if load:
        low, high = min(load["entropy"]), max(load["entropy"])
        text.append(
            f"Experts are used {'almost evenly' if low >= 0.95 else 'unevenly'}: the normalised entropy of "
            f"the load lies between {low:.3f} and {high:.3f} over the layers."
        )
    worst = max(select(of_kind, predictor=name), key=lambda r: r["ece"])
    text.append(
        f"Its probabilities are off by at most {worst['ece']:.4f} on average (ECE, "
        f"{horizon_name(worst['horizon'])}; {worst['ece_uncalibrated']:.4f} before scaling)."
    )
    return text


def _gain(name: str, recall: float, free: str, free_recall: float) -> str:
    found = f"The best free predictor, {free}, finds {percent(free_recall)} %"
    if recall <= free_recall:
        return f"{found}: training bought nothing at this horizon."
    closed = (recall - free_recall) / (1 - free_recall)
    return f"{found}; {name} closes {percent(closed)} % of the gap that it leaves to the oracle."


def _headline(name: str, recall: float, free: str | None, free_recall: float | None, chance: float) -> str:
    """The answer in one sentence. A gain counts from 2 points of recall, routing as foreseeable from twice
    chance.
    """
    if recall < 2 * chance:
        found = f"{percent(recall)} % against {percent(chance)} %"
        return f"Hardly: no predictor finds twice what guessing finds ({found})."
    if free is None or free_recall is None:
        return f"{name} was compared with no free predictor."
    if free == name:
        return f"Yes, and without training: {name} is the best predictor here."
    points = f"{100 * abs(recall - free_recall):.1f} points of recall"
    rival = f"{free}, the best predictor that needs no training"
    if recall < free_recall:
        return f"Yes, but training does not pay: {name} finds {points} less than {rival}."
    pays = "and training pays" if recall - free_recall >= 0.02 else "but training hardly pays"
    return f"Yes, {pays}: {name} finds {points} more than {rival}."
