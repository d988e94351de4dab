"""How much longer the host takes to launch a layer while copies to the device are under way beside it.

Copies for forecasts run while the model does, those that it asked for while it waits: only the former meet a
host that launches kernels. What is read is a layer of :class:`specgate.policy.readings_layer.SmallLayer` with
its router's choice read back and its slots sent ahead, by itself and beside copies from pinned memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from specgate.errors import ConfigError
from specgate.policy.readings import MIB, Reading
from specgate.policy.readings_layer import COPY_MIB, ROUND_NS, SmallLayer

MARGIN = 3.0  # copies are queued for so many times what the layers take by themselves
TRIES = 4  # to outlast the layers, with twice the copies each time


class Copies(Protocol):
    """Copies to a device beside whatever the caller launches."""

    def start(self, ns: float) -> None:
        """Queues copies that take at least about ``ns``, and returns at once."""

    def over(self) -> bool:
        """Whether all that was queued is done; waits for nothing."""

    def wait(self) -> None:
        """Until all that was queued is done."""


class PinnedCopies:
    """Copies of COPY_MIB from pinned memory, one after the other, on a stream of their own.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._end = torch.cuda.Event()
        self._source = torch.ones(COPY_MIB * MIB, dtype=torch.uint8, pin_memory=True)
        self._target = torch.zeros_like(self._source, device=device)
        torch.cuda.synchronize(device)  # the target is written by the current stream
        self.copy_ns = min(self._once() for _ in range(3))

    def _once(self) -> float:
        begin = time.perf_counter_ns()
        self._queue(1)
        self.wait()
        return float(time.perf_counter_ns() - begin)

    def _queue(self, count: int) -> None:
        with torch.cuda.stream(self._stream):
            for _ in range(count):
                self._target.copy_(self._source, non_blocking=True)
            self._end.record(self._stream)

    def start(self, ns: float) -> None:
        """See :class:`Copies`."""
        self._queue(1 + int(ns / self.copy_ns))

    def over(self) -> bool:
        """See :class:`Copies`."""
        return bool(self._end.query())

    def wait(self) -> None:
        """See :class:`Copies`."""
        self._stream.synchronize()


def read_slowed(device: torch.device, repeats: int) -> dict[str, Any] | None:
    """A layer's time for the host, by itself and beside copies.

    Returns:
        ``alone`` and ``beside``: readings of a layer in nanoseconds (``ns``, ``low``, ``high``);
        ``slowdown``: how much longer the second is, relative to the first of the same round (``median``,
        ``low``, ``high``). None without CUDA, where the device is the host.

    Raises:
        ConfigError: copies end before the layers do.
    """
    if device.type != "cuda":
        return None
    layer, stream = SmallLayer(device), torch.cuda.current_stream(device)

    def launch() -> None:
        layer.dense()
        layer.experts(layer.send_ahead(layer.read_back()))

    with torch.inference_mode():
        return beside(launch, stream.synchronize, PinnedCopies(device), repeats)


def beside(
    launch: Callable[[], object], wait: Callable[[], None], copies: Copies, repeats: int
) -> dict[str, Any]:
    """Rounds of a call by itself and beside copies, in turns; see :func:`read_slowed`.

    Args:
        launch: the call. wait: until what it launched is done; waits for no copy.

    Raises:
        ConfigError: copies end before the calls do.
    """
    count = 1
    while (taken := _round(launch, wait, count)) < ROUND_NS and count < 1 << 20:
        count = max(count + 1, int(count * min(10.0, 1.1 * ROUND_NS / max(taken, 1.0))))
    alone, slowed = [], []
    for turn in range(repeats + 1):  # the first warms up
        plain = _round(launch, wait, count)
        late = _beside(launch, wait, copies, count, plain)
        if turn:
            alone.append(plain / count)
            slowed.append(late / count)
    ratios = [b / a - 1 for a, b in zip(alone, slowed, strict=True)]
    return {
        "alone": Reading(statistics.median(alone), min(alone), max(alone)).as_dict(),
        "beside": Reading(statistics.median(slowed), min(slowed), max(slowed)).as_dict(),
        "slowdown": {
            "median": round(statistics.median(ratios), 4),
            "low": round(min(ratios), 4),
            "high": round(max(ratios), 4),
        },
    }


def _round(launch: Callable[[], object], wait: Callable[[], None], count: int) -> float:
    """Nanoseconds of so many calls."""
    wait()
    begin = time.perf_counter_ns()
    for _ in range(count):
        launch()
    wait()
    return float(time.perf_counter_ns() - begin)


def _beside(
    launch: Callable[[], object], wait: Callable[[], None], copies: Copies, count: int, plain: float
) -> float:
    """The same while copies are under way from before the first call until after the last."""
    queued = MARGIN * plain
    for _ in range(TRIES):
        copies.start(queued)
        taken = _round(launch, wait, count)
        over = copies.over()
        copies.wait()
        if not over:
            return taken
        queued *= 2
    raise ConfigError(
        f"Copies queued for {queued / 2 * 1e-6:.0f} ms ended before {count} layers were launched; measure "
        "again when the machine is idle."
    )
