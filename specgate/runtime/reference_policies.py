"""Eviction policies of the ledger in plain Python: which resident block goes first.

A policy sees what happens to blocks and orders them by a key; the block of least key is evicted, and of equal
keys the one of least id. Ticks count calls of ``Ledger.demand`` from 1. All arithmetic is in doubles, in the
order written here: the native core does the same and gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Policy:
    """LRU, and what all policies share: ``last``, the tick of the last arrival or use, orders equal keys."""

    def __init__(self, blocks: int, half_life: float) -> None:
        self.last = [0] * blocks

    def insert(self, block: int, tick: int) -> None:
        """``block`` became resident."""
        self.last[block] = max(self.last[block], tick)

    def use(self, block: int, tick: int) -> None:
        """``block`` is demanded, resident or not."""
        self.last[block] = max(self.last[block], tick)

    def hint(self, block: int, p: float, deadline: int) -> None:
        """``block`` is forecast with probability ``p``, until ``deadline``."""

    def advance(self, now: int) -> None:
        """The clock of deadlines went on to ``now``."""

    def key(self, block: int, tick: int) -> tuple[float, ...]:
        """What orders the blocks at ``tick``, least first."""
        return (self.last[block],)

    def admits(self, new: int, victim: int, tick: int) -> bool:
        """Whether a prefetch of ``new`` may evict ``victim``."""
        return True

    def victim(self, evictable: Iterable[int], tick: int) -> int | None:
        """The block to evict, ``None`` where none may be."""
        return min(evictable, key=lambda block: (*self.key(block, tick), block), default=None)


class LFU(Policy):
    """Fewest uses so far, counted also while the block is absent."""

    def __init__(self, blocks: int, half_life: float) -> None:
        super().__init__(blocks, half_life)
        self.uses = [0] * blocks

    def use(self, block: int, tick: int) -> None:
        super().use(block, tick)
        self.uses[block] += 1

    def key(self, block: int, tick: int) -> tuple[float, ...]:
        return (self.uses[block], self.last[block])


class LFRU(Policy):
    """Least frequency that halves every ``half_life`` ticks.

    ``f`` is the frequency at the tick ``since`` of the last use. At a later tick t it is
    f · 2^(-(t - since) / half_life); its logarithm is log2(f) + since / half_life less what all blocks share.
    """

    def __init__(self, blocks: int, half_life: float) -> None:
        super().__init__(blocks, half_life)
        self.half_life = half_life
        self.f = [0.0] * blocks
        self.since = [0] * blocks

    def use(self, block: int, tick: int) -> None:
        super().use(block, tick)
        self.f[block] = self.f[block] * 2.0 ** (-(tick - self.since[block]) / self.half_life) + 1.0
        self.since[block] = tick

    def key(self, block: int, tick: int) -> tuple[float, ...]:
        if self.f[block] == 0.0:
            return (-math.inf, self.last[block])
        return (math.log2(self.f[block]) + self.since[block] / self.half_life, self.last[block])


class Static(Policy):
    """Least weight, from a list handed in."""

    def __init__(self, blocks: int, half_life: float) -> None:
        super().__init__(blocks, half_life)
        self.weights = [0.0] * blocks

    def key(self, block: int, tick: int) -> tuple[float, ...]:
        return (self.weights[block], self.last[block])


class Forecast(Policy):
    """Least probability of the last forecast. A use consumes it, and it lapses after its deadline."""

    def __init__(self, blocks: int, half_life: float) -> None:
        super().__init__(blocks, half_life)
        self.score = [0.0] * blocks
        self.hinted = [0.0] * blocks
        self.deadline = [0] * blocks

    def use(self, block: int, tick: int) -> None:
        super().use(block, tick)
        self.score[block] = 0.0

    def hint(self, block: int, p: float, deadline: int) -> None:
        self.score[block] = self.hinted[block] = p
        self.deadline[block] = deadline

    def advance(self, now: int) -> None:
        for block, deadline in enumerate(self.deadline):
            if deadline < now:
                self.score[block] = self.hinted[block] = 0.0

    def key(self, block: int, tick: int) -> tuple[float, ...]:
        return (self.score[block], self.last[block])

    def admits(self, new: int, victim: int, tick: int) -> bool:
        return self.score[victim] < self.hinted[new]


class Belady(Policy):
    """Farthest next use, from the list of events to come: event i is the demand of tick i + 1."""

    def __init__(self, blocks: int, half_life: float) -> None:
        super().__init__(blocks, half_life)
        self.future: Sequence[Sequence[int]] = []

    def next_use(self, block: int, tick: int) -> float:
        """Tick of the next event after ``tick`` that uses ``block``, infinity where there is none."""
        return next(
            (i + 1 for i, event in enumerate(self.future) if i + 1 > tick and block in event), math.inf
        )

    def key(self, block: int, tick: int) -> tuple[float, ...]:
        return (-self.next_use(block, tick),)

    def admits(self, new: int, victim: int, tick: int) -> bool:
        return self.next_use(new, tick) < self.next_use(victim, tick)


class Priced(LFRU):
    """Least value: the expected use of a block, discounted by how many events away it is.

    Layers run in turns; the last demanded block says which one runs. With a live forecast (p, deadline) the
    value is ``p * discount^(deadline - now) + (1 - p) * discount^(ahead + layers) * q``, without one
    ``discount^ahead * q``, where ``ahead`` is the number of events until the block's layer runs again (1 to
    ``layers``) and q the probability of a use then, from frequency and recency:
    ``min(1, exp(intercept + slope * log(f + 1e-6)))``, f uses per step, halved every ``half_life`` steps. A
    use consumes a forecast, and it lapses after its deadline.
    """

    def __init__(self, blocks: int, half_life: float) -> None:
        super().__init__(blocks, half_life)
        self.blocks, self.now, self.current = blocks, 0, 0
        self.p = [0.0] * blocks
        self.deadline = [0] * blocks
        self.live = [False] * blocks
        self.set_reuse(0, half_life, 0.99, 0.0, 1.0)

    def set_reuse(
        self, experts: int, half_life: float, discount: float, intercept: float, slope: float
    ) -> None:
        """``experts`` of a layer (0: all blocks are of one), and what ``specgate.policy.reuse`` fitted."""
        self.experts = experts
        self.layers = max(1, -(-self.blocks // experts)) if experts else 1
        self.steps, self.half_life = half_life, half_life * self.layers
        self.discount, self.intercept, self.slope = discount, intercept, slope

    def layer(self, block: int) -> int:
        return block // self.experts if self.experts else 0

    def use(self, block: int, tick: int) -> None:
        super().use(block, tick)
        self.live[block] = False
        self.current = self.layer(block)

    def hint(self, block: int, p: float, deadline: int) -> None:
        self.p[block], self.deadline[block], self.live[block] = p, deadline, True

    def advance(self, now: int) -> None:
        self.now = now
        for block, deadline in enumerate(self.deadline):
            if deadline < now:
                self.live[block] = False

    def value(self, block: int, tick: int) -> float:
        ahead = (self.layer(block) - self.current % self.layers - 1) % self.layers + 1
        share = 1.0 - 2.0 ** (-1.0 / self.steps)
        uses = share * self.f[block] * 2.0 ** (-(tick + ahead - self.since[block]) / self.half_life)
        q = min(1.0, math.exp(self.intercept + self.slope * math.log(uses + 1e-6)))
        if not self.live[block]:
            return float(self.discount**ahead * q)
        due, p = max(self.deadline[block] - self.now, 1), self.p[block]
        return float(p * self.discount**due + (1.0 - p) * self.discount ** (ahead + self.layers) * q)

    def victim(self, evictable: Iterable[int], tick: int) -> int | None:
        first: dict[int, int] = {}  # of each layer, the least used block without a forecast
        candidates = []
        for block in evictable:
            if self.live[block]:
                candidates.append(block)
                continue
            layer = self.layer(block)
            if layer not in first or self._order(block, tick) < self._order(first[layer], tick):
                first[layer] = block
        candidates += first.values()
        return min(candidates, key=lambda b: (self.value(b, tick), self.last[b], b), default=None)

    def _order(self, block: int, tick: int) -> tuple[float, ...]:
        return (*self.key(block, tick), block)

    def admits(self, new: int, victim: int, tick: int) -> bool:
        return self.value(victim, tick) < self.value(new, tick)


POLICIES: dict[str, type[Policy]] = {
    "lru": Policy,
    "lfu": LFU,
    "lfru": LFRU,
    "static": Static,
    "forecast": Forecast,
    "belady": Belady,
    "priced": Priced,
}
"""Every policy by its name in ``Ledger(policy=...)``."""
