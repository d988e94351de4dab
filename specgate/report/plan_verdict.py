"""What a plan comes to, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specgate.moe.offload_plan import size
from specgate.report.plan_run import CACHES, base_of

#: Below this gain over a cache without prediction, a predictor is not worth having.
WORTH = 1.05
RESOURCES = {
    "link": "the link from host memory to the device",
    "file": "the disk",
    "memory": "the device's own memory bandwidth",
    "compute": "the device's arithmetic",
    "launches": "launching kernels from the host",
    "host": "the host's work around each layer",
}


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Sentences: does it fit, how fast, what binds, is prediction worth it, what else to try.

    Args:
        found: what the planner found, see :func:`specgate.report.plan.plan`.
    """
    about, name = found["plan"], found["shape"]["name"]
    card = found["machine"]["device"]
    if not about["fits"]:
        need = sum(row["bytes"] for row in found["memory"][:3])
        return [
            f"{name} does not fit {about['budget_gb']:g} GB of {card}: all but the experts takes "
            f"{size(need)}, "
            f"and with the experts of one call the least budget is {about['least_gb']:g} GB; raise "
            "budget_gb, "
            "or lower plan.context or plan.batch_size."
        ]
    lines = [_fits(found)]
    if about["in_host"] < about["blocks"]:
        missing = about["blocks"] - about["in_host"]
        lines.append(
            f"Host memory holds {about['in_host']} of {about['blocks']} experts: {missing} "
            f"({size(missing * about['block_bytes'])}) are read from {found['machine']['file']} when needed."
        )
    rows = {row["policy"]: row for row in found["rows"]}
    if about["resident"]:
        speed = rows["resident"]
        lines.append(
            f"Expected: {_speed(speed)} tokens/s, bound by {RESOURCES[speed['binds']]}. Every expert "
            "stays on "
            "the device, so prediction is not worth it: there is nothing to fetch."
        )
        return lines
    lines.append(_speeds(rows))
    lines.append(worth(rows, about["forecasts"]))
    lines += _codecs(found["codecs"], about["codec"])
    lines += _contexts(found["contexts"], about["context"])
    if not about["own_trace"]:
        L, E, K = about["trace_shape"]
        whose = (
            f"{about['trace']}, a small model that comes with specgate"
            if about["bundled"]
            else about["trace"]
        )
        missing = f" (data={', '.join(about['missing'])} is not there)" if about["missing"] else ""
        lines.append(
            f"No trace of {name} is here{missing}: its hit rates are those of {whose} ({L} layers, "
            f"{K} of {E} experts), scaled by the share of experts that a step uses, an estimate that "
            "another routing can miss by far; collect a trace to know."
        )
    if not found["machine"]["measured"]:
        lines.append(
            f"Times are computed from the figures of {found['machine']['name']}, not measured: "
            "python -m specgate.policy.measure, then hardware=local, measures this machine."
        )
    return lines


def _fits(found: Mapping[str, Any]) -> str:
    about, name, card = found["plan"], found["shape"]["name"], found["machine"]["device"]
    if about["resident"]:
        return (
            f"{name} fits {about['budget_gb']:g} GB of {card} whole: every expert has a slot "
            f"({about['all_gb']:g} GB would do)."
        )
    share = about["slots"] / about["decoding"]
    return (
        f"{name} fits {about['budget_gb']:g} GB of {card} with offloading: {about['slots']} of "
        f"{about['decoding']} experts ({share:.0%}) on the device; all of them would take "
        f"{about['all_gb']:g} GB."
    )


def _speed(row: Mapping[str, Any]) -> str:
    return _figures(row["tokens_per_second"])


def _figures(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _speeds(rows: Mapping[str, Mapping[str, Any]]) -> str:
    caches = [f"{_speed(rows[n])} with an {n.upper()} cache ({rows[n]['hit_rate']:.0%} hits)" for n in CACHES]
    plain, priced = RESOURCES[base_of(rows.values())["binds"]], RESOURCES[rows["priced"]["binds"]]
    bound = f"by {plain}" if plain == priced else f"by {plain} without prediction, by {priced} with it"
    return (
        f"Expected tokens/s without prediction: {_speed(rows['on_demand'])} without a cache, "
        f"{', '.join(caches)}; with prediction {_speed(rows['priced'])}; with an oracle "
        f"{_speed(rows['oracle'])}; with everything on the device {_speed(rows['resident'])}. Bound {bound}."
    )


def worth(rows: Mapping[str, Mapping[str, Any]], forecasts: str) -> str:
    """Whether prediction is worth it, by what it gains over the better cache alone."""
    base = base_of(rows.values())
    cache, speed = f"the {base['policy'].upper()} cache", base["tokens_per_second"]
    most, gain = rows["oracle"]["tokens_per_second"] / speed, rows["priced"]["tokens_per_second"] / speed
    if most < WORTH:
        why = (
            f"which waits for {base['stall_share']:.0%} of the time"
            if base["stall_share"] < 0.1
            else f"since {RESOURCES[rows['oracle']['binds']]} is busy all the time"
        )
        return f"Prediction is not worth it: even an oracle gains only {most - 1:.1%} over {cache}, {why}."
    share = rows["priced"]["share_of_gain"]
    reach = "" if share is None else f", {max(0.0, share):.0%} of the time that an oracle saves"
    if gain < WORTH:
        return (
            f"Prediction is not worth it: forecasts {forecasts} make it {gain:.2f} times as fast as {cache}"
            f"{reach}, where an oracle makes it {most:.2f} times."
        )
    return (
        f"Prediction is worth it: forecasts {forecasts} make it {gain:.2f} times as fast as {cache}{reach}; "
        f"an oracle makes it {most:.2f} times."
    )


def _codecs(codecs: Sequence[Mapping[str, Any]], chosen: str) -> list[str]:
    if not codecs:
        return []
    best = max(codecs, key=lambda row: row["priced"])
    own = next(row for row in codecs if row["codec"] == chosen)
    if best["codec"] == chosen or best["priced"] < 1.02 * own["priced"]:
        return [f"Best codec: {chosen}; the others gain nothing here."]
    changes = "" if best["exact"] else ", which changes values a little"
    return [
        f"Best codec: {best['codec']}, {_figures(best['priced'])} tokens/s with prediction against "
        f"{_figures(own['priced'])}{changes}: the link carries {size(best['block_bytes'])} per expert "
        "instead "
        f"of {size(own['block_bytes'])}. The slots are the same: experts are decoded on the device."
    ]


def _contexts(contexts: Sequence[Mapping[str, Any]], chosen: int) -> list[str]:
    mine = next((row for row in contexts if row["context"] == chosen), None)
    other = [row for row in contexts if row["fits"] and row["context"] < chosen]
    if mine is None or not mine["fits"] or not other:
        return []
    gain = other[0]["priced"] / mine["priced"]
    if gain < 1.02:
        return [f"Best split: keep {chosen} tokens of context; less of it would buy no speed."]
    return [
        f"Split: {other[0]['context']} tokens of context instead of {chosen} would free room for "
        f"{other[0]['slots'] - mine['slots']} more experts, {_figures(other[0]['priced'])} tokens/s."
    ]
