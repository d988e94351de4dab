"""Readings of what a decoded layer costs the host if its operations are captured as CUDA graphs.

A layer of :class:`specgate.policy.readings_layer.SmallLayer` as two graphs, its dense part and its experts.
The host's steps are timed each by itself, within the same calls, not as differences of rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from specgate.cuda_graphs import capture, pool_of
from specgate.policy.readings import Reading
from specgate.policy.readings_layer import DENSE_OPERATIONS, EXPERT_OPERATIONS, SmallLayer
from specgate.policy.readings_slowed import PinnedCopies, beside
from specgate.small_tensors import write_into

CALLS = 400  # of a layer, per round
TOGETHER = 16  # layers in one graph, of which the device's own time is read
OPERATIONS = DENSE_OPERATIONS + 1 + EXPERT_OPERATIONS  # 1 keeps the layer's state where it is
PARTS = ("write", "experts", "dense", "answer")


def read_graphs(device: torch.device, repeats: int) -> dict[str, Any] | None:
    """The host's time for the steps of a layer, and the device's for an operation.

    Returns:
        Readings in nanoseconds (``ns``, ``low``, ``high``; medians of calls, then of rounds): ``write``, the
        slots sent; ``experts`` and ``dense``, the launches of the two graphs; ``answer``, the router's choice
        read back, the wait for the device included; ``layer``, all of them; ``node``, an operation on the
        device, of many in one graph; ``gap``, what a graph takes the device besides its operations; and
        ``slowdown``, as in :func:`specgate.policy.readings_slowed.read_slowed`. None without CUDA.
    """
    if device.type != "cuda":
        return None
    layer, pool = SmallLayer(device), pool_of(device)
    state_1D = layer.hidden_1D  # graphs read and write the same memory each time
    slots_1K = torch.zeros(1, 4, dtype=torch.int64, device=device)

    def attend() -> None:
        layer.dense()
        state_1D.copy_(layer.hidden_1D)
        layer.hidden_1D = state_1D

    dense = capture(attend, device, pool)
    experts = capture(lambda: layer.experts(slots_1K), device, pool)

    def several() -> None:
        for _ in range(TOGETHER):
            attend()
            layer.experts(slots_1K)

    many = capture(several, device, pool)

    def step() -> tuple[int, int, int, int, int]:
        begin = time.perf_counter_ns()
        write_into(slots_1K, [0, 1, 2, 3])
        written = time.perf_counter_ns()
        experts()
        launched = time.perf_counter_ns()
        dense()
        attended = time.perf_counter_ns()
        layer.read_back()
        return begin, written, launched, attended, time.perf_counter_ns()

    taken: dict[str, list[float]] = {name: [] for name in (*PARTS, "layer", "node", "gap")}
    with torch.inference_mode():
        for turn in range(repeats + 1):  # the first warms up
            found = medians([step() for _ in range(CALLS)])
            found["node"] = in_a_row(many, CALLS // TOGETHER, device) / (TOGETHER * OPERATIONS)
            pair = in_a_row(lambda: (experts(), dense()), CALLS, device)
            found["gap"] = max(0.0, pair - OPERATIONS * found["node"]) / 2
            for name in taken if turn else ():
                taken[name].append(found[name])
        stream = torch.cuda.current_stream(device)
        slowed = beside(step, stream.synchronize, PinnedCopies(device), repeats)
    readings: dict[str, Any] = {
        name: Reading(statistics.median(v), min(v), max(v)).as_dict() for name, v in taken.items()
    }
    return readings | {"slowdown": slowed["slowdown"]}


def in_a_row(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Nanoseconds of a call, of many that are launched without waiting."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter_ns()
    for _ in range(count):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - begin) / count


def medians(steps: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of each part, between two of a step's times, and of their sum."""
    out = {
        name: float(statistics.median(step[i + 1] - step[i] for step in steps))
        for i, name in enumerate(PARTS)
    }
    return out | {"layer": float(statistics.median(step[-1] - step[0] for step in steps))}


def fields_of(readings: dict[str, Any] | None) -> dict[str, float]:
    """What a profile says of graphs, in microseconds; nothing without readings.

    The answer is less what the device still had to do when the host began to wait.
    """
    if readings is None:
        return {}
    ns = {name: float(readings[name]["ns"]) for name in (*PARTS, "node", "gap")}
    left = max(0.0, OPERATIONS * ns["node"] + 2 * ns["gap"] - ns["dense"])
    return {
        "graph_us": round((ns["experts"] + ns["dense"]) / 2e3, 4),
        "node_us": round(ns["node"] * 1e-3, 4),
        "gap_us": round(ns["gap"] * 1e-3, 4),
        "write_us": round(ns["write"] * 1e-3, 4),
        "answer_us": round(max(0.0, ns["answer"] - left) * 1e-3, 4),
    }
