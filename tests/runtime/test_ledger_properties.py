"""What the ledger promises whatever is asked of it, on random runs; and what the native one costs."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import islice
from random import Random
from time import perf_counter
from typing import Any

import pytest

from specgate.errors import SpecgateError
from tests.runtime.ledgers import LEDGERS, POLICIES, Twins, any_call, any_twins, needs_native

seeds = pytest.mark.parametrize("seed", range(40))


class Watch:
    """Random calls on both ledgers, watched from outside: what each must have counted, who may go first."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.twins: Twins = any_twins(self.random)
        self.now = 0
        # Brought to the device by a prefetch (of which p and deadline), not used yet
        self.speculative: dict[int, tuple[float, int]] = {}
        self.unread: set[int] = set()  # brought to host memory by a prefetch, not used yet
        self.urgent: set[int] = set()  # jobs in flight for a demand
        self.sent: set[int] = set()  # copies in flight that no longer count to the limit
        self.failed: set[int] = set()
        self.expected: Counter[str] = Counter()

    def step(self) -> None:
        name, *args = any_call(self.random, self.twins, self.now)
        with suppress(SpecgateError):
            self.call(name, *args)

    def call(self, name: str, *args: Any) -> Any:
        twins, before = self.twins, list(self.twins.states)
        job = twins.flying.get(args[0]) if name == "complete" else None
        answer = twins.call(name, *args)
        if name == "advance":
            self.now = args[0]
        if name == "sent" and (sent := twins.flying.get(args[0])) is not None and sent.kind == "COPY":
            self.sent.add(sent.id)
        if name == "take_failed":
            self.failed |= set(answer)
        if name == "demand":
            self.demanded(args[0], before)
        if name == "next_job" and answer is not None:
            self.started(answer, before)
        if job is not None:
            self.ended(job, args[1])
        moving = {other.block for other in twins.flying.values()}
        for b, (_, _, pins, *_, want) in enumerate(twins.states):
            assert not want or want[0] == "PREFETCH" or pins or b in moving, f"nobody holds {b}: {want}"
        return answer

    def size(self, b: int) -> int:
        size: int = self.twins.block_bytes[self.twins.block_class[b]]
        return size

    def demanded(self, blocks: list[int], before: list[Any]) -> None:
        for b in blocks:
            device, host, want = before[b][0], before[b][3], before[b][6]
            found = {"PRESENT": "hit", "LOADING": "late"}.get(
                device, "host_hit" if host == "PRESENT" else "miss"
            )
            self.expected[found] += 1
            if b in self.speculative:
                self.expected["useful_bytes"] += self.size(b)
                self.expected["late_bytes"] += self.size(b) if device == "LOADING" else 0
                del self.speculative[b]
            self.unread.discard(b)
            self.expected["promoted"] += bool(want) and want[0] == "PREFETCH"
            self.urgent |= {job.id for job in self.twins.flying.values() if job.block == b}

    def evicted(self, job: Any, before: list[Any]) -> None:
        """What ``job`` took the place of."""
        prefetch, want = job.level == "PREFETCH", before[job.block][6]
        for b, after in enumerate(self.twins.states):
            if before[b][0] == "PRESENT" and after[0] == "ABSENT":
                assert before[b][2] == 0, f"block {b} was in use"
                p, deadline = self.speculative.get(b, (-1.0, self.now))
                assert not prefetch or deadline < self.now or p < want[2], f"{job} in the place of {b}: {p}"
                self.expected["evictions"] += 1
                self.waste(b)
            if before[b][3] == "PRESENT" and after[3] == "ABSENT":
                other = before[b][6]
                assert not other or (other[0] == "PREFETCH" and not prefetch), f"{job} in the place of {b}"
                self.expected["host_evictions"] += 1
                self.waste_read(b)

    def started(self, job: Any, before: list[Any]) -> None:
        self.evicted(job, before)
        if job.kind == "READ" and job.level == "PREFETCH":
            self.unread.add(job.block)
        elif job.kind != "DIRECT":
            self.unread.discard(job.block)
        level = job.level.lower()
        self.expected[f"read_bytes_{level}"] += self.size(job.block) if job.kind != "COPY" else 0
        self.expected[f"copied_bytes_{level}"] += self.size(job.block) if job.kind != "READ" else 0
        moving = {other.block for other in self.twins.flying.values()} - {job.block}
        demands = [b for b, x in enumerate(before) if x[6] and x[6][0] == "DEMAND" and b not in moving]
        if job.level == "DEMAND":
            self.urgent.add(job.id)
            cls, seq = self.twins.block_class, before[job.block][6][4]
            alike = [b for b in demands if cls[b] == cls[job.block] and self.step_of(b, before) == job.kind]
            assert all(before[b][6][4] >= seq for b in alike), f"{job} goes out of turn"
            return
        reads = job.kind != "COPY"
        waiting = [b for b in demands if (self.step_of(b, before) != "COPY") == reads]
        assert not waiting, f"prefetch {job} goes before the demands of {waiting}"
        beside = [self.twins.flying[id] for id in self.urgent]
        assert all((other.kind != "COPY") != reads for other in beside), (
            f"prefetch {job} goes beside {beside}"
        )
        self.in_turn(job, before, moving)
        if job.kind != "READ":
            self.spared(job, before)
            self.speculative[job.block] = before[job.block][6][2:4]

    def in_turn(self, job: Any, before: list[Any], moving: set[int]) -> None:
        """No prefetch for which there are too many bytes in flight lets a later one pass."""
        reads, place = job.kind != "COPY", self.place(job.block, before)
        sizes = [
            self.size(other.block)
            for other in self.twins.flying.values()
            if other.id not in {job.id, *self.urgent, *self.sent} and (other.kind != "COPY") == reads
        ]
        limit = self.twins.options["prefetch_read_bytes" if reads else "prefetch_copy_bytes"]
        for b, state in enumerate(before):
            if not state[6] or state[6][0] == "DEMAND" or b in moving:
                continue
            if (self.step_of(b, before) != "COPY") == reads and self.place(b, before) <= place:
                fits = not sizes or sum(sizes) + self.size(b) <= limit
                assert fits, f"{job} goes beside {sizes}, {b} waits: {limit} bytes at most"

    @staticmethod
    def place(b: int, states: list[Any]) -> tuple[int, float, int]:
        """What orders prefetches."""
        _, _, p, deadline, seq = states[b][6]
        return deadline, -p, seq

    def spared(self, job: Any, before: list[Any]) -> None:
        """A prefetch takes no slot that a demand waits for."""
        peers = [x for b, x in enumerate(before) if self.twins.block_class[b] == self.class_of(job)]
        held = sum(x[0] == "LOADING" or (x[0] == "PRESENT" and x[2] > 0) for x in peers)
        waiting = sum(x[0] == "ABSENT" and bool(x[6]) and x[6][0] == "DEMAND" for x in peers)
        slots = self.twins.device_slots[self.class_of(job)]
        assert held + waiting < slots, f"{job}: of {slots} slots {held} are held, {waiting} waited for"

    def class_of(self, job: Any) -> int:
        return self.twins.block_class[job.block]

    def step_of(self, b: int, states: list[Any]) -> str:
        """Kind of the next transfer of a block, as a driver sees it."""
        if states[b][3] == "PRESENT":
            return "COPY"
        return "READ" if self.twins.host_slots[self.twins.block_class[b]] else "DIRECT"

    def ended(self, job: Any, status: str) -> None:
        self.urgent.discard(job.id)
        if status != "OK" and job.kind == "READ":
            self.waste_read(job.block)
        elif status != "OK":
            self.waste(job.block)

    def waste(self, b: int) -> None:
        self.expected["wasted_bytes"] += self.size(b) if self.speculative.pop(b, None) else 0

    def waste_read(self, b: int) -> None:
        self.expected["wasted_read_bytes"] += self.size(b) if b in self.unread else 0
        self.unread.discard(b)


