"""The rules by which a simulation or a store decides: plain numbers that a policy makes and the core reads.

Letters: L MoE layers, E experts of a layer. A step decodes one token of every sequence; an event is one MoE
layer of a step; block = layer * E + expert. n is the event that is worked on, p a forecast's probability, h
its horizon (1 is the next event).

f_b, the decayed uses of block b per step: ``f_b = (1 - g) * sum(g ** (s - s_i))`` with ``g = 2 ** (-1 /
half_life)``, s the step of event n, s_i the steps whose event of b's layer used b (once, however many
tokens). An expert that every step uses has f_b near 1. Steps are counted on from one document to the next.

Every field has one meaning, stated in :class:`Rules`; fields that the chosen rules do not use are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgate.errors import ConfigError

#: Who is evicted first.
EVICTIONS = ("none", "lru", "lfu", "lfru", "lru2", "static", "forecast", "belady", "priced")
#: Who stays after it was demanded.
ADMISSIONS = ("always", "gate")
#: Which of the foreseen experts are fetched ahead.
PREFETCHES = ("none", "threshold", "top", "cumulative", "priced")
#: The deepest horizon that a rule may look at: horizons are kept as uint8.
MAX_DEPTH = 255
#: Running means (link utilisation, mean event, hit share) forget by half in so many events.
DECAY_EVENTS = 64.0


@dataclass(frozen=True, eq=False)
class Rules:
    """What a policy decided; the simulator and the store act by it.

    Attributes:
        eviction: the least key goes first, ties by block, least first. ``none``: nothing stays after its
            event; ``lru``: last use; ``lfu``: (uses, last use); ``lfru``: decayed uses (``half_life``), then
            last use; ``lru2``: time of the last use but one (-inf if there is none), then last use;
            ``static``: ``weights_LE``, then last use; ``forecast``: p of the live hint (0 without), then last
            use; ``belady``: the next use that is farthest goes first; ``priced``: value (see below), then
            last use.
        half_life: steps (events of its own layer) in which a use counts half; ``lfru``, ``gate``, ``priced``.
        weights_LE: float64, keys of ``static``; None elsewhere.
        admission: ``always``: what was demanded stays; ``gate``: what a demand brought into a full cache and
            is not hotter (decayed uses) than the coldest unpinned block that stays is the next to go, until
            it is used again and judged anew.
        prefetch: ``none``; ``threshold``: p >= the target layer's threshold; ``top``: the ``width`` most
            probable of each horizon; ``cumulative``: by descending p until their sum reaches
            ``mass * top_k``, that one included; ``priced``: by break-even (specgate.policy.pricing).
        thresholds_L: float64 per TARGET layer; None unless ``threshold``.
        load_rise, full_rise, host_rise: ``threshold`` only. What is compared with p is
            ``t + (1 - t) * min(1, load_rise * u + full_rise * d + host_rise * m)`` with t the layer's
            threshold, u the link's running utilisation by demand, d the share of device slots in use, m the
            share of host slots in use (0 if every expert is in host memory). All 0: a fixed threshold.
        width: experts of each horizon, for ``top``.
        mass: share of ``top_k``, for ``cumulative``.
        depth: the largest horizon that is fetched ahead. Hints beyond it still decide on eviction.
        adaptive: the depth of a point is 1 if the normalised entropy of its candidates at h = 1 is above
            ``entropy_high`` or the link's backlog is above ``backlog_high`` mean events; else ``depth``.
        entropy_high, backlog_high: see ``adaptive``.
        discount, intercept, slope: of ``priced``, fitted by specgate.policy.reuse. An expert that no live
            hint names has, at the next event of its layer, the probability
            ``q_b = clip(exp(intercept + slope * log(f_b + 1e-6)), 0, 1)`` and the value
            ``discount ** (next event of its layer - n) * q_b``; with a live hint (p, event e) the value is
            ``p * discount ** (e - n) + (1 - p) * discount ** (next event of its layer + L - n) * q_b``.
            n is the last event whose router has chosen, the next event of a layer lies after it (n + 1 to
            n + L).
        price_scale: factor on the link's utilisation as the price of a prefetch where a demand can interrupt
            it (``link_chunk_bytes`` > 0). price_floor: the least such price.
        low_bytes: bytes of an approximate copy of an expert, fetched where p is below break-even for all
            bytes but above it for these; 0: never. Changes values: only where the user allows it.
    """

    eviction: str = "lru"
    half_life: float = 64.0
    weights_LE: NDArray[np.float64] | None = None
    admission: str = "always"
    prefetch: str = "none"
    thresholds_L: NDArray[np.float64] | None = None
    load_rise: float = 0.0
    full_rise: float = 0.0
    host_rise: float = 0.0
    width: int = 0
    mass: float = 0.0
    depth: int = 1
    adaptive: bool = False
    entropy_high: float = 1.0
    backlog_high: float = math.inf
    discount: float = 0.99
    intercept: float = 0.0
    slope: float = 1.0
    price_scale: float = 1.0
    price_floor: float = 0.0
    low_bytes: int = 0

    def __post_init__(self) -> None:
        _one_of("eviction", self.eviction, EVICTIONS)
        _one_of("admission", self.admission, ADMISSIONS)
        _one_of("prefetch", self.prefetch, PREFETCHES)
        if not (math.isfinite(self.half_life) and self.half_life > 0):
            raise ConfigError(f"half_life={self.half_life} steps is not a positive number; 64 is usual.")
        if not 1 <= self.depth <= MAX_DEPTH:
            raise ConfigError(
                f"depth={self.depth} is no horizon; choose 1 (the next event) to {MAX_DEPTH}, "
                "and prefetch=none to fetch nothing ahead."
            )
        for name in (
            "load_rise",
            "full_rise",
            "host_rise",
            "price_scale",
            "price_floor",
            "backlog_high",
            "entropy_high",
        ):
            value = float(getattr(self, name))
            if math.isnan(value) or value < 0:
                raise ConfigError(f"{name}={value} is negative or no number; choose 0 or more.")
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"discount={self.discount} per event is outside 0 to 1; 0.99 is usual.")
        if not (math.isfinite(self.intercept) and math.isfinite(self.slope) and self.slope >= 0):
            raise ConfigError(
                f"intercept={self.intercept} and slope={self.slope} must be finite and the slope not "
                "negative, or seldom used experts would count more; fit them anew."
            )
        if self.prefetch == "top" and self.width < 1:
            raise ConfigError(f"width={self.width} fetches nothing; choose 1 or more, or prefetch=none.")
        if self.prefetch == "cumulative" and not 0 < self.mass <= 1:
            raise ConfigError(f"mass={self.mass} is no share of the experts per token; choose 0 < mass <= 1.")
        if self.low_bytes < 0:
            raise ConfigError(f"low_bytes={self.low_bytes} is negative; 0 fetches no approximate copies.")
        if self.low_bytes and self.prefetch != "priced":
            raise ConfigError(
                f"low_bytes={self.low_bytes} needs prefetch=priced, not {self.prefetch}: only a price tells "
                "when fewer bytes are worth it."
            )
        _array(self, "weights_LE", 2, self.eviction == "static", "eviction=static")
        _array(self, "thresholds_L", 1, self.prefetch == "threshold", "prefetch=threshold")
        if self.thresholds_L is not None and not (
            self.thresholds_L.min(initial=0) >= 0 and self.thresholds_L.max(initial=0) <= 1
        ):
            raise ConfigError(f"thresholds_L={self.thresholds_L} are no probabilities; choose 0 to 1.")

    @property
    def foresees(self) -> bool:
        """Whether forecasts make any difference to these rules."""
        return self.prefetch != "none" or self.eviction in ("forecast", "priced")

    def plain(self) -> dict[str, Any]:
        """As a dictionary of numbers, strings and lists, for JSON and for ``weights_only`` checkpoints."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Rules:
        """From :meth:`plain`.

        Raises:
            ConfigError: a field that does not exist, or a value that makes no sense.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"{', '.join(unknown)} are no rules; write the file anew.")
        return cls(**values)


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{field}={value} is unknown; choose one of {', '.join(known)}.")


def _array(rules: Rules, field: str, dimensions: int, needed: bool, why: str) -> None:
    """Makes a field a contiguous float64 array that cannot be written to."""
    value: ArrayLike | None = getattr(rules, field)
    if value is None:
        if needed:
            raise ConfigError(f"{why} needs {field}; fit the policy on training documents.")
        return
    array = np.array(value, dtype=np.float64, order="C")
    if array.ndim != dimensions or not np.isfinite(array).all():
        raise ConfigError(
            f"{field} of shape {array.shape} must be finite numbers in {dimensions} dimension(s); "
            "fit the policy anew."
        )
    array.setflags(write=False)
    object.__setattr__(rules, field, array)
