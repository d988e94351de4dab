"""Readings of a machine's speeds: copies, memory, matrix products, launches, files. Nothing is kept here.

Letters: T tokens, D hidden size, I width of an expert.

Every figure is a median over repeats, given with its lowest and highest reading. On a machine without CUDA
memory stands in for the device, as it does in the expert store.
"""

from __future__ import annotations

import errno
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specgate.errors import ConfigError

MIB = 1 << 20
#: A reading shorter than this is made of several calls.
SHORTEST_S = 2e-3
PAGE = 4096
#: Copies are taken from as much memory in turn: experts come from many GB, not from a processor's caches.
REGION_MIB = 2048


@dataclass(frozen=True)
class Reading:
    """Nanoseconds of one call: median, least, most."""

    ns: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Range over the median."""
        return (self.high - self.low) / self.ns if self.ns else 0.0

    def as_dict(self) -> dict[str, float]:
        """Plain values."""
        return {name: round(value, 1) for name, value in asdict(self).items()}


def timed(call: Callable[[], object], wait: Callable[[], None], repeats: int) -> Reading:
    """Medians of a call's time; short calls are repeated within a reading.

    Args:
        wait: until the device has done everything.
    """
    call()
    wait()
    start = time.perf_counter()
    call()
    wait()
    count = max(1, int(SHORTEST_S / max(time.perf_counter() - start, 1e-9)))
    taken = []
    for _ in range(repeats):
        wait()
        begin = time.perf_counter_ns()
        for _ in range(count):
            call()
        wait()
        taken.append((time.perf_counter_ns() - begin) / count)
    return Reading(statistics.median(taken), min(taken), max(taken))


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits for a device."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Latency and bandwidth of ``time = latency + size / bandwidth``, by least squares of relative errors.

    Returns:
        Latency (0 or more) and bandwidth, in the units of the times and sizes.

    Raises:
        ConfigError: fewer than two sizes, or times that do not grow with them.
    """
    b, t = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if len(b) != len(t) or len(set(b.tolist())) < 2 or b.min() <= 0 or t.min() <= 0:
        raise ConfigError("A bandwidth needs times of two sizes at least; name more sizes.")
    (latency, inverse), *_ = np.linalg.lstsq(np.stack([1 / t, b / t], axis=1), np.ones(len(t)), rcond=None)
    if latency < 0:
        latency, inverse = 0.0, float((b / t).sum() / ((b / t) ** 2).sum())
    if inverse <= 0:
        raise ConfigError("Larger copies took no longer than small ones; measure again on a quiet machine.")
    return float(latency), float(1 / inverse)


def misfit(sizes: Sequence[float], times: Sequence[float], latency: float, bandwidth: float) -> float:
    """Largest relative error of such a line."""
    return max(abs((latency + b / bandwidth) / t - 1) for b, t in zip(sizes, times, strict=True))