@seeds
def test_every_byte_is_accounted_for_and_no_prefetch_goes_before_a_demand(seed: int) -> None:
    watch = Watch(seed)
    for _ in range(250):
        watch.step()
    counted = {name: watch.twins.counters[name] for name in watch.expected}
    assert counted == watch.expected
    unmentioned = {"merged", "stale", "overflow"}
    assert all(
        watch.twins.counters[name] == 0 for name in watch.twins.counters.keys() - counted - unmentioned
    )


@seeds
def test_no_demand_is_lost(seed: int) -> None:
    """From any state, with every transfer completed in turn, all blocks in use arrive or have failed."""
    watch = Watch(1000 + seed)
    for _ in range(200):
        watch.step()
    watch.call("take_failed")
    watch.call("demand", [])
    in_use = [b for b in watch.twins.blocks if watch.twins.states[b][2] > 0]
    for _ in range(200):
        if all(watch.twins.states[b][0] == "PRESENT" or not watch.twins.states[b][6] for b in in_use):
            break
        if watch.call("next_job") is None:
            watch.call("complete", min(watch.twins.flying), "OK")
    assert {b for b in in_use if not watch.twins.ready([b])} <= watch.failed


@seeds
def test_all_comes_to_an_end(seed: int) -> None:
    """With nothing more asked for and every transfer completed, few transfers follow: no two wants take
    turns for ever."""
    watch = Watch(2000 + seed)
    for _ in range(200):
        watch.step()
    waiting, done = sum(bool(state[6]) for state in watch.twins.states), 0
    while True:
        if watch.call("next_job") is not None:
            done += 1
            assert done <= 3 * waiting, "to be read, perhaps once more after a demand took the slab, copied"
        elif watch.twins.flying:
            watch.call("complete", min(watch.twins.flying), "OK")
        else:
            break
    assert all(not state[6] or state[6][0] == "PREFETCH" for state in watch.twins.states)


