"""The file tier against plain reads: the expert store's file reader, and loops of ``pread``, on one file.

``python -m benchmarks.file_tier`` (``--help`` for the options). Every variant reads the whole file once per
round, in an order that changes from round to round, so that a disk that slows down slows all of them down.
Reported are medians of GB/s and each reader's share of the best plain loop, which is chosen by its median
after the fact: the bar is the luckiest of many.

The page cache must not lie: both sides read with O_DIRECT, and the file's cached pages are dropped before
every pass. (A virtual disk may still be cached by the machine beneath, for all variants alike.) Where the
file system refuses O_DIRECT, both read through the page cache, and the record says so.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specgate.report.record import Run, describe_hardware, read_record
from specgate.runtime import native

MIB = 1 << 20
#: Requests that the reader is given at once: as many as the store has reads in flight.
REQUESTS = 8


@dataclass(frozen=True)
class Plain:
    """``threads`` threads, each a loop of ``pread`` of ``block_mib`` MiB over its share of the file."""

    block_mib: int
    threads: int

    def __str__(self) -> str:
        return f"pread loop, {self.block_mib} MiB x {self.threads} threads"


@dataclass(frozen=True)
class Reader:
    """The file reader, asked for blocks of ``request_mib`` MiB, a checksum for each if ``checksum``."""

    backend: str
    request_mib: int
    checksum: bool = False

    def __str__(self) -> str:
        return f"reader, {self.backend}, {self.request_mib} MiB{', checksum' if self.checksum else ''}"


Variant = Plain | Reader


def make_file(folder: Path, size: int) -> Path:
    """A file of random bytes, on the disk and not only on its way there."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, prefix="file_tier.")
    generator = np.random.default_rng(0)
    with os.fdopen(descriptor, "wb") as file:
        for at in range(0, size, 16 * MIB):
            file.write(generator.bytes(min(16 * MIB, size - at)))
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, 4096) as page:
            os.preadv(descriptor, [page], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY), False
    return descriptor, True


def drop_cache(path: Path) -> None:
    """Forget the cached pages of a file that is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def memory(size: int) -> mmap.mmap:
    """Memory at a page boundary, all of it present."""
    made = mmap.mmap(-1, size)
    np.frombuffer(made, np.uint8)[::4096] = 1
    return made


def time_plain(path: Path, size: int, variant: Plain) -> float:
    """Seconds of one pass; threads and memory are made outside of the clock."""
    block = variant.block_mib * MIB
    descriptor, _ = open_direct(path)
    buffers = [memory(block) for _ in range(variant.threads)]
    begin, total = threading.Barrier(variant.threads + 1), [0] * variant.threads

    def loop(number: int) -> None:
        begin.wait()
        for at in range(number * block, size, variant.threads * block):
            total[number] += os.preadv(descriptor, [buffers[number]], at)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(variant.threads)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    os.close(descriptor)
    if sum(total) != size:
        raise RuntimeError(f"{variant} read {sum(total)} of {size} bytes")
    return seconds


def checksums(path: Path, size: int, block: int) -> list[int]:
    """CRC-32C of each block of the file."""
    crc32c = native.require().crc32c
    with path.open("rb") as file:
        return [crc32c(file.read(min(block, size - at))) for at in range(0, size, block)]


def time_reader(path: Path, variant: Reader, sums: list[int]) -> float:
    """Seconds of one pass with ``REQUESTS`` requests under way; reader and memory are made outside of the
    clock."""
    block = variant.request_mib * MIB
    slabs = [memory(block) for _ in range(REQUESTS)]
    seconds = native.require().time_reading(str(path), block, slabs, sums, backend=variant.backend)
    return float(seconds)


def measure(path: Path, variants: Iterable[Variant], rounds: int) -> dict[str, Any]:
    """Time every variant ``rounds`` times, interleaved; medians in GB/s (10^9 bytes)."""
    size = path.stat().st_size
    variants = list(variants)
    sums = {
        v: checksums(path, size, v.request_mib * MIB)
        for v in variants
        if isinstance(v, Reader) and v.checksum
    }
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for variant in shuffler.sample(variants, len(variants)):
            drop_cache(path)
            if isinstance(variant, Plain):
                seconds[variant].append(time_plain(path, size, variant))
            else:
                seconds[variant].append(time_reader(path, variant, sums.get(variant, [])))
    speed = {variant: size / statistics.median(taken) / 1e9 for variant, taken in seconds.items()}
    plain = [variant for variant in variants if isinstance(variant, Plain)]
    best = max(plain, key=lambda variant: speed[variant])
    descriptor, direct = open_direct(path)
    os.close(descriptor)

    def row(variant: Variant) -> dict[str, Any]:
        spread = [size / taken / 1e9 for taken in seconds[variant]]
        return asdict(variant) | {
            "gb_per_s": speed[variant],
            "slowest": min(spread),
            "fastest": max(spread),
            "share_of_best_plain": speed[variant] / speed[best],
        }

    return {
        "file_bytes": size,
        "direct": direct,
        "rounds": rounds,
        "requests": REQUESTS,
        "best_plain": row(best),
        "plain": [row(variant) for variant in plain],
        "reader": [row(variant) for variant in variants if isinstance(variant, Reader)],
    }


def backends() -> list[str]:
    """Those of the file reader that this machine has."""
    with native.require().FileReader([__file__]) as reader:
        return ["io_uring", "pread"] if reader.backend == "io_uring" else ["pread"]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="an existing file (default: one is made, and removed)")
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where to make it: the disk to measure"
    )
    parser.add_argument("--mib", type=int, default=512, help="its size")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 16], help="of plain loops, MiB")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4], help="of plain loops")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16], help="to the reader, MiB")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/file_tier"))
    args = parser.parse_args()
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    log = Run("file_tier.py", config)
    variants: list[Variant] = [Plain(block, threads) for block in args.blocks for threads in args.threads]
    for backend in backends():
        variants += [Reader(backend, request, sums) for request in args.requests for sums in (False, True)]
    path = args.file or make_file(args.folder, args.mib * MIB)
    try:
        result = measure(path, variants, args.rounds)
    finally:
        if args.file is None:
            path.unlink()
    print(
        f"{result['file_bytes'] / 1e9:.2f} GB, {args.rounds} interleaved rounds, "
        f"{'O_DIRECT' if result['direct'] else 'through the page cache: O_DIRECT is refused here'}"
    )
    for variant, row in zip(variants, result["plain"] + result["reader"], strict=True):
        print(
            f"  {variant!s:36s} {row['gb_per_s']:7.3f} GB/s ({row['slowest']:.3f} to {row['fastest']:.3f})  "
            f"{row['share_of_best_plain']:.3f} of the best plain loop"
        )
    command = shlex.join(["python", "-m", "benchmarks.file_tier", *sys.argv[1:]])
    written = log.write(args.out, command=command, file_tier=result)
    print(f"on {describe_hardware(read_record(written)['hardware'])}")
    print(written)


if __name__ == "__main__":
    main()
