"""State of the reference ledger: what is written down, what can be read off it, and what must always hold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specgate.errors import BudgetError, ConfigError
from specgate.runtime.reference_policies import POLICIES, Policy

DEMANDS = ("hit", "late", "host_hit", "miss")
REQUESTS = ("promoted", "merged", "stale", "overflow")
EVICTIONS = ("evictions", "host_evictions")
SPECULATION = ("useful_bytes", "wasted_bytes", "wasted_read_bytes", "late_bytes")
TRAFFIC = ("copied_bytes_demand", "copied_bytes_prefetch", "read_bytes_demand", "read_bytes_prefetch")
COUNTERS = DEMANDS + REQUESTS + EVICTIONS + SPECULATION + TRAFFIC
"""What ``Ledger.stats`` counts, from 0."""


class Job(NamedTuple):
    """A transfer: READ file to slab, COPY slab to slot, DIRECT file to slot. -1: no slab or no slot."""

    id: int
    kind: str
    block: int
    slab: int
    slot: int
    level: str

    @property
    def reads(self) -> bool:
        """Whether the file is read (else the link to the device is all that it uses)."""
        return self.kind != "COPY"


@dataclass
class Want:
    """What is to come to ``target``: DEMAND in the order of ``seq``, PREFETCH by deadline, p and ``seq``."""

    level: str
    target: str
    p: float
    deadline: int
    seq: int


@dataclass
class Block:
    """Where one block lies, who holds it there, and what is wanted of it.

    ``origin``, ``p``, ``deadline``: level and numbers of the want that brought it to the device; ``used``:
    whether it was demanded since. ``host_origin``: level of the READ that brought it to host memory;
    ``host_used``: whether it was demanded or copied since.
    """

    device: str = "ABSENT"
    slot: int = -1
    pins: int = 0
    host: str = "ABSENT"
    slab: int = -1
    host_pins: int = 0
    want: Want | None = None
    origin: str = "DEMAND"
    p: float = 0.0
    deadline: int = 0
    used: bool = False
    host_origin: str = "DEMAND"
    host_used: bool = False
    failed: bool = False

    def wanted(self, level: str) -> bool:
        return self.want is not None and self.want.level == level


class State:
    """Blocks, jobs in flight, counters and clocks of a ledger; see ``Ledger`` for the arguments."""

    def __init__(
        self,
        block_class: Sequence[int],
        block_bytes: Sequence[int],
        device_slots: Sequence[int],
        host_slots: Sequence[int],
        policy: str = "lru",
        host_policy: str = "lru",
        *,
        max_pending: int = 1024,
        max_reads: int = 8,
        prefetch_copy_bytes: int = 64 << 20,
        prefetch_read_bytes: int = 64 << 20,
        half_life: float = 64.0,
        resident_host: bool = False,
    ) -> None:
        if not len(block_bytes) == len(device_slots) == len(host_slots):
            sizes = (len(block_bytes), len(device_slots), len(host_slots))
            raise ConfigError(f"block_bytes, device_slots, host_slots of {sizes} classes: give all for each")
        if not block_class or not all(0 <= cls < len(block_bytes) for cls in block_class):
            raise ConfigError(f"block_class must name, for each block, one of {len(block_bytes)} classes")
        if min(*block_bytes, max_reads) < 1:
            raise ConfigError("block_bytes and max_reads must be at least 1")
        if min(device_slots) < 1:
            raise BudgetError(f"{min(device_slots)} slots for a class: raise the budget to 1 block at least")
        if min(*host_slots, max_pending, prefetch_copy_bytes, prefetch_read_bytes) < 0:
            raise ConfigError("host_slots, max_pending and bytes in flight cannot be negative")
        if not 0 < half_life < math.inf:
            raise ConfigError(f"half_life is {half_life}: it must be a positive number of demands")
        for name in (policy, host_policy):
            if name not in POLICIES:
                raise ConfigError(f"there is no policy {name!r}: use one of {', '.join(POLICIES)}")
        self.block_class = list(block_class)
        self.block_bytes = list(block_bytes)
        self.device_slots = list(device_slots)
        self.host_slots = list(host_slots)
        self.max_pending = max_pending
        self.max_reads = max_reads
        self.prefetch_copy_bytes = prefetch_copy_bytes
        self.prefetch_read_bytes = prefetch_read_bytes
        self.resident_host = resident_host
        self.device_policy: Policy = POLICIES[policy](len(block_class), half_life)
        self.host_policy: Policy = POLICIES[host_policy](len(block_class), half_life)
        self.blocks = [Block() for _ in block_class]
        self.jobs: dict[int, Job] = {}
        self.gone: set[int] = set()  # prefetches' copies that are wholly handed to the device
        self.counters = Counter(dict.fromkeys(COUNTERS, 0))
        self.tick, self.now = 0, 0
        self.next_id, self.next_seq = 0, 0
        if resident_host:
            for b, block in enumerate(self.blocks):
                block.host, block.slab = "PRESENT", self.block_class[:b].count(self.block_class[b])

    def stats(self) -> dict[str, int]:
        """Every counter by its name."""
        return dict(self.counters)

    def state(self, b: int) -> tuple[str, int, int, str, int, int, tuple[str, str, float, int, int] | None]:
        """Device state, slot, pins, host state, slab, host pins, want as (level, target, p, deadline,
        seq)."""
        self._check([b])
        block, want = self.blocks[b], self.blocks[b].want
        wanted = None if want is None else (want.level, want.target, want.p, want.deadline, want.seq)
        return (block.device, block.slot, block.pins, block.host, block.slab, block.host_pins, wanted)

    def invariants(self) -> None:
        """Raises ``AssertionError`` with one sentence if the state contradicts itself."""

        def must(holds: bool, sentence: str) -> None:
            if not holds:
                raise AssertionError(sentence)

        for b, block in enumerate(self.blocks):
            kinds = [job.kind for job in self.jobs.values() if job.block == b]
            must(len(kinds) <= 1, f"block {b} has {len(kinds)} jobs in flight")
            must(min(block.pins, block.host_pins) >= 0, f"block {b} has {block.pins}, {block.host_pins} pins")
            must(
                (block.slot >= 0) == (block.device != "ABSENT"),
                f"block {b}: {block.device} in slot {block.slot}",
            )
            must(
                (block.slab >= 0) == (block.host != "ABSENT"), f"block {b}: {block.host} in slab {block.slab}"
            )
            to_device = kinds in (["COPY"], ["DIRECT"])
            must(
                (block.device == "LOADING") == to_device, f"block {b} is {block.device} and has jobs {kinds}"
            )
            must(
                (block.host == "LOADING") == (kinds == ["READ"]),
                f"block {b} is {block.host}, has jobs {kinds}",
            )
            held = int(kinds == ["COPY"] and not self.resident_host)
            must(block.host_pins == held, f"block {b} has {block.host_pins} host pins and jobs {kinds}")
            must(not held or block.host == "PRESENT", f"block {b} is copied from a slab that is {block.host}")
            if block.want is None:
                must(not to_device, f"block {b} goes to the device and nobody wants it")
            else:
                must(block.device != "PRESENT", f"block {b} is wanted where it is")
                lies_there = block.want.target == "HOST" and block.host == "PRESENT"
                must(not lies_there, f"block {b} is wanted in host memory where it is")
                if block.want.level == "DEMAND":
                    must(block.want.target == "DEVICE", f"block {b}: demand of a slab")
                    must(block.pins > 0 or bool(kinds), f"block {b} is demanded, and nobody holds it")
        for cls in range(len(self.device_slots)):
            peers = [block for b, block in enumerate(self.blocks) if self.block_class[b] == cls]
            slots = [block.slot for block in peers if block.slot >= 0]
            slabs = [block.slab for block in peers if block.slab >= 0]
            slab_count = len(peers) if self.resident_host else self.host_slots[cls]
            must(len(set(slots)) == len(slots), f"a slot of class {cls} is used twice: {slots}")
            must(len(set(slabs)) == len(slabs), f"a slab of class {cls} is used twice: {slabs}")
            must(max(slots, default=-1) < self.device_slots[cls], f"class {cls} has no such slots: {slots}")
            must(max(slabs, default=-1) < slab_count, f"class {cls} has no such slabs: {slabs}")
            pinned = sum(block.pins > 0 for block in peers)
            must(
                pinned <= self.device_slots[cls],
                f"{pinned} blocks of class {cls} are in use: beyond the budget",
            )
        reads = [job for job in self.jobs.values() if job.reads]
        must(len(reads) <= self.max_reads, f"{len(reads)} reads are in flight: more than {self.max_reads}")
        copies = [job for job in self.jobs.values() if not job.reads]
        for jobs, limit in ((reads, self.prefetch_read_bytes), (copies, self.prefetch_copy_bytes)):
            mine = [job for job in jobs if job.level == "PREFETCH" and job.id not in self.gone]
            sizes = [self._bytes(job.block) for job in mine]
            must(
                len(sizes) <= 1 or sum(sizes) <= limit, f"prefetches of {sizes} bytes in flight: over {limit}"
            )
        waiting = len(self._wants("PREFETCH"))
        bound = self.max_pending + self.max_reads + sum(self.device_slots)
        must(waiting <= bound, f"{waiting} prefetches are kept: the queue is bounded by {bound}")
        seqs = [want.seq for level in ("DEMAND", "PREFETCH") for _, want in self._wants(level)]
        must(len(set(seqs)) == len(seqs), f"two wants share a place in the queue: {seqs}")
        must(min(self.counters.values()) >= 0, f"a counter is negative: {dict(self.counters)}")
        counted = self.counters["useful_bytes"] + self.counters["wasted_bytes"]
        brought = self.counters["copied_bytes_prefetch"]
        must(counted <= brought, f"{counted} bytes useful or wasted of {brought} that prefetches brought")
        unread, read = self.counters["wasted_read_bytes"], self.counters["read_bytes_prefetch"]
        must(unread <= read, f"{unread} bytes wasted of {read} that prefetches read")
        late = self.counters["late_bytes"]
        must(late <= self.counters["useful_bytes"], f"{late} bytes late are more than the useful ones")

    def _check(self, blocks: Iterable[int]) -> None:
        for b in blocks:
            if not 0 <= b < len(self.blocks):
                raise ConfigError(f"there is no block {b}: ids go from 0 to {len(self.blocks) - 1}")

    def _check_distinct(self, blocks: Sequence[int]) -> None:
        self._check(blocks)
        if len(set(blocks)) < len(blocks):
            raise ConfigError(f"blocks {list(blocks)} repeat one: name each once")

    def _wants(self, level: str) -> list[tuple[int, Want]]:
        return [
            (b, x.want) for b, x in enumerate(self.blocks) if x.want is not None and x.want.level == level
        ]

    def _job_of(self, b: int) -> Job | None:
        return next((job for job in self.jobs.values() if job.block == b), None)

    def _bytes(self, b: int) -> int:
        return self.block_bytes[self.block_class[b]]

    def _unused_bytes(self, b: int) -> int:
        """Bytes that a prefetch brought to the device and nobody used."""
        block = self.blocks[b]
        return self._bytes(b) if block.origin == "PREFETCH" and not block.used else 0

    def _unused_host_bytes(self, b: int) -> int:
        """Bytes that a prefetch read to host memory and nobody demanded or copied."""
        block = self.blocks[b]
        return self._bytes(b) if block.host_origin == "PREFETCH" and not block.host_used else 0

    def _seq(self) -> int:
        self.next_seq += 1
        return self.next_seq - 1

    def _free(self, cls: int, in_host: bool) -> int | None:
        """The lowest free slot (slab) of a class."""
        peers = [block for b, block in enumerate(self.blocks) if self.block_class[b] == cls]
        taken = {block.slab if in_host else block.slot for block in peers}
        places = range((self.host_slots if in_host else self.device_slots)[cls])
        return next((place for place in places if place not in taken), None)
