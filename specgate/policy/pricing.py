"""What a prefetch costs and saves, and the precision at which it pays: pure functions, all times in ns.

The price of fetching an expert early is the value of whoever has to go, and the link's time where demands
want it; what it saves is the stall of a later demand. Both in nanoseconds, so that one comparison decides:
fetch iff ``p * saved > value_victim * load + price * copy``. The native core does the same arithmetic.
"""

from __future__ import annotations

import math


def load_time(copy_ns: float, read_ns: float, in_host: bool) -> float:
    """What a demand of an absent expert waits for on an idle machine: the copy, and the read of the file."""
    return copy_ns if in_host else copy_ns + read_ns


def saved_time(
    load_ns: float, copy_ns: float, horizon: int, mean_event_ns: float, backlog_ns: float = 0.0
) -> float:
    """Stall that a prefetch saves if its expert is used: all of the load if the copy is there in time.

    Args:
        load_ns: see :func:`load_time`.
        copy_ns: of the prefetch. The read of a file is not counted: a late one still helps, it goes on while
            the model waits for others and leaves the expert in host memory.
        horizon: events until the expert is used, 1 is the next.
        mean_event_ns: running mean of an event's compute.
        backlog_ns: what the link has to do before, from when the model goes on. Demands of the event that is
            worked on are none of it: the model waits for them too.
    """
    late_ns = max(0.0, backlog_ns + copy_ns - horizon * mean_event_ns)
    return min(max(load_ns - late_ns, 0.0), load_ns)


def price_of_link(
    utilisation: float, interruptible: bool, price_scale: float = 1.0, price_floor: float = 0.0
) -> float:
    """Price of a nanosecond of the link: the share of its time that demands use.

    Args:
        utilisation: 0 to 1, running mean.
        interruptible: whether a demand stops a prefetch at its next chunk instead of waiting for its end.
        price_scale: factor where it is.
        price_floor: the least price, since a fetch costs energy and the host's time on a link that is free.
    """
    return max(price_floor, utilisation * price_scale if interruptible else utilisation)


def cost_of_fetch(value_victim: float, load_ns: float, price: float, copy_ns: float) -> float:
    """What a prefetch costs, right or wrong: the victim's expected load, and the link's time at its price."""
    return value_victim * load_ns + price * copy_ns


def break_even(
    *,
    load_ns: float,
    copy_ns: float,
    horizon: int,
    mean_event_ns: float,
    backlog_ns: float = 0.0,
    value_victim: float = 0.0,
    price: float = 0.0,
) -> float:
    """The precision (probability of use) above which a prefetch pays; inf if it comes too late to save any.

    Above 1: no forecast, however sure, is worth it.
    """
    saved_ns = saved_time(load_ns, copy_ns, horizon, mean_event_ns, backlog_ns)
    if saved_ns <= 0:
        return math.inf
    return cost_of_fetch(value_victim, load_ns, price, copy_ns) / saved_ns


def reuse_probability(decayed_uses: float, intercept: float, slope: float) -> float:
    """q: the probability that the next event of its layer uses an expert of which nothing is foreseen.

    Args:
        decayed_uses: per step (see :mod:`specgate.policy.rules`).
        intercept, slope: fitted by :mod:`specgate.policy.reuse`.
    """
    return min(max(math.exp(intercept + slope * math.log(decayed_uses + 1e-6)), 0.0), 1.0)


def value_of_block(
    now: int,
    layer: int,
    layers: int,
    q: float,
    discount: float,
    hint: tuple[float, int] | None = None,
) -> float:
    """Expected next use of a block, discounted by the events until then; between 0 and 1.

    Args:
        now: the last event whose router has chosen.
        layer: the block's.
        layers: L.
        q: see :func:`reuse_probability`.
        discount: per event.
        hint: the newest forecast that is not over: probability and event.
    """
    until_layer = 1 + (layer - now - 1) % layers  # to the next event of its layer, which lies after now
    if hint is None:
        return float(discount**until_layer * q)
    p, event = hint
    return float(p * discount ** (event - now) + (1 - p) * discount ** (until_layer + layers) * q)
