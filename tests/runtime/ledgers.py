"""What the tests of the ledger share: both implementations, one by one or driven side by side."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from specgate.errors import SpecgateError
from specgate.runtime import native, reference

POLICIES = ("lru", "lfu", "lfru", "static", "forecast", "belady", "priced")
Make = Callable[..., Any]
LEDGERS: dict[str, Make] = {"reference": reference.Ledger}
if native.available():
    LEDGERS["native"] = native.require().Ledger

needs_native = pytest.mark.skipif("native" not in LEDGERS, reason="the native core is not compiled")
for_each = pytest.mark.parametrize(
    "make",
    [
        pytest.param(LEDGERS["reference"], id="reference"),
        pytest.param(LEDGERS.get("native"), id="native", marks=needs_native),
    ],
)
"""Runs a test with the class of each implementation as ``make``."""


def one_class(make: Make, blocks: int = 6, slots: int = 2, slabs: int = 4, **options: Any) -> Any:
    """Blocks of 10 bytes, one class."""
    return make([0] * blocks, [10], [slots], [slabs], **options)


def run(ledger: Any, limit: int = 1000) -> list[Any]:
    """Starts and completes (oldest first) until nothing more starts: the jobs, in order of their start."""
    done: list[Any] = []
    flying: list[Any] = []
    while len(done) < limit:
        job = ledger.next_job()
        if job is not None:
            flying.append(job)
            done.append(job)
        elif flying:
            ledger.complete(flying.pop(0).id, "OK")
        else:
            return done
    raise AssertionError(f"still moving after {limit} jobs: {done[-4:]}")


def start(ledger: Any) -> list[Any]:
    """All jobs that start now."""
    return list(iter(ledger.next_job, None))


def load(ledger: Any, *blocks: int) -> None:
    """Demands, moves and releases blocks, one after the other."""
    for block in blocks:
        ledger.demand([block])
        run(ledger)
        ledger.release([block])


def on_device(ledger: Any, blocks: int) -> set[int]:
    """Which of blocks 0 .. ``blocks`` - 1 the device holds."""
    return {b for b in range(blocks) if ledger.ready([b])}


def counted(ledger: Any, *names: str) -> tuple[int, ...]:
    stats = ledger.stats()
    return tuple(stats[name] for name in names)


class Twins:
    """All implementations, given the same calls: each must answer, fail and stand like the first."""

    def __init__(self, block_class: list[int], *args: Any, **options: Any) -> None:
        self.ledgers = [make(block_class, *args, **options) for make in LEDGERS.values()]
        self.blocks = range(len(block_class))
        self.block_class, (self.block_bytes, self.device_slots, self.host_slots) = block_class, args[:3]
        self.options = options
        self.flying: dict[int, Any] = {}
        self.log = [f"Ledger({block_class}, {args}, {options})"]
        self.compare()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self.call(name, *args)

    def call(self, name: str, *args: Any) -> Any:
        """What the first answers, or its error."""
        self.log.append(f"{name}{args}")
        outcomes = [self.outcome(ledger, name, *args) for ledger in self.ledgers]
        first, error = outcomes[0]
        for outcome in outcomes[1:]:
            assert outcome[0] == first, self.report(outcomes)
            assert type(outcome[1]) is type(error), self.report(outcomes)
        self.compare()
        if error is not None:
            raise error
        if name == "next_job" and first is not None:
            self.flying[first.id] = first
        if name == "complete":
            del self.flying[args[0]]
        return first

    @staticmethod
    def outcome(ledger: Any, name: str, *args: Any) -> tuple[Any, SpecgateError | None]:
        try:
            answer = getattr(ledger, name)(*args)
        except SpecgateError as error:
            return None, error
        return (None if answer is None else reference.Job(*answer)) if name == "next_job" else answer, None

    def compare(self) -> None:
        """Every state and every counter, and what each says of itself."""
        for ledger in self.ledgers:
            ledger.invariants()
        self.states = [self.ledgers[0].state(b) for b in self.blocks]
        self.counters = self.ledgers[0].stats()
        for other in self.ledgers[1:]:
            states = [other.state(b) for b in self.blocks]
            assert states == self.states, self.report(list(zip(self.states, states, strict=True)))
            assert other.stats() == self.counters, self.report([self.counters, other.stats()])

    def report(self, differ: list[Any]) -> str:
        return "\n".join([*self.log, f"{' and '.join(LEDGERS)} differ:", *map(str, differ)])


def any_twins(random: Random) -> Twins:
    """Small ledgers of any kind: up to three classes, host tier or none, tight limits."""
    classes, blocks = random.randint(1, 3), random.randint(1, 10)
    twins = Twins(
        [random.randrange(classes) for _ in range(blocks)],
        [random.randint(1, 9) for _ in range(classes)],
        [random.randint(1, 4) for _ in range(classes)],
        [random.choice([0, 0, 1, 3]) for _ in range(classes)],
        random.choice(POLICIES),
        random.choice(POLICIES),
        max_pending=random.choice([0, 1, 3, 1024]),
        max_reads=random.choice([1, 1, 2, 4]),
        prefetch_copy_bytes=random.randint(0, 30),
        prefetch_read_bytes=random.randint(0, 30),
        half_life=random.choice([0.5, 3.0, 64.0]),
        resident_host=random.random() < 0.3,
    )
    twins.set_future([any_event(random, blocks) for _ in range(80)])
    twins.set_weights([random.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(blocks)])
    twins.set_reuse(*any_reuse(random))
    return twins


def any_reuse(random: Random) -> tuple[int, float, float, float, float]:
    """Experts of a layer, half-life, discount, intercept, slope."""
    return (
        random.choice([0, 1, 2, 3]),
        random.choice([0.5, 3.0, 64.0]),
        random.choice([0.5, 0.9, 0.99]),
        random.choice([-0.3, 0.0]),
        random.choice([0.4, 1.0]),
    )


def any_event(random: Random, blocks: int) -> list[int]:
    return random.sample(range(blocks), random.randint(0, min(blocks, 3)))


RATES = {
    "demand": 20,
    "release": 12,
    "misrelease": 1,
    "prefetch": 20,
    "advance": 6,
    "next_job": 22,
    "complete": 20,
    "sent": 8,
    "take_failed": 2,
    "ready": 2,
    "set_weights": 1,
    "set_future": 1,
    "set_reuse": 1,
}
"""How often ``any_call`` makes each call."""


def any_call(random: Random, twins: Twins, now: int) -> tuple[Any, ...]:
    """Name and arguments of a call, legal or not, that makes sense near ``now``."""
    blocks = len(twins.blocks)
    match random.choices(list(RATES), list(RATES.values()))[0]:
        case "release":
            pinned = [b for b in twins.blocks if twins.states[b][2] > 0]
            return "release", random.sample(pinned, random.randint(0, len(pinned)))
        case "misrelease":
            return "release", any_event(random, blocks)
        case "prefetch":
            p = random.choice([0.0, 0.25, 0.5, 1.0, random.random()])
            target = random.choice(["device", "device", "host"])
            return "prefetch", random.randrange(blocks), p, now + random.randint(-1, 5), target
        case "advance":
            return "advance", now + random.randint(-1, 2)
        case "complete" if twins.flying:
            status = random.choice(["OK", "OK", "OK", "FAILED", "CANCELLED"])
            return "complete", random.choice(list(twins.flying)), status
        case "sent":
            return "sent", random.choice([*twins.flying, 10_000])
        case "next_job" | "complete":
            return ("next_job",)
        case "take_failed":
            return ("take_failed",)
        case "ready":
            return "ready", any_event(random, blocks), random.random() < 0.5
        case "set_weights":
            return "set_weights", [random.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(blocks)]
        case "set_future":
            return "set_future", [any_event(random, blocks) for _ in range(80)]
        case "set_reuse":
            return "set_reuse", *any_reuse(random)
    return "demand", any_event(random, blocks)
