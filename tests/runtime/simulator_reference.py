"""docs/simulator.md in plain Python, as slow as it likes: no heaps, no caches, every key from the whole past.

Letters: b block, n event, e the event a forecast is about, t time in ns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from math import inf, log
from typing import Any

from tests.runtime.simulator_state import Copy, State, Transfer


class Reference(State):
    """Runs everything when made; ``counts`` and ``times`` per document, ``present`` at the end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for n in range(len(self.events)):
            self.event(n)

    # ---- Prefetches

    def utilisation(self) -> float:
        return self.sums["busy"] / self.sums["time"] if self.sums["time"] else 0.0

    def mean_event(self) -> float:
        first = float(self.c.pre_ns_N[0] + self.c.exec_ns_N[0])
        return self.sums["work"] / self.sums["count"] if self.sums["count"] else first

    def backlog(self) -> float:
        free = max(self.t, self.link_free, self.link.end if self.link else 0.0)
        waiting = len(self.queue) + sum(x.stage != "copy" for x in self.flying.values())
        return free - self.t + waiting * self.copy

    def entropy(self, point: int) -> float:
        ps = [p for h, _, p in self.w.forecasts.at(point) if h == 1 and p > 0] if self.w.forecasts else []
        return -sum(p / sum(ps) * log(p / sum(ps)) for p in ps) / log(self.E) if self.E > 1 else 0.0

    def arrive(self, point: int) -> None:
        if self.w.forecasts is None:
            return
        step, place = divmod(point, self.L + 1)
        own: dict[int, tuple[int, float, int, float]] = {}
        seen: Counter[int] = Counter()
        before: dict[int, float] = defaultdict(float)
        order = []
        for h, expert, p in self.w.forecasts.at(point):
            e = step * self.L + place + h - 1
            if e <= self.n or e >= len(self.events):
                continue
            if self.w.document_S[e // self.L] != self.w.document_S[step]:
                continue
            b = e % self.L * self.E + expert
            if b not in own:
                own[b] = (h, p, seen[h], before[h])
                self.hints[b] = (p, e)
                order.append((b, e))
            seen[h] += 1
            before[h] += p
        r = self.r
        deep = r.depth
        if r.adaptive and (
            self.entropy(point) > r.entropy_high or self.backlog() > r.backlog_high * self.mean_event()
        ):
            deep = 1
        worth: dict[int, float] = {}
        for pool in range(len(self.slots)):
            goes = self.victim(pool)
            worth[pool] = 0.0 if self.free(pool) else inf if goes is None else self.value(goes)
        for b, e in order:
            h, p, rank, sum_before = own[b]
            if h > deep or b in self.present or b in self.flying:
                continue
            low = False
            if r.prefetch == "threshold":
                assert r.thresholds_L is not None
                t, free = r.thresholds_L[b // self.E], sum(self.free(i) for i in range(len(self.slots)))
                full = (sum(self.slots) - free) / sum(self.slots)
                host = 0.0 if self.everything or not self.host_slots else len(self.host) / self.host_slots
                rise = r.load_rise * self.utilisation() + r.full_rise * full + r.host_rise * host
                wanted = p >= t + (1 - t) * min(1.0, rise)
            elif r.prefetch == "top":
                wanted = rank < r.width
            elif r.prefetch == "cumulative":
                wanted = sum_before < r.mass * self.w.top_k
            elif r.prefetch == "priced":
                time = h * self.mean_event() - self.ahead(b, p, e)
                wanted = self.pays(b, p, time, self.copy, worth[self.pool(b)])
                if not wanted and r.low_bytes:
                    wanted = low = self.pays(b, p, time, self.low_copy, worth[self.pool(b)])
            else:
                wanted = False
            if wanted:
                self.queue[b] = (e, p, low)

    def ahead(self, b: int, p: float, e: int) -> float:
        goes_on = max(self.t, self.complete)
        free = max(self.t, self.link_free, self.link.end if self.link else 0.0)
        staged = [x for x in self.flying.values() if x.stage == "staged"]
        before = [x for x, (f, q, _) in self.queue.items() if self.in_host(x) and (f, -q, x) < (e, -p, b)]
        return max(0.0, free - goes_on) + len([*staged, *(x for x in before if x != b)]) * self.copy

    def pays(self, b: int, p: float, time: float, copy: float, worth: float) -> bool:
        load = self.copy + (0.0 if self.in_host(b) else self.read)
        saved = load - max(0.0, copy - time)
        price = self.utilisation() * (self.r.price_scale if self.c.link_chunk_bytes else 1.0)
        price = max(self.r.price_floor, price)
        return p * min(max(saved, 0.0), load) > worth * load + price * copy

    def start(self, b: int) -> bool:
        e, p, low = self.queue.pop(b)
        pool = self.pool(b)
        if not self.free(pool):
            old = self.victim(pool)
            if old is None or not self.admitted(b, e, p, old):
                self.count("refused")
                return False
            self.evict(old)
        self.flying[b] = Transfer(e, p, low)
        self.spent[b] = self.r.low_bytes if low else self.c.expert_bytes
        self.count("prefetches")
        self.count("prefetch_bytes", self.spent[b])
        return True

    def admitted(self, b: int, e: int, p: float, old: int) -> bool:
        hint = self.hint(old)
        if hint and hint[1] <= e and hint[0] >= p:
            return False
        if self.r.eviction == "belady":
            return self.next_use(b) < self.next_use(old)
        if self.r.eviction == "forecast":
            return (hint[0] if hint else 0.0) < p
        return self.r.eviction != "priced" or self.value(b) > self.value(old)

    def start_transfers(self) -> None:
        def turn(b: int) -> tuple[float, ...]:
            e, p, _ = self.queue[b]
            return e, -p, b

        if not self.link and self.link_free <= self.t:
            staged = [b for b, x in self.flying.items() if x.stage == "staged"]
            chosen = min(staged, key=lambda b: (self.flying[b].e, -self.flying[b].p, b), default=None)
            for b in sorted([b for b in self.queue if self.in_host(b)], key=turn):
                if chosen is None and self.start(b):
                    chosen = b
            if chosen is not None:
                self.flying[chosen].stage = "copy"
                work = self.slower(self.low_copy if self.flying[chosen].low else self.copy)
                self.link = Copy(chosen, self.t, 0.0, work)
            else:
                self.upgrade()
            self.times[self.document]["link_busy_ns"] += self.link.work if self.link else 0.0
        if not self.file and self.file_free <= self.t:
            for b in sorted([b for b in self.queue if not self.in_host(b)], key=turn):
                if not self.file and self.start(b):
                    self.flying[b].stage = "read"
                    self.file = (b, self.t + self.read, False)
                    self.count("file_bytes", self.c.expert_bytes)

    def upgrade(self) -> None:
        """The exact copy after an approximate one."""
        hints = {b: self.hint(b) for b in self.low - self.pinned if self.in_host(b)}
        order = [(hint[1], -hint[0], b) for b, hint in hints.items() if hint]
        if order:
            b = min(order)[2]
            self.link = Copy(b, self.t, 0.0, self.slower(self.copy), upgrade=True)
            self.spent[b] += self.c.expert_bytes
            self.count("prefetch_bytes", self.c.expert_bytes)

    def land(self) -> None:
        if self.link and self.link.end <= self.t:
            b, upgraded = self.link.b, self.link.upgrade
            self.link = None
            if upgraded:
                self.low.discard(b)
            elif b in self.flying:
                came = self.flying.pop(b)
                self.came_for[b] = came.e
                self.low |= {b} if came.low else set()
                self.present[b] = True
                self.landed[b] = self.n + 1
                self.marks.discard(b)
        if self.file and self.file[1] <= self.t:
            b, _, given_up = self.file
            self.file = None
            self.into_host(b)
            if b in self.flying and not given_up:
                self.flying[b].stage = "staged"

    def work(self, until: float, waits: bool = False) -> None:
        """The link, the file and the forecasts until a time; ``waits``: the event does."""
        while True:
            self.land()
            while self.points and self.points[0][0] <= self.t:
                self.arrive(self.points.pop(0)[1])
            if self.t >= until:
                return
            self.start_transfers()
            moments = [until, *(known for known, _ in self.points[:1])]
            if self.link or self.link_free > self.t:
                moments.append(self.link.end if self.link else self.link_free)
            if self.file or self.file_free > self.t:
                moments.append(self.file[1] if self.file else self.file_free)
            if self.link and not waits:
                self.copied.append((self.t, min(moments)))
            self.t = min(moments)

    # ---- Events

    def count(self, name: str, by: int = 1) -> None:
        self.counts[self.document][name] += by

    def evict(self, b: int) -> None:
        unused = self.present.pop(b)
        self.count("evictions")
        self.count("wasted_bytes", self.spent[b] if unused else 0)
        self.low.discard(b)

    def event(self, n: int) -> None:
        step, layer = divmod(n, self.L)
        c, began = self.c, self.t
        if layer == 0:
            self.document = int(self.w.document_S[step])
            self.count("steps")
            self.points.append((self.t + c.forecast_ns, step * (self.L + 1)))
        times = self.times[self.document]
        device = until = self.t + (c.pre_ns_N[n] + c.event_ns)
        if c.launch_ns_N is not None:
            until = max(device, self.router + (c.launch_ns_N[n] + c.event_ns))
        self.work(until)
        until = device + self.longer(began, self.part(c.host_pre_ns_N, n) + c.event_ns)
        if c.launch_ns_N is not None:
            launch = c.launch_ns_N[n] + c.event_ns
            until = max(until, self.router + launch + self.longer(self.router, launch))
        self.work(until)
        self.router = router = self.t
        there, fetched, judged = self.demand(n)
        self.complete = there
        self.points.append((router + c.forecast_ns, step * (self.L + 1) + layer + 1))
        self.work(there, waits=True)
        self.work(there + c.exec_ns_N[n])
        late = self.longer(there, self.part(c.host_exec_ns_N, n))
        self.work(self.t + late)
        if self.r.admission == "gate" and not self.free(self.pool(layer * self.E)):
            stay = [
                self.decayed(b)
                for b in self.present
                if b not in self.pinned | self.marks and self.pool(b) == self.pool(layer * self.E)
            ]
            self.marks |= {b for b in judged if stay and self.decayed(b) <= min(stay)}
        self.pinned = set()
        if self.r.eviction == "none":
            for b in [b for b in self.present if b // self.E == layer]:
                if not (self.present[b] and self.came_for[b] > n):
                    self.evict(b)
        work, stall = c.pre_ns_N[n] + c.exec_ns_N[n] + (until - device + late), there - router
        times["compute_ns"] += work + c.event_ns
        times["stall_ns"] += stall
        times["total_ns"] += self.t - began
        new = {"busy": fetched * self.copy, "time": work + c.event_ns + stall, "work": work, "count": 1.0}
        for name, x in new.items():
            self.sums[name] = self.sums[name] * 2.0 ** (-1 / 64) + x

    def demand(self, n: int) -> tuple[float, int, set[int]]:
        """When all are there, how many had to be fetched, and who is to be judged by the gate."""
        self.n = n
        asked = [n % self.L * self.E + x for x in self.events[n]]
        self.pinned = set(asked)
        hits = [b for b in asked if b in self.present]
        late = [b for b in asked if b in self.flying]
        absent = [b for b in asked if b not in self.present and b not in self.flying]
        judged = {b for b in asked if b in absent or (b in hits and b in self.marks)}
        self.marks -= set(asked)
        copies: list[int] = []
        reads: list[int] = []
        for b in asked:
            self.touch(b)
            self.uses[b].append(n)
            if b in absent:
                self.queue.pop(b, None)
                (copies if self.in_host(b) else reads).append(b)
        for b in [b for b, (e, _, _) in self.queue.items() if e <= n]:
            del self.queue[b]
            self.count("stale")
        low = [b for b in hits if b in self.low]
        exact = [b for b in hits if b not in low]
        found = (("hits", exact), ("low_hits", low), ("late", late), ("host_hits", copies), ("misses", reads))
        for name, those in found:
            self.count(name, len(those))
        self.count("demand_bytes", len(absent) * self.c.expert_bytes)
        self.count("file_bytes", len(reads) * self.c.expert_bytes)
        times = self.times[self.document]
        times["link_busy_ns"] += len(absent) * self.copy
        for b in hits:
            self.present[b] = False
        if not absent and not late:
            return self.t, 0, judged
        there = self.fetch(asked, absent, late, copies, reads)
        return there, len(absent), judged

    def slower(self, copy: float) -> float:
        """A copy that begins before somebody waits for it."""
        latency = self.c.link_latency_ns
        return latency + (copy - latency) / self.c.forecast_share

    def next_stop(self) -> float:
        """The work that the copy under way has done when it can be stopped."""
        assert self.link
        if self.t == self.link.since:
            return self.link.done
        now = self.link.done + (self.t - self.link.since)
        latency, chunk = self.c.link_latency_ns, self.c.link_chunk_bytes
        stops = [self.link.work]
        if chunk:
            size = chunk / (self.c.link_bytes_per_ns * self.c.forecast_share)
            stops += [latency + k * size for k in range(1, self.c.expert_bytes // chunk + 1)]
        return min([stop for stop in stops if now <= stop <= self.link.work], default=self.link.work)

    def fetch(
        self, asked: list[int], absent: list[int], late: list[int], copies: list[int], reads: list[int]
    ) -> float:
        """Slots and copies of an event's experts; when the last one is there."""
        router, times, pool = self.t, self.times[self.document], self.pool(asked[0])
        link, stopped = router, None
        if self.link:
            link = self.link.end
            if self.link.upgrade or self.link.b not in late:
                stopped = self.next_stop()
                link = self.link.since + (stopped - self.link.done)
        lacking = len(absent) - self.free(pool)
        lacking -= sum(self.pool(b) == pool and b not in self.pinned for b in self.present)
        for _ in range(lacking):
            those = [b for b in self.flying if b not in late and self.pool(b) == pool]
            b = max(those, key=lambda b: (self.flying[b].e, -self.flying[b].p, b))
            if self.link and self.link.b == b and not self.link.upgrade:
                times["link_busy_ns"] -= self.link.work - (self.link.work if stopped is None else stopped)
                self.link, stopped = None, None
            if self.file and self.file[0] == b:
                self.file = (b, self.file[1], True)
            del self.flying[b]
            self.count("wasted_bytes", self.spent[b])
        for b in absent:
            if not self.free(pool):
                old = self.victim(pool)
                assert old is not None
                self.evict(old)
            self.present[b] = False
        file = self.file[1] if self.file else router
        ready: dict[int, tuple[float, int, int]] = {}  # when it may be copied, then its turn
        for b in late:
            came = self.flying.pop(b)
            stage = came.stage
            self.present[b] = False
            self.low |= {b} if came.low else set()
            if stage == "copy":
                assert self.link
                times["late_ns"] += self.link.end - router
            else:
                times["link_busy_ns"] += self.low_copy if came.low else self.copy
                ready[b] = (file, 1, b) if stage == "read" else (router, 0, b)
        for b in copies:
            ready[b] = (router, 2, b)
        for b in reads:
            file += self.read
            ready[b] = (file, 2, b)
        if not ready:
            return link
        while ready:
            can = [b for b, (when, _, _) in ready.items() if when <= link]
            if not can:
                link = min(when for when, _, _ in ready.values())
                continue
            b = min(can, key=lambda b: ready[b][1:])
            del ready[b]
            link += self.low_copy if b in self.low else self.copy
            times["late_ns"] += link - router if b in late else 0.0
        if reads:
            self.file_free = file
            for b in reads:
                self.into_host(b)
        self.link_free = link
        if self.link and stopped is not None and stopped < self.link.work:
            self.link.since, self.link.done = link, stopped
        return link
