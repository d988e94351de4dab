"""What the store costs a replay's computing thread: handing forecasts over, the calls around an event.

The store judges forecasts by a thread of its own; the replay's thread selects the next ones, moves their
deadlines and calls :meth:`specgate.runtime.store.ExpertStore.foresee`, per layer and before each token.
That, and the calls around each event, is time in which it launches no kernel. Both are read on the machine at
hand; handing over with the very forecasts of a row and a store in memory of as many slots and experts, which
are small.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from specgate.errors import ConfigError
from specgate.policy.readings import Reading
from specgate.report.record import hardware
from specgate.report.replay_run import hand_over
from specgate.report.replay_script import Script
from specgate.report.replay_settings import LEAST, ReplaySettings, store_settings, variant_of
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_trace import Asked, all_events, asked_of, forecast_plan, oracle_plan
from specgate.runtime.layout import BlockLayout
from specgate.runtime.store import ExpertStore

PACE_NS = 500_000  # from one call of a layer to the next, at least: the store's threads have time to end
ROUNDS = 3  # after one that warms up
SMALL = BlockLayout.make([("values", (32, 32), "float32")])  # an expert that takes no time to move

GIVEN, READ, UNKNOWN = "given", "read", "unknown"


@dataclass
class HandOvers:
    """What handing over costs in each row of a validation.

    Args:
        settings, script, shape: of the replay.
        replayed_on: its machine, as ``specgate.report.record.hardware`` describes it.
        given: microseconds, if they are known; else they are read here where this is that machine, and are 0
            elsewhere, since another host says nothing of it.

    Attributes:
        how: ``given``, ``read`` or ``unknown``.

    Raises:
        ConfigError: ``given`` is no time.
    """

    settings: ReplaySettings
    script: Script
    shape: ModelShape
    replayed_on: Mapping[str, Any]
    given: float | None = None
    how: str = field(init=False)

    def __post_init__(self) -> None:
        if self.given is not None and not (math.isfinite(self.given) and self.given >= 0):
            raise ConfigError(f"--handover-us={self.given} is no time; write microseconds, 0 or more.")
        here = is_machine(self.replayed_on)
        self.how = GIVEN if self.given is not None else READ if here else UNKNOWN

    def of(self, row: Mapping[str, Any]) -> dict[str, float] | None:
        """Microseconds of one hand-over (``us``, ``low``, ``high``); None: the row uses no forecasts.

        Raises:
            ConfigError: the script holds no forecasts.
        """
        if variant_of(row["variant"])[0].foresight is None:
            return None
        if self.how != READ:
            us = self.given or 0.0
            return {"us": us, "low": us, "high": us}
        found = read_handover(self.settings, self.script, self.shape, row["variant"], int(row["slots"]))
        return {"us": found.ns * 1e-3, "low": found.low * 1e-3, "high": found.high * 1e-3}

    def event(self, device: str) -> dict[str, float] | None:
        """Microseconds of the store's calls around an event whose experts are all there (``us``, ``low``,
        ``high``); None: this is not the replay's machine.
        """
        if self.how != READ:
            return None
        found = read_event(self.shape, device)
        return {"us": found.ns * 1e-3, "low": found.low * 1e-3, "high": found.high * 1e-3}


def read_event(shape: ModelShape, device: str, events: int = 2000, pace_ns: int = PACE_NS // 5) -> Reading:
    """Nanoseconds of the computing thread for the store's calls around an event: the median of many.

    Args:
        device: of the store, whose experts are small and all there.
        pace_ns: from one event to the next, at least.
    """
    size: dict[str, Any] = {"layout": SMALL, "layers": shape.layers, "experts": shape.experts}
    chosen, taken = list(range(shape.top_k)), []
    with ExpertStore(None, shape.layers * shape.experts, None, device, **size) as store:
        store.warm()
        for clock in range(events):
            layer, begin = clock % shape.layers, time.perf_counter_ns()
            store.advance(clock + 1)
            store.acquire(layer, chosen)
            store.release(layer, chosen)
            done = time.perf_counter_ns()
            taken.append(done - begin)
            while time.perf_counter_ns() - begin < pace_ns:  # as busy as a thread that launches kernels
                pass
    taken.sort()
    return Reading(statistics.median(taken), taken[len(taken) // 10], taken[-1 - len(taken) // 10])


def is_machine(replayed_on: Mapping[str, Any]) -> bool:
    """Whether this is the machine of a record, as far as processor, cores and GPUs tell."""
    here = hardware()
    return all(here[name] == replayed_on.get(name) for name in ("cpu", "cores", "gpus"))


def read_handover(
    settings: ReplaySettings,
    script: Script,
    shape: ModelShape,
    variant: str,
    slots: int,
    pace_ns: int = PACE_NS,
) -> Reading:
    """Nanoseconds of the computing thread per hand-over of a variant, from the first measured document.

    Args:
        slots: of the device.
        pace_ns: from one call of a layer to the next, at least.

    Raises:
        ConfigError: a variant without forecasts, or a script without them.
    """
    kind, own = variant_of(variant)
    document = script.documents[min(settings.warmup, len(script.documents) - 1)]
    if kind.foresight == "oracle":
        plan = oracle_plan(document, settings.lookahead)
    elif kind.foresight is None or document.p_TPHE is None:
        raise ConfigError(f"There are no forecasts for {variant} in this script; name its own script.")
    else:
        usual = LEAST if kind.eviction == "priced" else settings.threshold
        plan = forecast_plan(document.p_TPHE, usual if own is None else own)
    asked = asked_of(plan, shape.experts)
    # As many experts on their way as in the replay, whose are larger
    room = (
        max(1, (settings.prefetch_mib << 20) // shape.layout(settings.codec).block_bytes) * SMALL.block_bytes
    )
    how = replace(store_settings(settings, kind.eviction), prefetch_copy_bytes=room, prefetch_read_bytes=room)
    size: dict[str, Any] = {"layout": SMALL, "layers": shape.layers, "experts": shape.experts}
    taken = []
    for turn in range(ROUNDS + 1):
        with ExpertStore(None, slots, None, "cpu", how, **size) as store:
            if script.fitted is not None:
                script.fitted.tell(store, kind.eviction)
            if kind.eviction == "belady":
                store.set_future(all_events([document]))
            if slots >= shape.layers * shape.experts:
                store.warm()
            found = _round(store, document.experts_TLK, asked, pace_ns)
        if turn:
            taken.append(found)
    return Reading(statistics.median(taken), min(taken), max(taken))


def _round(
    store: ExpertStore, experts_TLK: list[list[list[int]]], asked: list[list[Asked | None]], pace_ns: int
) -> float:
    """Nanoseconds per hand-over, of all points of a document."""
    taken = clock = 0
    for experts_LK, points in zip(experts_TLK, asked, strict=True):
        taken += _timed(store, clock, points[0])
        for layer, chosen in enumerate(experts_LK):
            begin = time.perf_counter_ns()
            clock += 1
            store.advance(clock)
            store.acquire(layer, chosen)
            taken += _timed(store, clock, points[layer + 1])
            store.release(layer, chosen)
            while time.perf_counter_ns() - begin < pace_ns:  # as busy as a thread that launches kernels
                pass
    return taken / sum(len(points) for points in asked)


def _timed(store: ExpertStore, clock: int, asked: Asked | None) -> int:
    begin = time.perf_counter_ns()
    hand_over(store, clock, asked)
    return time.perf_counter_ns() - begin