def read_copies(
    sizes: Sequence[int],
    repeats: int,
    device: torch.device,
    pinned: bool,
    tick: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Copies from host memory to the device, one at a time: one row per size in bytes.

    Blocks are taken in turn from a region larger than a processor's caches.
    """
    wait, rows = waiter(device), []
    for size in sizes:
        count = max(2, min(64, REGION_MIB * MIB // size))
        host = torch.ones(count, size, dtype=torch.uint8, pin_memory=pinned and device.type == "cuda")
        there = torch.zeros(size, dtype=torch.uint8, device=device)
        turn = iter(range(1 << 62))

        def copy(host: Tensor = host, there: Tensor = there, turn: Any = turn, count: int = count) -> None:
            there.copy_(host[next(turn) % count], non_blocking=True)

        reading = timed(copy, wait, repeats)
        rows.append({"bytes": size} | reading.as_dict() | {"gb_per_s": round(size / reading.ns, 4)})
        tick(f"{'pinned' if pinned else 'pageable'} copies of {size / MIB:g} MiB")
        del host, there
    return rows


def read_memory(device: torch.device, size: int, repeats: int) -> dict[str, Any]:
    """Bandwidth of a device's memory: a copy within it, read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    reading = timed(lambda: target.copy_(source), waiter(device), repeats)
    return {"bytes": 2 * size} | reading.as_dict() | {"gb_per_s": round(2 * size / reading.ns, 4)}


def read_experts(
    tokens: Iterable[int],
    hidden: int,
    width: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    tick: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A gated expert's two matrix products against the tokens that it serves: one row each.

    Shapes:
        ``[T, D] x [D, 2I]`` and ``[T, I] x [I, D]``; several experts in turn, so that no cache holds one.
    """
    weights = 3 * hidden * width
    itemsize = torch.empty(0, dtype=dtype).element_size()
    count = max(2, min(16, 256 * MIB // (weights * itemsize)))
    up_EDI = torch.randn(count, hidden, 2 * width, device=device).to(dtype)
    down_EID = torch.randn(count, width, hidden, device=device).to(dtype)
    wait, rows = waiter(device), []
    for T in tokens:
        h_TD = torch.randn(T, hidden, device=device).to(dtype)
        turn = iter(range(1 << 62))

        def run(h_TD: Tensor = h_TD, turn: Any = turn) -> Tensor:
            e = next(turn) % count
            both_TI = h_TD @ up_EDI[e]
            return both_TI[:, :width] @ down_EID[e]

        reading = timed(run, wait, repeats)
        rows.append(
            {"tokens": T}
            | reading.as_dict()
            | {"tflops": round(2 * T * weights / reading.ns * 1e-3, 4)}
            | {"gb_per_s": round(weights * itemsize / reading.ns, 4)}
        )
        tick(f"an expert of {T} tokens")
    return rows


def read_launch(device: torch.device, repeats: int, calls: int = 200) -> dict[str, Any]:
    """The host's time for one small operation, of many in a row."""
    small = torch.zeros(8, device=device)

    def many() -> None:
        for _ in range(calls):
            small.add_(1.0)

    reading = timed(many, waiter(device), repeats)
    return {name: round(value / calls, 1) for name, value in reading.as_dict().items()}


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | flag)
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(descriptor, [page], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY), False
    return descriptor, bool(flag)


def read_file(
    folder: Path,
    size: int,
    block: int,
    threads: int,
    repeats: int,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Reading a folder's disk: ``threads`` blocks in flight, and single pages one by one.

    A file of ``size`` bytes is written there first, and removed.

    Raises:
        ConfigError: a folder that cannot be written to, or a file of less than a block per thread.
    """
    if size < block * threads or block % PAGE:
        raise ConfigError(
            f"A file of {size} bytes has no {threads} blocks of {block} bytes; name a larger --file-mib."
        )
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".specgate-measure.")
    except OSError as error:
        raise ConfigError(
            f"--folder={folder} cannot be written to ({error.strerror}); name one on the disk of the experts."
        ) from None
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            generator = np.random.default_rng(0)
            for at in range(0, size, 16 * MIB):
                file.write(generator.bytes(min(16 * MIB, size - at)))
            file.flush()
            os.fsync(file.fileno())
        tick("the file is written")
        opened, direct = open_direct(path)
        try:
            taken = [_pass(opened, size, block, threads) for _ in range(repeats)]
            single = _pages(opened, size, repeats)
        finally:
            os.close(opened)
    finally:
        path.unlink(missing_ok=True)
    median = statistics.median(taken)
    reading = Reading(median, min(taken), max(taken))
    tick("the file is read")
    return {
        "bytes": size,
        "block": block,
        "threads": threads,
        "direct": direct,
        "gb_per_s": round(size / median, 4),
        "page_ns": round(single, 1),
    } | reading.as_dict()


def _drop(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _pass(descriptor: int, size: int, block: int, threads: int) -> float:
    """Nanoseconds to read the file once."""
    _drop(descriptor)
    starts = list(range(0, size - block + 1, block))
    begin = threading.Barrier(threads + 1)
    failed: list[OSError] = []

    def loop(number: int) -> None:
        buffer = mmap.mmap(-1, block)
        np.frombuffer(buffer, np.uint8)[::PAGE] = 1
        begin.wait()
        try:
            for at in starts[number::threads]:
                done = 0
                while done < block:
                    done += _some(os.preadv(descriptor, [memoryview(buffer)[done:]], at + done), at + done)
        except OSError as error:
            failed.append(error)

    workers = [threading.Thread(target=loop, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    begin.wait()
    start = time.perf_counter_ns()
    for worker in workers:
        worker.join()
    if failed:
        raise ConfigError(f"The disk failed while being read ({failed[0].strerror}); name another --folder.")
    return (time.perf_counter_ns() - start) * size / (len(starts) * block)


def _some(count: int, at: int) -> int:
    if count <= 0:
        raise OSError(errno.EIO, f"the file ends at {at}")
    return count


def _pages(descriptor: int, size: int, repeats: int) -> float:
    """Median nanoseconds of one page, read at random places one by one."""
    generator = np.random.default_rng(1)
    _drop(descriptor)
    taken = []
    with mmap.mmap(-1, PAGE) as page:
        for at in generator.integers(0, size // PAGE, size=32 * repeats):
            begin = time.perf_counter_ns()
            os.preadv(descriptor, [page], int(at) * PAGE)
            taken.append(time.perf_counter_ns() - begin)
    return statistics.median(taken)
