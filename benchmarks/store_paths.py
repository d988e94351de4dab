"""The expert store's two paths against the best there is: copies against bare ones, hits against nothing.

``python -m benchmarks.store_paths`` (``--help`` for the options). On a GPU copies go from pinned memory to
the device, on the CPU (to see that it works) from memory to memory.

* **copies**: as many experts as there are bytes for, moved once by plain asynchronous torch copies in one
  stream (what ``cudaMemcpyAsync`` can do) and once by the store: demanded (a few experts per event, as a
  model asks), and forecast (as many as the slots hold). Rounds are interleaved, in turns; given are medians
  of GB/s and the store's share.
* **hits**: nanoseconds of an acquire and a release of experts that are all on the device, in the native core
  and from Python, and of asking ahead for what is there.
* **resident**: tokens per second of a bundled model with everything in slots, against plain transformers
  (``benchmark.py mode=live`` with that one budget).
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from specgate.metrics.timing import wait
from specgate.moe.hosts import resolve_device
from specgate.report.live import live
from specgate.report.live_settings import LiveSettings
from specgate.report.record import Run, describe_hardware, read_record
from specgate.report.replay_shape import ModelShape
from specgate.report.store_paths_page import tables_of
from specgate.runtime.layout import BlockLayout
from specgate.runtime.store import ExpertStore, StoreSettings

MIB = 1 << 20
EVENT = 4  # experts of one event
FLYING = 1 << 40  # bytes of forecast experts in flight: all of them


def layout_of(size: int) -> BlockLayout:
    """Experts of ``size`` bytes, one matrix each, copied as they are."""
    return BlockLayout.make([("weight", (size // 4096, 1024), "float32")])


def pinned(size: int, device: torch.device) -> Tensor:
    """Host memory that the copy engine reads at full speed."""
    return torch.ones(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def bare_copies(count: int, size: int, slots: int, device: torch.device) -> Callable[[], float]:
    """A pass of plain copies of all blocks into the slots, in a stream of their own: its seconds."""
    blocks = [pinned(size, device) for _ in range(count)]
    arena = torch.zeros(slots, size, dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run() -> float:
        wait(device)
        start = time.perf_counter()
        if stream is None:
            for i, block in enumerate(blocks):
                arena[i % slots].copy_(block)
        else:
            with torch.cuda.stream(stream):
                for i, block in enumerate(blocks):
                    arena[i % slots].copy_(block, non_blocking=True)
        wait(device)
        return time.perf_counter() - start

    return run


def demanded(store: ExpertStore, device: torch.device) -> Callable[[], float]:
    """A pass of events over all experts, none of which is on the device when it is asked for."""
    events = [list(range(first, first + EVENT)) for first in range(0, store.experts, EVENT)]

    def run() -> float:
        store.drain()
        wait(device)
        start = time.perf_counter()
        for experts in events:
            store.acquire(0, experts)
            store.release(0, experts)
        store.drain()
        wait(device)
        return time.perf_counter() - start

    return run


def forecast(store: ExpertStore, device: torch.device) -> Callable[[], float]:
    """A pass of forecasts of all experts, as many at a time as there are slots; they are used, outside of the
    clock, before the next ones may take their place."""
    portions = [
        [(expert, 1.0) for expert in range(first, min(first + store.num_slots, store.experts))]
        for first in range(0, store.experts, store.num_slots)
    ]

    def run() -> float:
        store.drain()
        wait(device)
        seconds = 0.0
        for portion in portions:
            start = time.perf_counter()
            store.prefetch_all(0, portion)
            store.drain()
            wait(device)
            seconds += time.perf_counter() - start
            for expert, _ in portion:
                store.acquire(0, [expert])
                store.release(0, [expert])
            wait(device)
        return seconds

    return run


def open_store(count: int, size: int, slots: int, device: torch.device) -> ExpertStore:
    """Experts in memory, all of them written once."""
    settings = StoreSettings(prefetch_copy_bytes=FLYING, timeline=0)
    store = ExpertStore(
        None, slots, device=device, settings=settings, layout=layout_of(size), layers=1, experts=count
    )
    filling = torch.ones(store.layout.block_bytes, dtype=torch.uint8)
    for expert in range(count):
        store.fill(0, expert, filling)
    return store


def measure_copies(
    sizes: Sequence[int], total: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row per size of an expert, in bytes; ``total`` bytes are moved per pass."""
    rows = []
    for size in sizes:
        count = max(2, total // size // EVENT // 2) * 2 * EVENT
        slots = count // 2  # a pass over all of them finds none of the last half of the pass before
        bare = bare_copies(count, size, slots, device)
        with open_store(count, size, slots, device) as store:
            calls = {"bare": bare, "demanded": demanded(store, device), "forecast": forecast(store, device)}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():  # warm-up
                call()
            before = store.stats()
            names = list(calls)
            for number in range(rounds):
                for name in names[number % 3 :] + names[: number % 3]:
                    seconds[name].append(calls[name]())
            after = store.stats()
        moved = [
            after[f"copied_bytes_{level}"] - before[f"copied_bytes_{level}"]
            for level in ("demand", "prefetch")
        ]
        if moved != [rounds * count * size] * 2:
            raise RuntimeError(f"{moved} bytes were moved instead of {rounds * count * size} twice")
        speed = {name: count * size / statistics.median(taken) * 1e-9 for name, taken in seconds.items()}
        row: dict[str, Any] = {"mib": size / MIB, "experts": count, "rounds": rounds}
        for name, taken in seconds.items():
            row |= {f"{name}_gb_per_s": speed[name], f"{name}_slowest": count * size / max(taken) * 1e-9}
        row |= {f"{name}_share": speed[name] / speed["bare"] for name in ("demanded", "forecast")}
        rows.append(row)
    return rows


def measure_hits(experts: Sequence[int], calls: int, device: torch.device) -> list[dict[str, Any]]:
    """One row per number of experts in an event; medians in nanoseconds."""
    rows = []
    with open_store(64, MIB // 16, 64, device) as store:
        store.warm()
        for count in experts:
            wanted = list(range(count))
            core = [statistics.median(taken) for taken in store.time_hits(0, wanted, calls)]
            python: dict[str, list[int]] = {"acquire": [], "release": [], "prefetch": []}
            for _ in range(calls):
                t0 = time.perf_counter_ns()
                store.acquire(0, wanted)
                t1 = time.perf_counter_ns()
                store.release(0, wanted)
                t2 = time.perf_counter_ns()
                store.prefetch_all(0, [(expert, 0.5) for expert in wanted])
                t3 = time.perf_counter_ns()
                for name, taken in zip(python, (t1 - t0, t2 - t1, t3 - t2), strict=True):
                    python[name].append(taken)
            wait(device)
            row: dict[str, Any] = {"experts": count, "calls": calls}
            row |= {"core_acquire_ns": core[0], "core_release_ns": core[1]}
            row |= {f"python_{name}_ns": statistics.median(taken) for name, taken in python.items()}
            rows.append(row)
    return rows


def measure_resident(model: str, device: torch.device, tokens: int, rounds: int) -> dict[str, Any]:
    """All experts in slots against plain transformers."""
    settings = LiveSettings(
        model=model, variants=["resident", "offload"], residency=[1.0], new_tokens=tokens, repeats=rounds,
        device=str(device),
    )  # fmt: skip
    shape = ModelShape("unused", {"model_type": "olmoe"})
    with tempfile.TemporaryDirectory() as folder:
        rows = live(settings, shape, Path(folder))["rows"]
    speeds = {row["variant"]: row["tokens_per_second"] for row in rows}
    return {
        "model": model,
        "tokens": tokens,
        "rounds": rounds,
        **speeds,
        "ratio": rows[1]["against_resident"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=float, nargs="*", default=[1, 4, 16, 64], help="sizes of an expert")
    parser.add_argument("--total", type=int, default=1024, help="MiB moved in a pass")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--experts", type=int, nargs="*", default=[1, 2, 4, 8], help="of an event that hits")
    parser.add_argument("--calls", type=int, default=10_000, help="of such events")
    parser.add_argument("--model", nargs="*", default=["olmoe_ref"], help="for the resident ratio")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the resident ratio")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/store_paths"))
    args = parser.parse_args(arguments)
    device = resolve_device(args.device)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    log, result = Run("store_paths.py", config), {"device": str(device)}
    found: dict[str, Any] = {
        "copies": measure_copies([int(m * MIB) for m in args.mib], args.total * MIB, args.rounds, device),
        "hits": measure_hits(args.experts, args.calls, device) if args.experts else [],
        "resident": [measure_resident(model, device, args.tokens, args.repeats) for model in args.model],
    }
    command = shlex.join(["python", "-m", "benchmarks.store_paths", *(arguments or sys.argv[1:])])
    path = log.write(args.out, command=command, store_paths=result | found, threads=torch.get_num_threads())
    record = read_record(path)
    console = Console() if sys.stdout.isatty() else Console(width=132)
    for table in tables_of(record):
        console.print(table.to_rich())
    console.print(f"on {describe_hardware(record['hardware'])}", highlight=False)
    print(path)


if __name__ == "__main__":
    main()
