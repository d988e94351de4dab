"""How long a call takes: warmed up, interleaved with the calls that it is compared to, medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

BURST = 0.01
"""Seconds of back-to-back calls that make one reading: a clock's tick and a device's start are lost in
them."""


@dataclass(frozen=True)
class Timing:
    """Median and spread of a call's readings, in microseconds.

    Attributes:
        median, low, high: median, 10th and 90th percentile.
        calls: how many were timed in all.
    """

    median: float
    low: float
    high: float
    calls: int


def time_interleaved(
    calls: Mapping[Key, Call], device: torch.device | str = "cpu", repeats: int = 15, budget: float = 60.0
) -> dict[Key, Timing]:
    """Time several calls against each other.

    Each is warmed up, then every round takes one reading of each (a burst of back-to-back calls that ends
    when the device is done), so that a slow moment of the machine falls on all of them alike.

    Args:
        calls: what to time, by name.
        device: waited for at the end of a burst.
        repeats: rounds. budget: seconds after which no further round begins (three are always made).
    """
    bursts = {key: _burst(call, device) for key, call in calls.items()}
    found: dict[Key, list[float]] = {key: [] for key in calls}
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - started > budget:
            break
        for key, call in calls.items():
            found[key].append(1e6 * _seconds(call, bursts[key], device) / bursts[key])
    return {key: _timing(readings, bursts[key]) for key, readings in found.items()}


def _burst(call: Call, device: torch.device | str) -> int:
    first = _seconds(call, 1, device)
    once = min(_seconds(call, 1, device) for _ in range(3 if first < 0.3 else 1))
    return max(1, min(200, math.ceil(BURST / max(once, 1e-7))))


def _seconds(call: Call, times: int, device: torch.device | str) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait(device)
    return time.perf_counter() - start


def _timing(readings: list[float], burst: int) -> Timing:
    ordered = sorted(readings)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return Timing(statistics.median(ordered), low, high, len(ordered) * burst)


def wait(device: torch.device | str) -> None:
    """Until the device has done what was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def as_cuda_graph(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A call captured into one CUDA graph, replayed without Python: (replay, the tensor that it fills).

    The call must read tensors that stay where they are, and not wait for the device.

    Raises:
        RuntimeError: what CUDA says where a call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph.replay, found
