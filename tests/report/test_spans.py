"""Stretches of time against counting nanoseconds one by one; energy and memory meters."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from specgate.report.meters import EnergyCounter, Meter
from specgate.report.spans import (
    TRANSFERS,
    Marks,
    Span,
    hidden,
    merged,
    outside,
    overlap,
    queued,
    total,
    transfers,
    write_chrome,
)

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some(seed: int) -> list[Span]:
    draw = random.Random(seed)
    starts = [draw.randrange(60) for _ in range(draw.randrange(8))]
    return [(start, start + draw.randrange(12)) for start in starts]


def moments(spans: list[Span]) -> set[int]:
    return {at for begin, end in spans for at in range(begin, end)}


@pytest.mark.parametrize("seed", range(40))
def test_spans_are_sets_of_moments(seed: int) -> None:
    one, other, window = some(seed), some(seed + 1000), (10, 50)
    assert moments(merged(one)) == moments(one)
    assert total(one) == len(moments(one))
    assert overlap(one, other) == len(moments(one) & moments(other))
    assert moments(outside(one, window)) == moments([window]) - moments(one)
    gaps = merged(one)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(gaps))
    found = hidden({TRANSFERS[0]: one, "wait": [(0, 99)]}, other)
    assert (found.copying, found.behind) == pytest.approx((total(one) * 1e-9, overlap(one, other) * 1e-9))
    assert found.share is None or found.share == pytest.approx(overlap(one, other) / total(one))


def test_a_queue_does_one_thing_at_a_time() -> None:
    handed_in = [(0, 10), (0, 25), (1, 30), (40, 50)]
    assert queued(handed_in) == [(0, 10), (10, 25), (25, 30), (40, 50)]
    assert total(queued(handed_in)) == total(handed_in)


def test_transfers_come_by_lane_and_time() -> None:
    def event(cat: str, begin_ns: int, end_ns: int) -> dict[str, Any]:
        return {"cat": cat, "ts": begin_ns * 1e-3, "dur": (end_ns - begin_ns) * 1e-3}

    timeline = [
        event("copy,demand", 100, 200),
        event("copy,prefetch", 50, 150),
        event("read,demand", 10, 500),
        event("stall", 0, 1000),
        event("copy,demand", 900, 950),
    ]
    found = transfers(timeline, (90, 800))
    assert found == {
        "copy, demand": [(100, 200)],
        "copy, prefetch": [(50, 150)],
        "read, demand": [(10, 500)],
    }


def test_timeline_file_is_one_that_viewers_read(tmp_path: Path) -> None:
    path = write_chrome(tmp_path / "t.json", {"experts": [(5_000, 9_000)], "wait": [(2_000, 5_000)]})
    events = json.loads(path.read_text())["traceEvents"]
    spans = {event["name"]: (event["ts"], event["dur"]) for event in events if event["ph"] == "X"}
    assert spans == {"experts": (3.0, 4.0), "wait": (0.0, 3.0)}


@pytest.mark.parametrize("device", DEVICES)
def test_marks_are_on_the_hosts_clock(device: str) -> None:
    marks = Marks(torch.device(device))
    before = time.monotonic_ns()
    first = marks.mark()
    time.sleep(0.01)
    if device == "cuda":
        torch.ones(1000, 1000, device="cuda") @ torch.ones(1000, 1000, device="cuda")
    second = marks.mark()
    if device == "cuda":
        torch.cuda.synchronize()
    after = time.monotonic_ns()
    slack = 300_000 if device == "cuda" else 0
    assert before - slack <= marks.read(first) < marks.read(second) <= after + slack
    assert marks.read(second) - marks.read(first) >= 9_000_000


class Driver:
    """Stands in for the management library: a counter of millijoules."""

    def __init__(self, answers: int = 0) -> None:
        self.millijoules, self.answers, self.names = 5_000, answers, []

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.names.append(name)
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        value._obj.value = self.millijoules
        return self.answers


def test_energy_is_the_difference_of_a_counter() -> None:
    driver = Driver()
    counter = EnergyCounter(CPU, driver)
    assert counter.available
    with Meter(CPU, counter) as meter:
        driver.millijoules += 2_500
        time.sleep(0.01)
    assert meter.joules == pytest.approx(2.5)
    assert meter.seconds >= 0.01
    assert meter.device_peak is None
    assert meter.host_peak > 10_000_000


def test_energy_is_left_out_where_nobody_knows() -> None:
    assert not EnergyCounter(CPU).available
    assert EnergyCounter(CPU).joules() is None
    broken = EnergyCounter(CPU, Driver(answers=3))
    assert not broken.available
    with Meter(CPU, broken) as meter:
        pass
    assert meter.joules is None


def test_memory_peaks_are_seen() -> None:
    with Meter(CPU) as meter:
        block = torch.ones(40_000_000, dtype=torch.uint8)
        time.sleep(0.25)
        del block
    with Meter(CPU) as later:
        pass
    assert meter.host_peak - later.host_peak > 20_000_000


@pytest.mark.gpu
def test_a_gpu_tells_energy_and_memory() -> None:
    device = torch.device("cuda")
    counter = EnergyCounter(device)
    with Meter(device, counter) as meter:
        block = torch.ones(1 << 28, dtype=torch.uint8, device=device)
        for _ in range(200):
            torch.ones(2000, 2000, device=device) @ torch.ones(2000, 2000, device=device)
        del block
    assert meter.device_peak is not None
    assert meter.device_peak >= 1 << 28
    if counter.available:
        assert meter.joules is not None
        assert meter.joules > 0
