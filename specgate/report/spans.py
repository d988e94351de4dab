"""Stretches of time: what a store moved and what was computed meanwhile, on one clock.

All times are nanoseconds of the system's monotonic clock, which the native core's timeline uses too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Begin and end in nanoseconds.
Span = tuple[int, int]
TRANSFERS = ("copy, demand", "copy, prefetch", "direct, demand", "direct, prefetch")
READS = ("read, demand", "read, prefetch")
LANES = ("dense", "experts", "wait", *TRANSFERS, *READS)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if end <= begin:
            continue
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def total(spans: Iterable[Span]) -> int:
    """Nanoseconds that at least one of the spans covers."""
    return sum(end - begin for begin, end in merged(spans))


def overlap(one: Iterable[Span], other: Iterable[Span]) -> int:
    """Nanoseconds that both cover."""
    a, b = merged(one), merged(other)
    found = i = j = 0
    while i < len(a) and j < len(b):
        found += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def outside(spans: Iterable[Span], window: Span) -> list[Span]:
    """What of the window the spans leave."""
    out, at = [], window[0]
    for begin, end in merged(spans):
        if begin > at:
            out.append((at, min(begin, window[1])))
        at = max(at, end)
    return [*out, (at, window[1])] if at < window[1] else out


def queued(spans: Iterable[Span]) -> list[Span]:
    """Jobs of one queue, which were noted from when they were handed in: each begins when the one before it
    has ended."""
    out: list[Span] = []
    for begin, end in sorted(spans, key=lambda span: span[1]):
        begin = max(begin, out[-1][1]) if out else begin
        out.append((min(begin, end), end))
    return out


def transfers(timeline: Iterable[Mapping[str, Any]], window: Span) -> dict[str, list[Span]]:
    """What :meth:`specgate.runtime.store.ExpertStore.timeline` says of a stretch of time, by lane."""
    found: dict[str, list[Span]] = {}
    for event in timeline:
        lane = str(event["cat"]).replace(",", ", ")
        begin = round(event["ts"] * 1e3)
        end = begin + round(event["dur"] * 1e3)
        if lane in LANES and end > window[0] and begin < window[1]:
            found.setdefault(lane, []).append((begin, end))
    return {
        lane: [s for s in (queued(x) if lane in TRANSFERS else sorted(x)) if s[1] > window[0]]
        for lane, x in found.items()
    }


@dataclass(frozen=True)
class Hidden:
    """How much of the copying went on while the device computed.

    Attributes:
        copying: seconds in which something was on its way to the device.
        behind: of those, seconds in which it computed.
        bytes: moved in that time, if known.
    """

    copying: float
    behind: float

    @property
    def share(self) -> float | None:
        """Of the copy time; None where nothing was copied."""
        return self.behind / self.copying if self.copying > 0 else None


def hidden(lanes: Mapping[str, Sequence[Span]], compute: Iterable[Span]) -> Hidden:
    """Copies behind compute."""
    moving = [span for lane in TRANSFERS for span in lanes.get(lane, ())]
    return Hidden(total(moving) * 1e-9, overlap(moving, compute) * 1e-9)


class Marks:
    """Points in time of the device's work, read afterwards.

    On a GPU a mark is an event in the current stream; it says when the work before it was done, on the host's
    clock (to about 10 microseconds; make a new object every few seconds). On the CPU it is the time itself.

    Args:
        device: whose work.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize(device)
            before = time.monotonic_ns()
            self._zero = torch.cuda.Event(enable_timing=True)
            self._zero.record()
            torch.cuda.synchronize(device)
            self._zero_ns = (before + time.monotonic_ns()) // 2

    def mark(self) -> Any:
        """Now, or rather when the work launched so far is done."""
        if not self._cuda:
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, mark: Any) -> int:
        """Nanoseconds; on a GPU after the device was waited for."""
        if not self._cuda:
            return int(mark)
        return self._zero_ns + round(self._zero.elapsed_time(mark) * 1e6)


def write_chrome(path: Path, lanes: Mapping[str, Sequence[Span]]) -> Path:
    """Writes spans for chrome://tracing or ui.perfetto.dev; times begin at the first of them."""
    first = min((begin for spans in lanes.values() for begin, _ in spans), default=0)
    events: list[dict[str, Any]] = []
    for tid, lane in enumerate(lane for lane in LANES if lane in lanes):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": lane}})
        events.append(
            {"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": tid, "args": {"sort_index": tid}}
        )
        for begin, end in lanes[lane]:
            event = {"name": lane, "cat": lane, "ph": "X", "pid": 0, "tid": tid}
            events.append(event | {"ts": (begin - first) * 1e-3, "dur": (end - begin) * 1e-3})
    path.write_text(json.dumps({"traceEvents": events}))
    return path
