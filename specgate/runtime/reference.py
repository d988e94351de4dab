"""The ledger of the expert store in plain Python: which block lies where, and what moves next.

The native core has the same class (``specgate.runtime._native.Ledger``), fast; this one is short, slow and
meant to be obviously right: linear scans, and nothing kept that could be computed. Tests drive both with the
same calls and compare every state.

A *block* is the bytes of one expert. On the device it lies in a *slot*, in host memory in a *slab*; blocks of
one *class* share an arena of equal slots and one of equal slabs. A driver calls ``demand`` and ``prefetch``,
asks ``next_job`` what to move, moves it, and reports with ``complete``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from specgate.errors import BudgetError, ConfigError
from specgate.runtime.reference_policies import Belady, Priced, Static
from specgate.runtime.reference_state import Job, State, Want


class Ledger(State):
    """The state machine; deterministic, knows no threads, no bytes and no clock but the one it is told.

    ``block_class``: class of each block. ``block_bytes``, ``device_slots``, ``host_slots``: per class, the
    bytes of an encoded block and the sizes of the arenas (no host slots: the class has no host tier).
    ``policy``, ``host_policy``: who is evicted on the device and in host memory. ``max_pending``: prefetches
    that may wait. ``max_reads``: reads in flight. ``prefetch_copy_bytes``, ``prefetch_read_bytes``: bytes of
    prefetches in flight (one is always allowed). ``half_life``: of ``lfru``, in demands. ``resident_host``:
    the source is memory, every block lies in a slab for ever. Raises ``ConfigError`` for a value that makes
    no sense.
    """

    # What the driver wants

    def demand(self, blocks: Sequence[int]) -> None:
        """Pins ``blocks`` and wants the absent ones before all else. Changes nothing and raises
        ``BudgetError`` if a class has fewer slots than pinned blocks, ``ConfigError`` for an unknown or
        repeated id."""
        self._check_distinct(blocks)
        pinned = {b for b, block in enumerate(self.blocks) if block.pins > 0} | set(blocks)
        for cls, slots in enumerate(self.device_slots):
            need = sum(self.block_class[b] == cls for b in pinned)
            if need > slots:
                raise BudgetError(f"{need} blocks of class {cls} in use, {slots} slots: raise the budget")
        self.tick += 1
        for b in blocks:
            block, size = self.blocks[b], self._bytes(b)
            block.pins += 1
            self.device_policy.use(b, self.tick)
            self.host_policy.use(b, self.tick)
            speculative = block.device != "ABSENT" and block.origin == "PREFETCH" and not block.used
            if block.device == "PRESENT":
                self.counters["hit"] += 1
            elif block.device == "LOADING":
                self.counters["late"] += 1
                self.counters["late_bytes"] += size if speculative else 0
                self._promote(b)
            else:
                self.counters["host_hit" if block.host == "PRESENT" else "miss"] += 1
                self._promote(b)
                if block.want is None:
                    block.want = Want("DEMAND", "DEVICE", 1.0, self.now, self._seq())
                    self._hasten(b)
            self.counters["useful_bytes"] += size if speculative else 0
            if block.device != "ABSENT":
                block.used = True
            if block.host != "ABSENT":
                block.host_used = True

    def _promote(self, b: int) -> None:
        """Turns a PREFETCH want of ``b`` into a DEMAND."""
        block = self.blocks[b]
        if block.want is None or block.want.level == "DEMAND":
            return
        self.counters["promoted"] += 1
        block.want.level, block.want.target, block.want.seq = "DEMAND", "DEVICE", self._seq()
        self._hasten(b)

    def _hasten(self, b: int) -> None:
        """Makes the job of ``b`` in flight, if there is one, a demand's."""
        job = self._job_of(b)
        if job is not None:
            self.jobs[job.id] = job._replace(level="DEMAND")
            self.gone.discard(job.id)
            if job.kind == "READ":
                self.blocks[b].host_origin = "DEMAND"

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one pin of each block; a demand that nobody holds any more is given up, unless it is on its
        way. Changes nothing and raises ``ConfigError`` if one has none left, or for an unknown or repeated
        id."""
        self._check_distinct(blocks)
        for b in blocks:
            if self.blocks[b].pins == 0:
                raise ConfigError(f"block {b} is not pinned: release only what was demanded")
        for b in blocks:
            self.blocks[b].pins -= 1
            if self._job_of(b) is None:
                self._give_up(b)

    def _give_up(self, b: int) -> None:
        """Drops a DEMAND want of ``b`` if nobody holds the block."""
        if self.blocks[b].pins == 0 and self.blocks[b].wanted("DEMAND"):
            self.blocks[b].want = None

    def prefetch(self, block: int, p: float, deadline: int, target: str = "device") -> str:
        """Wants ``block`` on ``target`` ("device" or "host") by ``deadline``, with probability ``p`` of use.
        Says what became of it: "stale", "resident", "demanded", "merged", "refused" or "queued"."""
        self._check([block])
        if target not in ("device", "host"):
            raise ConfigError(f"target is {target!r}: it must be device or host")
        if not 0 <= p <= 1:
            raise ConfigError(f"p is {p}: a probability lies between 0 and 1")
        if deadline < self.now:
            self.counters["stale"] += 1
            return "stale"
        if target == "host" and self.host_slots[self.block_class[block]] == 0 and not self.resident_host:
            return "refused"
        self.device_policy.hint(block, p, deadline)
        self.host_policy.hint(block, p, deadline)
        it = self.blocks[block]
        if it.device == "PRESENT" or (target == "host" and it.host == "PRESENT"):
            return "resident"
        if it.want is not None:
            if it.want.level == "DEMAND":
                return "demanded"
            it.want.p, it.want.deadline = p, deadline
            if target == "device":
                it.want.target = "DEVICE"
            self.counters["merged"] += 1
            return "merged"
        pending = [want for b, want in self._wants("PREFETCH") if self._job_of(b) is None]
        if len(pending) >= self.max_pending:
            self.counters["overflow"] += 1
            weakest = min(pending, key=lambda want: (want.p, -want.deadline, -want.seq), default=None)
            if weakest is None or not weakest.p < p:
                return "refused"
            for other in self.blocks:
                if other.want is weakest:
                    other.want = None
        it.want = Want("PREFETCH", target.upper(), p, deadline, self._seq())
        return "queued"

    def advance(self, now: int) -> list[int]:
        """Moves the clock on to ``now`` and drops prefetches whose deadline is past, but not one on its way
        to the device. Returns the READs in flight that nobody wants any more. Raises ``ConfigError`` if time
        would run backwards."""
        if now < self.now:
            raise ConfigError(f"the clock stands at {self.now} and cannot go to {now}: advance it only")
        self.now = now
        self.device_policy.advance(now)
        self.host_policy.advance(now)
        for b, want in self._wants("PREFETCH"):
            if want.deadline < now and self.blocks[b].device != "LOADING":
                self.blocks[b].want = None
                self.counters["stale"] += 1
        reads = [job for job in self.jobs.values() if job.kind == "READ"]
        return sorted(job.id for job in reads if self.blocks[job.block].want is None)

    # What is to be moved

    def next_job(self) -> Job | None:
        """Starts the first want that can start, DEMAND before PREFETCH; ``None`` where none can."""
        demands = sorted(self._wants("DEMAND"), key=lambda bw: bw[1].seq)
        prefetches = sorted(self._wants("PREFETCH"), key=lambda bw: (bw[1].deadline, -bw[1].p, bw[1].seq))
        closed = {"READ": False, "COPY": False}  # the file, the link: to the prefetches that follow
        for b, want in demands + prefetches:
            if self._job_of(b) is not None:
                continue
            kind = self._step(b)
            way = "COPY" if kind == "COPY" else "READ"
            if want.level == "PREFETCH" and closed[way]:
                continue
            fits = self._within_limits(b, kind, want.level)
            if fits and self._make_room(b, kind, want):
                return self._start(b, kind, want)
            if want.level == "DEMAND" or not fits:
                closed[way] = True
        return None

    def _step(self, b: int) -> str:
        """Kind of the next transfer of a wanted block."""
        if self.blocks[b].host == "PRESENT":
            return "COPY"
        return "DIRECT" if self.host_slots[self.block_class[b]] == 0 else "READ"

    def _within_limits(self, b: int, kind: str, level: str) -> bool:
        """Whether the jobs in flight leave place for this one."""
        reads = kind != "COPY"
        same = [job for job in self.jobs.values() if job.reads == reads and job.id not in self.gone]
        if reads and len(same) >= self.max_reads:
            return False
        if level == "DEMAND" or not same:
            return True
        limit = self.prefetch_read_bytes if reads else self.prefetch_copy_bytes
        in_flight = sum(self._bytes(job.block) for job in same)
        return all(job.level == "PREFETCH" for job in same) and in_flight + self._bytes(b) <= limit

    def _make_room(self, b: int, kind: str, want: Want) -> bool:
        """Whether there is a free slot (READ: slab), after the eviction of a block if that is needed."""
        cls, to_host = self.block_class[b], kind == "READ"
        if want.level == "PREFETCH" and not to_host and not self._spare_slot(cls):
            return False
        if self._free(cls, to_host) is not None:
            return True
        policy = self.host_policy if to_host else self.device_policy
        peers = [o for o in range(len(self.blocks)) if self.block_class[o] == cls]
        victim = policy.victim([o for o in peers if self._evictable(o, to_host)], self.tick)
        if victim is None:
            return False
        if want.level == "PREFETCH":
            kept = self._kept_in_host(victim) if to_host else self._kept_on_device(victim, want.p)
            if kept or not policy.admits(b, victim, self.tick):
                return False
        block = self.blocks[victim]
        if to_host:
            self.counters["host_evictions"] += 1
            self.counters["wasted_read_bytes"] += self._unused_host_bytes(victim)
            block.host, block.slab = "ABSENT", -1
        else:
            self.counters["evictions"] += 1
            self.counters["wasted_bytes"] += self._unused_bytes(victim)
            block.device, block.slot = "ABSENT", -1
        return True

    def _evictable(self, b: int, from_host: bool) -> bool:
        block = self.blocks[b]
        if from_host:
            return block.host == "PRESENT" and block.host_pins == 0 and not block.wanted("DEMAND")
        return block.device == "PRESENT" and block.pins == 0

    def _spare_slot(self, cls: int) -> bool:
        """Whether a slot is left for a prefetch when each demand that waits for one has got it."""
        peers = [b for b, other in enumerate(self.block_class) if other == cls]
        free = self.device_slots[cls] - sum(self.blocks[b].device != "ABSENT" for b in peers)
        evictable = sum(self._evictable(b, False) for b in peers)
        waiting = sum(self.blocks[b].wanted("DEMAND") and self.blocks[b].device == "ABSENT" for b in peers)
        return free + evictable > waiting

    def _kept_in_host(self, victim: int) -> bool:
        """Whether ``victim`` is still to be copied, so that a prefetch may not take its slab."""
        return self.blocks[victim].want is not None

    def _kept_on_device(self, victim: int, p: float) -> bool:
        """Whether ``victim`` came by a forecast as likely as ``p`` that may still come true."""
        block = self.blocks[victim]
        speculative = block.origin == "PREFETCH" and not block.used
        return speculative and block.deadline >= self.now and block.p >= p

    def _start(self, b: int, kind: str, want: Want) -> Job:
        block, place = self.blocks[b], self._free(self.block_class[b], kind == "READ")
        level = want.level
        assert place is not None
        if kind == "READ":
            block.host, block.slab = "LOADING", place
            block.host_origin, block.host_used = level, False
        else:
            block.device, block.slot = "LOADING", place
            block.origin, block.used = level, level == "DEMAND"
            block.p, block.deadline = want.p, want.deadline
        if kind == "COPY":
            block.host_used = True
            block.host_pins += not self.resident_host
        for moved in {"READ": ["read"], "COPY": ["copied"], "DIRECT": ["read", "copied"]}[kind]:
            self.counters[f"{moved}_bytes_{level.lower()}"] += self._bytes(b)
        job = Job(self.next_id, kind, b, -1 if kind == "DIRECT" else block.slab, block.slot, level)
        self.next_id += 1
        self.jobs[job.id] = job
        return job

    def sent(self, id: int) -> None:
        """All of a prefetch's copy is in the hands of the device: it no longer counts to the limit. Unknown
        jobs, and others, are ignored."""
        job = self.jobs.get(id)
        if job is not None and job.kind == "COPY" and job.level == "PREFETCH":
            self.gone.add(id)

    def complete(self, id: int, status: str) -> None:
        """The driver is done with job ``id``: "OK", "FAILED", or "CANCELLED" (done again if it is still
        wanted and, if demanded, held). Raises ``ConfigError`` for a job that is not in flight."""
        if status not in ("OK", "FAILED", "CANCELLED"):
            raise ConfigError(f"status is {status!r}: it must be OK, FAILED or CANCELLED")
        if id not in self.jobs:
            raise ConfigError(f"job {id} is not in flight: complete each job of next_job once")
        job = self.jobs.pop(id)
        self.gone.discard(id)
        block = self.blocks[job.block]
        if job.kind == "COPY" and not self.resident_host:
            block.host_pins -= 1
        if status == "OK" and job.kind == "READ":
            block.host = "PRESENT"
            self.host_policy.insert(job.block, self.tick)
            if block.want is not None and block.want.target == "HOST":
                block.want = None
            self._give_up(job.block)
        elif status == "OK":
            block.device, block.want = "PRESENT", None
            self.device_policy.insert(job.block, self.tick)
        elif job.kind == "READ":
            self.counters["wasted_read_bytes"] += self._unused_host_bytes(job.block)
            block.host, block.slab = "ABSENT", -1
        else:
            self.counters["wasted_bytes"] += self._unused_bytes(job.block)
            block.device, block.slot = "ABSENT", -1
        if status == "FAILED":
            block.failed |= block.wanted("DEMAND") or block.pins > 0
            block.want = None
        if status == "CANCELLED":
            self._give_up(job.block)

    # What the driver may ask

    def ready(self, blocks: Sequence[int], issued: bool = False) -> bool:
        """Whether all blocks are on the device, or (``issued``) at least on their way from here to there."""
        self._check(blocks)
        good = ("PRESENT", "LOADING") if issued else ("PRESENT",)
        return all(self.blocks[b].device in good for b in blocks)

    def take_failed(self) -> list[int]:
        """Blocks in use or demanded whose transfer failed since the last call, ascending."""
        failed = [b for b, block in enumerate(self.blocks) if block.failed]
        for b in failed:
            self.blocks[b].failed = False
        return failed

    def set_weights(self, weights: Sequence[float]) -> None:
        """Weight of every block for the policy ``static``. Raises ``ConfigError`` unless each has one."""
        if len(weights) != len(self.blocks) or any(math.isnan(weight) for weight in weights):
            raise ConfigError(
                f"{len(weights)} weights for {len(self.blocks)} blocks: give one number for each"
            )
        for policy in (self.device_policy, self.host_policy):
            if isinstance(policy, Static):
                policy.weights = list(weights)

    def set_future(self, events: Sequence[Sequence[int]]) -> None:
        """All demands to come, from the first on, for the policy ``belady``."""
        for event in events:
            self._check(event)
        for policy in (self.device_policy, self.host_policy):
            if isinstance(policy, Belady):
                policy.future = [list(event) for event in events]

    def set_reuse(
        self,
        experts: int,
        half_life: float = 64.0,
        discount: float = 0.99,
        intercept: float = 0.0,
        slope: float = 1.0,
    ) -> None:
        """What the policy ``priced`` knows of reuse; block b is of layer ``b // experts``.

        Raises:
            ConfigError: numbers that say nothing of reuse.
        """
        numbers = (half_life, intercept, slope)
        if not (all(map(math.isfinite, numbers)) and half_life > 0 and 0 <= discount <= 1 and slope >= 0):
            raise ConfigError(
                f"half_life={half_life}, discount={discount}, intercept={intercept} and slope={slope} say "
                "nothing of reuse: fit them (specgate.policy.reuse)"
            )
        for policy in (self.device_policy, self.host_policy):
            if isinstance(policy, Priced):
                policy.set_reuse(experts, half_life, discount, intercept, slope)
