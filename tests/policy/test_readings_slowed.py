"""Launches beside copies: what is made of the rounds, and that copies which end too early are noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specgate.errors import ConfigError
from specgate.policy import readings_slowed
from specgate.policy.readings_slowed import Copies, beside, read_slowed


class Machine:
    """A clock, a host whose calls take a microsecond, and a link beside which they take longer.

    Args:
        slower: by how much, in turn for each round beside copies. speed: of the link, of what is asked of it.
    """

    def __init__(self, slower: list[float], speed: float = 1.0) -> None:
        self.now, self.slower, self.speed = 0.0, slower, speed
        self.until, self.by = 0.0, 0.0
        self.queued: list[float] = []

    def perf_counter_ns(self) -> int:
        return round(self.now)

    def launch(self) -> None:
        self.now += 1000 * (1 + (self.by if self.now < self.until else 0.0))

    def wait_for_launches(self) -> None:
        """They are done when they are launched here."""

    def start(self, ns: float) -> None:
        self.queued.append(ns)
        self.by = self.slower[(len(self.queued) - 1) % len(self.slower)]
        self.until = self.now + ns / self.speed

    def over(self) -> bool:
        return self.now >= self.until

    def wait(self) -> None:
        self.now = max(self.now, self.until)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine, int], dict[str, Any]]:
    def run(machine: Machine, repeats: int) -> dict[str, Any]:
        monkeypatch.setattr(readings_slowed, "time", machine)
        copies: Copies = machine
        return beside(machine.launch, machine.wait_for_launches, copies, repeats)

    return run


def test_the_slowdown_is_the_median_of_rounds_in_turns(read: Callable[..., dict[str, Any]]) -> None:
    machine = Machine([9.0, 0.1, 0.3, 0.2], speed=0.1)  # the first round warms up
    found = read(machine, 3)
    assert found["alone"] == {"ns": 1000, "low": 1000, "high": 1000}
    assert found["beside"] == {"ns": 1200, "low": 1100, "high": 1300}
    assert found["slowdown"] == {"median": 0.2, "low": 0.1, "high": 0.3}
    assert len(machine.queued) == 4
    assert min(machine.queued) >= 3 * readings_slowed.ROUND_NS


def test_copies_that_were_over_too_early_are_asked_for_again(read: Callable[..., dict[str, Any]]) -> None:
    machine = Machine([0.25], speed=4.0)
    assert read(machine, 3)["slowdown"]["median"] == 0.25
    first, second = machine.queued[:2]
    assert second == 2 * first, "three times as long were not enough for a link four times as fast"
    assert len(machine.queued) == 2 * 4


def test_a_link_that_is_never_busy_long_enough_is_refused(read: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"ended before \d+ layers were launched; measure again"):
        read(Machine([0.25], speed=1e6), 3)


def test_without_cuda_nothing_is_read() -> None:
    assert read_slowed(torch.device("cpu"), 3) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_layer_is_read_beside_copies_on_a_gpu() -> None:
    found = read_slowed(torch.device("cuda"), 3)
    assert found is not None
    assert found["alone"]["low"] <= found["alone"]["ns"] <= found["alone"]["high"]
    assert found["beside"]["ns"] > 0
    assert -0.2 < found["slowdown"]["median"] < 3
