"""A simulation of a model's calls in virtual time: what rules would cost on a machine that need not exist.

docs/simulator.md states what happens when, and what is left out. The inner loop is native (csrc/simulator.h).

Letters: D documents, S steps, L MoE layers, E experts of a layer, N = S * L events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specgate.errors import ConfigError
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload
from specgate.runtime.native import require

#: What is counted per document, in whole numbers.
COUNTS = (
    *("steps", "hits", "late", "host_hits", "misses", "low_hits", "demand_bytes", "prefetch_bytes"),
    *("wasted_bytes", "file_bytes", "evictions", "prefetches", "stale", "refused"),
)
#: What is measured per document, in nanoseconds.
TIMES = ("late_ns", "stall_ns", "compute_ns", "total_ns", "link_busy_ns")
#: What :meth:`Simulator.advance` returns, number by number.
OBSERVATION = (
    *("layer", "backlog", "open_slots", "mean_p_1", "mean_p_2", "mean_p_3", "max_p_1", "max_p_2", "max_p_3"),
    *("entropy_1", "entropy_2", "entropy_3", "hit_share", "stall_share", "link_use"),
)


@dataclass(frozen=True, eq=False)
class SimulationResult:
    """What happened in each document.

    Attributes:
        counts: int64 ``[D]`` of each of COUNTS.
        times: float64 ``[D]`` of each of TIMES.
        tokens_D: float64, tokens that were decoded or read.
    """

    counts: dict[str, NDArray[np.int64]]
    times: dict[str, NDArray[np.float64]]
    tokens_D: NDArray[np.float64]

    def of_documents(self, name: str) -> NDArray[Any]:
        """``[D]``, of COUNTS or TIMES.

        Raises:
            ConfigError: a name that is neither.
        """
        if name in self.counts:
            return self.counts[name]
        if name in self.times:
            return self.times[name]
        raise ConfigError(f"{name} is not counted; choose one of {', '.join(COUNTS + TIMES)}.")

    def total(self, name: str) -> float:
        """Over all documents; whole numbers stay whole numbers."""
        return self.of_documents(name).sum().item()

    def totals(self) -> dict[str, float]:
        """All of them, for JSON."""
        return {name: self.total(name) for name in COUNTS + TIMES}

    @property
    def demands_D(self) -> NDArray[np.int64]:
        """Experts that events asked for."""
        c = self.counts
        return c["hits"] + c["low_hits"] + c["late"] + c["host_hits"] + c["misses"]

    @property
    def hit_rate(self) -> float:
        """Share of the demanded experts that were on the device; one that was on its way is no hit."""
        return float(self.counts["hits"].sum() / max(1, self.demands_D.sum()))

    @property
    def tokens_per_second(self) -> float:
        """Over all documents."""
        return float(self.tokens_D.sum() / max(self.total("total_ns"), 1e-300) * 1e9)

    @property
    def tokens_per_second_D(self) -> NDArray[np.float64]:
        """Of each document."""
        return self.tokens_D / np.maximum(self.times["total_ns"], 1e-300) * 1e9

    @property
    def stall_share(self) -> float:
        """Share of the time in which the model waits."""
        return self.total("stall_ns") / max(self.total("total_ns"), 1e-300)


def tokens_of_documents(workload: Workload) -> NDArray[np.float64]:
    """Tokens of each document, ``[D]``: of a step, its busiest layer's uses of experts over top_k."""
    until_M1 = np.concatenate([[0], np.cumsum(workload.tokens_M, dtype=np.int64)])
    uses_N = until_M1[workload.event_start_N1[1:]] - until_M1[workload.event_start_N1[:-1]]
    tokens_S = uses_N.reshape(workload.steps, workload.layers).max(axis=1) / workload.top_k
    summed_D = np.bincount(workload.document_S, weights=tokens_S, minlength=workload.documents)
    return summed_D.astype(np.float64)