@seeds
def test_the_queue_of_prefetches_is_bounded(seed: int) -> None:
    random = Random(seed)
    bound, reads, slots = random.randint(0, 5), random.randint(1, 3), random.randint(1, 3)
    twins = Twins([0] * 40, [10], [slots], [8], max_pending=bound, max_reads=reads)
    for _ in range(200):
        if random.random() < 0.7:
            twins.prefetch(random.randrange(40), random.random(), 9, random.choice(["device", "host"]))
        elif random.random() < 0.5 or not twins.flying:
            twins.next_job()
        else:
            twins.complete(random.choice(list(twins.flying)), random.choice(["OK", "CANCELLED"]))
        waiting = sum(state[6] is not None for state in twins.states)
        assert waiting <= bound + reads + slots
    refused = twins.counters["overflow"]
    for b in range(40):
        twins.prefetch(b, 0.0, 9)
    assert twins.counters["overflow"] > refused


# ---- Cost ----------------------------------------------------------------


def full_ledger(blocks: int, policy: str) -> Any:
    """The native ledger, every other block on the device and in host memory, with room for a long queue."""
    half = blocks // 2
    make = LEDGERS["native"]
    ledger = make([0] * blocks, [10], [half], [half], policy, policy, max_pending=blocks // 4)
    random = Random(blocks)
    ledger.set_weights([random.random() for _ in range(blocks)])
    ledger.set_future([[random.randrange(blocks)] for _ in range(2 * blocks)])
    misses(ledger, list(range(0, blocks, 2)))
    return ledger


def misses(ledger: Any, ids: list[int]) -> None:
    """Demands, read, copied and released; each evicts where all is full."""
    for b in ids:
        ledger.demand([b])
        while (job := ledger.next_job()) is not None:
            ledger.complete(job.id, "OK")
        ledger.release([b])


def prefetches(ledger: Any, ids: list[int]) -> None:
    """Requests that displace the weakest of a full queue, the later the likelier."""
    for b in ids:
        ledger.prefetch(b, ledger.stats()["overflow"] / 1e6, 9)


def seconds_each(ledger: Any, work: Any, blocks: int) -> float:
    """Time of one operation on an absent block: the best of several rounds, as machines are shared."""
    random, best = Random(0), float("inf")
    for _ in range(8):
        states = ((b, ledger.state(b)) for b in random.sample(range(blocks), blocks))
        ids = list(islice((b for b, state in states if state[0] == "ABSENT" and state[6] is None), 200))
        begin = perf_counter()
        work(ledger, ids)
        best = min(best, (perf_counter() - begin) / len(ids))
    return best


@needs_native
@pytest.mark.parametrize("policy", POLICIES)
def test_the_cost_of_a_miss_hardly_grows_with_the_blocks(policy: str) -> None:
    few, many = (seconds_each(full_ledger(n, policy), misses, n) for n in (1_000, 100_000))
    assert many < 8 * few, f"{1e6 * few:.1f} µs of 1,000 blocks, {1e6 * many:.1f} µs of 100,000"


@needs_native
def test_the_cost_of_a_prefetch_hardly_grows_with_the_queue() -> None:
    times = []
    for n in (1_000, 100_000):
        ledger = full_ledger(n, "forecast")
        for b in range(1, n, 2):
            ledger.prefetch(b, 0.0, 9)
        times.append(seconds_each(ledger, prefetches, n))
    few, many = times
    assert many < 8 * few, f"{1e6 * few:.1f} µs with 250 waiting, {1e6 * many:.1f} µs with 25,000"
