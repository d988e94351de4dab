"""Both ledgers under the same calls, in any order: the same answers, errors, states and counters."""

from __future__ import annotations

from contextlib import suppress
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from specgate.errors import SpecgateError
from tests.runtime.ledgers import POLICIES, Twins, any_call, any_twins

CLASSES, BLOCKS = 2, 6
some = st.lists(st.integers(0, BLOCKS), max_size=4)  # BLOCKS is no block
probability = st.sampled_from([0.0, 0.25, 0.5, 1.0])
policies = st.sampled_from(POLICIES)


def per_class(least: int, most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(least, most), min_size=CLASSES, max_size=CLASSES)


class LedgerMachine(RuleBasedStateMachine):
    """What a driver can do, and what it should not: ``Twins`` compares after each call."""

    @initialize(
        block_class=st.lists(st.integers(0, CLASSES - 1), min_size=BLOCKS, max_size=BLOCKS),
        sizes=st.tuples(per_class(1, 9), per_class(1, 3), per_class(0, 2), policies, policies),
        limits=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 20), st.integers(0, 20)),
        half_life=st.sampled_from([0.5, 64.0]),
        resident_host=st.booleans(),
    )
    def begin(self, block_class, sizes, limits, half_life, resident_host):  # type: ignore[no-untyped-def]
        names = ("max_pending", "max_reads", "prefetch_copy_bytes", "prefetch_read_bytes")
        options = dict(zip(names, limits, strict=True))
        self.twins = Twins(block_class, *sizes, **options, half_life=half_life, resident_host=resident_host)
        self.now = 0

    def call(self, name: str, *args: object) -> None:
        with suppress(SpecgateError):
            self.twins.call(name, *args)

    @rule(blocks=some)
    def demand(self, blocks: list[int]) -> None:
        self.call("demand", blocks)

    @rule(blocks=some)
    def release(self, blocks: list[int]) -> None:
        self.call("release", blocks)

    @rule()
    def release_all(self) -> None:
        self.call("release", [b for b, state in enumerate(self.twins.states) if state[2] > 0])

    @rule(block=st.integers(0, BLOCKS), p=probability, wait=st.integers(-1, 4), on_host=st.booleans())
    def prefetch(self, block: int, p: float, wait: int, on_host: bool) -> None:
        self.call("prefetch", block, p, self.now + wait, "host" if on_host else "device")

    @rule(step=st.integers(-1, 2))
    def advance(self, step: int) -> None:
        self.call("advance", self.now + step)
        self.now += max(step, 0)

    @rule(times=st.integers(1, 3))
    def next_job(self, times: int) -> None:
        for _ in range(times):
            self.call("next_job")

    @precondition(lambda self: self.twins.flying)
    @rule(pick=st.integers(0, 20), status=st.sampled_from(["OK", "OK", "FAILED", "CANCELLED"]))
    def complete(self, pick: int, status: str) -> None:
        flying = sorted(self.twins.flying)
        self.call("complete", flying[pick % len(flying)], status)

    @rule(blocks=some, issued=st.booleans())
    def ask(self, blocks: list[int], issued: bool) -> None:
        self.call("ready", blocks, issued)
        self.call("take_failed")

    @rule(weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=BLOCKS - 1, max_size=BLOCKS))
    def set_weights(self, weights: list[float]) -> None:
        self.call("set_weights", weights)

    @rule(events=st.lists(some, max_size=12))
    def set_future(self, events: list[list[int]]) -> None:
        self.call("set_future", events)

    @rule(
        experts=st.integers(0, 3),
        half_life=st.sampled_from([-1.0, 0.5, 8.0]),
        discount=st.sampled_from([0.5, 0.97, 1.5]),
        slope=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def set_reuse(self, experts: int, half_life: float, discount: float, slope: float) -> None:
        self.call("set_reuse", experts, half_life, discount, -0.1, slope)


LedgerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLedgerMachine = LedgerMachine.TestCase


@pytest.mark.parametrize("seed", range(120))
def test_long_runs_agree(seed: int) -> None:
    random = Random(seed)
    twins, now = any_twins(random), 0
    for _ in range(250):
        name, *args = any_call(random, twins, now)
        with suppress(SpecgateError):
            twins.call(name, *args)
            now = args[0] if name == "advance" else now
