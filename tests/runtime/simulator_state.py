"""What docs/simulator.md calls room, keys and values, in plain Python: half of the long reference.

Letters: b block, n event, e the event a forecast is about, t time in ns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
from numpy.typing import NDArray

from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


@dataclass
class Transfer:
    """A prefetch that holds a slot: ``stage`` is "read", "staged" or "copy"."""

    e: int
    p: float
    low: bool
    stage: str = ""


@dataclass
class Copy:
    """What the link does beside demands: work that was done before ``since``, and all of it."""

    b: int
    since: float
    done: float
    work: float
    upgrade: bool = False

    @property
    def end(self) -> float:
        return self.since + (self.work - self.done)


class State:
    """Where everything is, and who goes first."""

    def __init__(
        self,
        workload: Workload,
        costs: Costs,
        rules: Rules,
        slots: Sequence[int],
        host_slots: int,
        warm: Sequence[int] = (),
        warm_host: Sequence[int] = (),
    ) -> None:
        self.w, self.c, self.r, self.slots = workload, costs, rules, list(slots)
        self.L, self.E = workload.layers, workload.experts
        self.events = [workload.event(n) for n in range(workload.events)]
        self.copy, self.read = costs.copy_ns, costs.read_ns
        self.host_slots = host_slots
        self.everything = host_slots >= self.L * self.E
        self.host: list[int] = list(warm_host)  # least recently touched first
        self.present: dict[int, bool] = dict.fromkeys(warm, False)  # block: prefetched and not used
        self.came_for: dict[int, int] = {}
        self.flying: dict[int, Transfer] = {}
        self.queue: dict[int, tuple[int, float, bool]] = {}  # block: e, p, whether low
        self.low: set[int] = set()  # present in an approximate copy
        self.spent: dict[int, int] = {}  # bytes of the prefetch that brought a block
        self.low_copy = costs.link_latency_ns + rules.low_bytes / costs.link_bytes_per_ns
        self.hints: dict[int, tuple[float, int]] = {}
        self.uses: dict[int, list[int]] = defaultdict(list)
        self.landed: dict[int, int] = {}
        self.marks: set[int] = set()
        self.pinned: set[int] = set()
        self.n, self.t, self.router = -1, 0.0, 0.0
        self.link: Copy | None = None
        self.file: tuple[int, float, bool] | None = None  # block, end, given up
        self.link_free = self.file_free = self.complete = 0.0  # complete: an event's experts are all there
        self.copied: list[tuple[float, float]] = []  # from, to: on the link while no event waited
        self.points: list[tuple[float, int]] = []
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: list[Counter[str]] = [Counter() for _ in range(workload.documents)]
        self.times: list[dict[str, float]] = [defaultdict(float) for _ in range(workload.documents)]
        self.document = 0

    # ---- Room

    def pool(self, b: int) -> int:
        return 0 if len(self.slots) == 1 else b // self.E

    def free(self, pool: int) -> int:
        return self.slots[pool] - sum(self.pool(b) == pool for b in [*self.present, *self.flying])

    def in_host(self, b: int) -> bool:
        return self.everything or b in self.host

    def touch(self, b: int) -> None:
        if b in self.host:
            self.host.remove(b)
            self.host.append(b)

    def into_host(self, b: int) -> None:
        self.touch(b)
        if b not in self.host and not self.everything and self.host_slots:
            if len(self.host) == self.host_slots:
                self.host.pop(0)
            self.host.append(b)

    # ---- The host

    def part(self, part_N: NDArray[np.float64] | None, n: int) -> float:
        return 0.0 if part_N is None else float(part_N[n])

    def longer(self, begin: float, length: float) -> float:
        """What copies that nobody waited for add to the host's work."""
        busy, end = 0.0, begin + length
        for since, to in self.copied:
            busy += min(to, end) - since if begin <= since < end else 0.0
        return self.c.link_slowdown * busy

    # ---- Keys

    def decayed(self, b: int) -> float:
        step = self.n // self.L
        return sum(2.0 ** (-(step - n // self.L) / self.r.half_life) for n in self.uses[b])

    def next_event(self, b: int) -> int:
        n = self.n + 1
        while n % self.L != b // self.E:
            n += 1
        return n

    def next_use(self, b: int) -> float:
        later = range(self.n + 1, len(self.events))
        return next((n for n in later if n % self.L == b // self.E and b % self.E in self.events[n]), inf)

    def hint(self, b: int) -> tuple[float, int] | None:
        found = self.hints.get(b)
        return found if found and found[1] > self.n else None

    def value(self, b: int) -> float:
        r = self.r
        f = (1 - 2.0 ** (-1 / r.half_life)) * self.decayed(b)
        q = min(max(exp(r.intercept + r.slope * log(f + 1e-6)), 0.0), 1.0)
        ahead, hint = self.next_event(b) - self.n, self.hint(b)
        if hint is None:
            return float(r.discount**ahead * q)
        p, e = hint
        return float(p * r.discount ** (e - self.n) + (1 - p) * r.discount ** (ahead + self.L) * q)

    def last(self, b: int) -> int:
        return max([0, self.landed.get(b, 0), *(n + 1 for n in self.uses[b][-1:])])

    def key(self, b: int) -> tuple[float, ...]:
        last, used, hint = self.last(b), self.uses[b], self.hint(b)
        keys: dict[str, Callable[[], tuple[float, ...]]] = {
            "none": lambda: (last,),
            "lru": lambda: (last,),
            "lfu": lambda: (len(used), last),
            "lfru": lambda: (self.decayed(b), last),
            "lru2": lambda: (used[-2] + 1 if len(used) > 1 else -inf, last),
            "static": lambda: (self.r.weights_LE[b // self.E, b % self.E], last),  # type: ignore[index]
            "forecast": lambda: (hint[0] if hint else 0.0, last),
            "belady": lambda: (-self.next_use(b),),
            "priced": lambda: (self.value(b), last),
        }
        return (b not in self.marks, *keys[self.r.eviction](), b)

    def victim(self, pool: int) -> int | None:
        those = [b for b in self.present if b not in self.pinned and self.pool(b) == pool]
        if self.r.eviction == "priced":  # those that no forecast names: of each layer the least used
            named = [b for b in those if self.hint(b)]
            for layer in range(self.L):
                own = [b for b in those if b // self.E == layer and b not in named]
                named += sorted(own, key=lambda b: (b not in self.marks, self.decayed(b), self.last(b), b))[
                    :1
                ]
            those = named
        return min(those, key=self.key, default=None)
