"""Timing: what sleeps longer takes longer, by as much; readings are interleaved."""

from __future__ import annotations

import time

import pytest
import torch

from specgate.metrics.timing import as_cuda_graph, time_interleaved


def test_calls_that_wait_are_timed_as_long_as_they_wait() -> None:
    found = time_interleaved(
        {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}, repeats=5
    )
    assert found["short"].median > 2000
    assert found["long"].median > 20_000
    assert found["long"].median / found["short"].median > 2
    assert found["long"].low <= found["long"].median <= found["long"].high
    assert found["long"].calls == 5


def test_readings_alternate_and_the_budget_holds() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: (seen.append(name), time.sleep(0.02))[0]) for name in ("a", "b")}
    time_interleaved(calls, repeats=50, budget=0.0)
    after_warm_up = seen[-6:]
    assert after_warm_up == ["a", "b"] * 3, "three rounds are always made, no more once the budget is spent"


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_call() -> None:
    x = torch.randn(8, 8, device="cuda")
    replay, found = as_cuda_graph(lambda: x @ x)
    x.fill_(2.0)
    replay()
    assert torch.equal(found, torch.full((8, 8), 32.0, device="cuda"))
    with pytest.raises(RuntimeError):
        as_cuda_graph(lambda: x * float(x.sum()))