class Simulator:
    """A simulation that can be run at once, or from forecast to forecast with the decisions taken outside.

    Args:
        workload: calls and forecasts.
        costs: of the same events.
        rules: who is evicted, admitted and fetched ahead. ``advance`` and ``act`` take the place of its
            prefetch rule.
        device_slots: experts that fit the device: one number for all layers, or one for each.
        host_slots: experts that fit host memory; None or L * E: all of them.
        warm: blocks (layer * E + expert) on the device at first.
        warm_host: blocks in host memory at first, the first to go first. Ignored where all fit.

    Raises:
        ConfigError: arrays that do not fit together, or numbers that make no sense.
        BudgetError: an event, or ``warm``, needs more slots than there are.
        StoreError: there is no native core.
    """

    def __init__(
        self,
        workload: Workload,
        costs: Costs,
        rules: Rules,
        device_slots: ArrayLike,
        host_slots: int | None = None,
        warm: Iterable[int] = (),
        warm_host: Iterable[int] = (),
    ) -> None:
        blocks = workload.layers * workload.experts
        self.workload = workload
        self._native = require().Simulator(
            workload=workload,
            costs=costs,
            rules=rules,
            slots=_whole("device_slots", device_slots),
            host_slots=blocks if host_slots is None else _whole("host_slots", host_slots)[0],
            warm=[int(b) for b in warm],
            warm_host=[int(b) for b in warm_host],
        )

    def run(self) -> SimulationResult:
        """From where it stands to the end, by the rules. Ctrl-C stops it."""
        self._native.run()
        return self.result()

    def reset(self) -> None:
        """Back to the beginning."""
        self._native.reset()

    def advance(self) -> NDArray[np.float32] | None:
        """On to where the next point's forecasts are known: OBSERVATION of it, or None at the end.

        All numbers are finite. layer: of the point, 0 to 1; backlog: what the link has to do, in mean events;
        open_slots: share of slots that are free or hold an expert that is neither in use nor foreseen; mean
        and max p and the normalised entropy of the point's candidates at horizons 1 to 3; shares of hits,
        of stalled time and of the link's time that demands use, over about the last 64 events.
        """
        if not self._native.advance():
            return None
        return np.array(self._native.observe(), dtype=np.float32)

    def act(self, threshold: float, depth: int) -> None:
        """Fetch what the point foresees with at least this probability up to this horizon; once per point.

        Raises:
            ConfigError: a threshold that is no number.
        """
        if not threshold >= 0:
            raise ConfigError(f"threshold={threshold} is no probability; choose 0 to 1, or 2 to fetch none.")
        self._native.act(float(threshold), int(depth))

    @property
    def event(self) -> int:
        """The event that is worked on."""
        return int(self._native.event())

    @property
    def in_use(self) -> bool:
        """Whether that event's router has chosen: its experts have slots and cannot go."""
        return bool(self._native.in_use())

    @property
    def now_ns(self) -> float:
        """Virtual time."""
        return float(self._native.now())

    def resident(self) -> list[int]:
        """Blocks on the device, ascending."""
        return list(self._native.resident())

    def result(self) -> SimulationResult:
        """Of what has been simulated so far."""
        found: Mapping[str, list[Any]] = self._native.tallies()
        return SimulationResult(
            counts={name: np.array(found[name], dtype=np.int64) for name in COUNTS},
            times={name: np.array(found[name], dtype=np.float64) for name in TIMES},
            tokens_D=tokens_of_documents(self.workload),
        )


def simulate(
    workload: Workload,
    costs: Costs,
    rules: Rules,
    device_slots: ArrayLike,
    host_slots: int | None = None,
    warm: Iterable[int] = (),
    warm_host: Iterable[int] = (),
) -> SimulationResult:
    """All of a workload by the rules; see :class:`Simulator` for the arguments and errors."""
    return Simulator(workload, costs, rules, device_slots, host_slots, warm, warm_host).run()


def _whole(name: str, value: ArrayLike) -> list[int]:
    numbers = np.atleast_1d(np.asarray(value))
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ConfigError(f"{name}={value!r} is no whole number, or one per layer; give such.")
    return [int(n) for n in numbers]
