"""Who is evicted, in 40 lines and without time: what each rule must count where nothing is fetched ahead."""

from __future__ import annotations

from collections import defaultdict
from math import inf

from specgate.policy.rules import Rules
from specgate.policy.workload import Workload


def counts_of(workload: Workload, rules: Rules, slots: int) -> dict[str, int]:
    """Hits, misses and evictions; one pool of slots, everything in host memory."""
    L, E, events = workload.layers, workload.experts, [workload.event(n) for n in range(workload.events)]
    uses: dict[int, list[int]] = defaultdict(list)  # of each block, its events
    here: set[int] = set()
    hits = misses = evictions = 0

    def decayed(b: int, n: int) -> float:
        return sum(2.0 ** -((n // L - e // L) / rules.half_life) for e in uses[b])

    def key(b: int, n: int) -> tuple[float, ...]:
        used = uses[b]
        last = used[-1] if used else -1
        future = next((m for m in range(n + 1, len(events)) if m % L == b // E and b % E in events[m]), inf)
        keys: dict[str, tuple[float, ...]] = {
            "none": (last,), "lru": (last,), "lfu": (len(used), last), "lfru": (decayed(b, n), last),
            "lru2": (used[-2] if len(used) > 1 else -inf, last), "belady": (-future,),
        }  # fmt: skip
        if rules.weights_LE is not None:
            keys["static"] = (float(rules.weights_LE[b // E, b % E]), last)
        return (*keys[rules.eviction], b)

    for n, event in enumerate(events):
        asked = {n % L * E + e for e in event}
        for b in asked:
            uses[b].append(n)
        hits += len(asked & here)
        misses += len(asked - here)
        while len(here | asked) > slots:
            here.remove(min(here - asked, key=lambda b: key(b, n)))
            evictions += 1
        here |= asked
        if rules.eviction == "none":
            evictions += len(here)
            here.clear()
    return {"hits": hits, "host_hits": misses, "evictions": evictions}
