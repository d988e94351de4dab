"""Measures this machine for ``hardware=local``: ``python -m specgate.policy.measure`` (``--help``).

Copies against their size, memory, an expert's matrix products against tokens, launches, reads of a folder,
free memory. docs/hardware.md says what is made of each; the profile also keeps every reading.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from specgate.errors import ConfigError, SpecgateError
from specgate.policy.hardware import Hardware, profile_path, save
from specgate.policy.readings import (
    MIB,
    fit_line,
    misfit,
    read_copies,
    read_experts,
    read_file,
    read_launch,
    read_memory,
)
from specgate.policy.readings_graph import fields_of, read_graphs
from specgate.policy.readings_layer import read_gathered, read_host
from specgate.policy.readings_slowed import read_slowed

#: Relative error of the line through the copies above which the machine was not quiet.
BUSY = 0.25


_HOST = {
    "operation": "an operation of a layer",
    "layer": "a layer's operations",
    "readback": "the choice read back, besides",
    "upload": "slots sent over, besides",
    "send": "the same without waiting",
    "synchronous": "a layer with both",
    "copied": "the same after a copy, less that",
    "ahead": "the same, launched ahead of it",
}


_GRAPHS = {
    "write": "graphs: slots sent",
    "experts": "graphs: experts launched",
    "dense": "graphs: dense part launched",
    "answer": "graphs: the choice read back",
    "layer": "graphs: a layer",
    "node": "graphs: an operation on the device",
    "gap": "graphs: the device besides operations",
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        device: torch's name of it.
        folder: on the disk that holds, or will hold, the expert file.
        mib: sizes of copies. tokens: that an expert serves. hidden, width: of that expert.
        top_k: experts of a token that are multiplied together.
        file_mib: size of the file. block_mib: of a read. threads: reads in flight.
        memory_mib: bytes copied within a memory. repeats: of every reading.

    Raises:
        ConfigError: for what makes no sense.
    """

    device: str = "auto"
    folder: Path = Path()
    mib: Sequence[float] = (0.25, 1, 4, 16, 64)
    tokens: Sequence[int] = (1, 4, 16, 64, 256, 1024)
    hidden: int = 2048
    width: int = 1024
    top_k: int = 4
    file_mib: int = 1024
    block_mib: int = 4
    threads: int = 8
    memory_mib: int = 256
    repeats: int = 9

    def __post_init__(self) -> None:
        least = {"hidden": 1, "width": 1, "file_mib": 1, "block_mib": 1, "threads": 1, "memory_mib": 1}
        for name, low in (least | {"repeats": 3, "top_k": 1}).items():
            if getattr(self, name) < low:
                raise ConfigError(
                    f"--{name.replace('_', '-')}={getattr(self, name)} is too small; {low} or more."
                )
        if len(set(self.mib)) < 2 or min(self.mib) <= 0:
            raise ConfigError(f"--mib {' '.join(map(str, self.mib))}: name two or more sizes above 0.")
        if not self.tokens or min(self.tokens) < 1:
            raise ConfigError(f"--tokens {' '.join(map(str, self.tokens))}: name numbers from 1.")

    @property
    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ConfigError: there is none of that name.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
            raise ConfigError(f"--device={name} is not known here; choose auto, cpu or cuda.")
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"--device={name}: there is no CUDA device here; choose cpu.")
        return torch.device(name)


def free_memory(device: torch.device) -> tuple[float, float, float]:
    """GB: of the device in all, of it free, of the host available."""
    host = psutil.virtual_memory()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total * 1e-9, free * 1e-9, host.available * 1e-9
    return host.total * 1e-9, host.available * 1e-9, host.available * 1e-9


def device_name(device: torch.device) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def measure(plan: Plan, progress: Progress | None = None) -> Hardware:
    """Takes all readings and makes a profile of them.

    Raises:
        ConfigError: for what makes no sense, or readings that do.
    """
    device = plan.torch_device
    sizes = [int(m * MIB) for m in plan.mib]
    task = None if progress is None else progress.add_task("measuring", total=None)

    def tick(what: str) -> None:
        if progress is not None and task is not None:
            progress.update(task, description=what)

    total, free, host_free = free_memory(device)
    pageable = read_copies(sizes, plan.repeats, device, False, tick)
    pinned = read_copies(sizes, plan.repeats, device, True, tick) if device.type == "cuda" else pageable
    tick("memory")
    host_memory = read_memory(torch.device("cpu"), plan.memory_mib * MIB, plan.repeats)
    own_memory = (
        read_memory(device, plan.memory_mib * MIB, plan.repeats) if device.type == "cuda" else host_memory
    )
    experts = read_experts(plan.tokens, plan.hidden, plan.width, plan.repeats, device, tick=tick)
    tick("experts copied together")
    gathered = read_gathered(plan.top_k, plan.hidden, plan.width, plan.repeats, device)
    tick("launches")
    launch = read_launch(device, plan.repeats)
    host = read_host(device, plan.repeats)
    tick("launches beside copies")
    slowed = read_slowed(device, plan.repeats)
    tick("launches of graphs")
    graphs = read_graphs(device, plan.repeats)
    file = read_file(
        plan.folder, plan.file_mib * MIB, plan.block_mib * MIB, plan.threads, max(3, plan.repeats // 3), tick
    )
    latency, bandwidth = fit_line(sizes, [row["ns"] for row in pinned])
    _, slow = fit_line(sizes, [row["ns"] for row in pageable])
    # Few tokens read an expert's weights and do little else: that is the bandwidth that decoding gets.
    reached = max(own_memory["gb_per_s"], *(row["gb_per_s"] for row in experts))
    return Hardware(
        name="local",
        device=device_name(device),
        device_gb=round(total, 3),
        reserved_gb=round(max(0.0, total - free), 3),
        device_gb_per_s=reached,
        tflops=max(row["tflops"] for row in experts),
        link_gb_per_s=round(bandwidth, 4),
        link_latency_us=round(latency * 1e-3, 4),
        pageable_gb_per_s=round(slow, 4),
        host_gb=round(host_free, 3),
        host_gb_per_s=max(host_memory["gb_per_s"], round(bandwidth, 4)),
        file=str(plan.folder.resolve()),
        file_gb_per_s=file["gb_per_s"],
        file_latency_us=round(file["page_ns"] * 1e-3, 3),
        kernel_us=round(launch["ns"] * 1e-3, 4),
        operation_us=round(host["operation"]["ns"] * 1e-3, 4),
        readback_us=round(host["readback"]["ns"] * 1e-3, 4),
        upload_us=round(host["upload"]["ns"] * 1e-3, 4),
        send_us=round(host["send"]["ns"] * 1e-3, 4),
        launch_slowdown=max(0.0, slowed["slowdown"]["median"]) if slowed else 0.0,
        gathered_gb_per_s=gathered["gb_per_s"],
        graph_slowdown=max(0.0, graphs["slowdown"]["median"]) if graphs else 0.0,
        **fields_of(graphs),
        ahead=device.type == "cuda",
        measured=True,
        source=f"measured on {device_name(device)}; medians of {plan.repeats} readings",
        readings={
            "pinned": pinned if device.type == "cuda" else [],
            "pageable": pageable,
            "link_misfit": round(misfit(sizes, [r["ns"] for r in pinned], latency, bandwidth), 4),
            "experts": experts,
            "expert": {"hidden": plan.hidden, "width": plan.width},
            "device_memory": own_memory,
            "host_memory": host_memory,
            "launch": launch,
            "host": host,
            "slowed": slowed,
            "graphs": graphs,
            "gathered": gathered,
            "file": file,
        },
    )


def table_of(found: Hardware) -> Table:
    """The readings, for a terminal."""
    table = Table(title=f"{found.device}: medians, lowest to highest", title_justify="left")
    table.add_column("what")
    for column in ("of", "median", "from", "to", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    readings: Any = found.readings

    def add(what: str, of: str, row: Any, speed: str) -> None:
        table.add_row(what, of, *[_time(row[name]) for name in ("ns", "low", "high")], speed)

    for kind in ("pinned", "pageable"):
        for row in readings[kind]:
            add(f"copy, {kind}", f"{row['bytes'] / MIB:g} MiB", row, f"{row['gb_per_s']:.3g} GB/s")
    for row in readings["experts"]:
        speed = f"{row['tflops']:.3g} TFLOPS, {row['gb_per_s']:.3g} GB/s"
        add("an expert", f"{row['tokens']} tokens", row, speed)
    for kind in ("device_memory", "host_memory"):
        row = readings[kind]
        add(kind.replace("_", " "), f"{row['bytes'] / MIB:g} MiB", row, f"{row['gb_per_s']:.3g} GB/s")
    row = readings["gathered"]
    add("experts copied together", f"{row['top_k']} experts", row, f"{row['gb_per_s']:.3g} GB/s")
    add("a small operation", "", readings["launch"], "")
    for name, what in _HOST.items():
        add(what, "", readings["host"][name], "")
    if slowed := readings["slowed"]:
        longer = slowed["slowdown"]
        add("a layer, its slots sent ahead", "", slowed["alone"], "")
        share = f"{longer['median']:.1%} longer, {longer['low']:.1%} to {longer['high']:.1%}"
        add("the same beside copies", "", slowed["beside"], share)
    if graphs := readings["graphs"]:
        for name, what in _GRAPHS.items():
            add(what, "", graphs[name], "")
    row = readings["file"]
    how = "O_DIRECT" if row["direct"] else "through the page cache"
    add(f"file, {how}", f"{row['bytes'] / MIB:g} MiB", row, f"{row['gb_per_s']:.3g} GB/s")
    return table


def _time(ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    base = Plan()
    parser = argparse.ArgumentParser(prog="python -m specgate.policy.measure", description=__doc__)
    parser.add_argument("--device", default=base.device, help="auto, cpu or cuda")
    parser.add_argument("--folder", type=Path, default=base.folder, help="on the disk of the expert file")
    parser.add_argument("--mib", type=float, nargs="+", default=list(base.mib), help="sizes of copies")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(base.tokens), help="of an expert")
    parser.add_argument("--hidden", type=int, default=base.hidden, help="hidden size of that expert")
    parser.add_argument("--width", type=int, default=base.width, help="its width")
    parser.add_argument("--top-k", type=int, default=base.top_k, help="experts of a token")
    parser.add_argument("--file-mib", type=int, default=base.file_mib, help="size of the file that is read")
    parser.add_argument("--block-mib", type=int, default=base.block_mib, help="size of a read")
    parser.add_argument("--threads", type=int, default=base.threads, help="reads in flight")
    parser.add_argument("--memory-mib", type=int, default=base.memory_mib, help="copied within a memory")
    parser.add_argument("--repeats", type=int, default=base.repeats, help="readings of each")
    parser.add_argument("--out", type=Path, default=None, help=f"the profile; else {profile_path()}")
    values = vars(parser.parse_args(arguments))
    out = values.pop("out")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            found = measure(Plan(**values), progress)
        path = save(found, out)
    except SpecgateError as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False)
        return 1
    console.print(table_of(found))
    console.print(
        f"Link: {found.link_gb_per_s:.3g} GB/s after {found.link_latency_us:.3g} us "
        f"(off by {found.readings['link_misfit']:.0%} at most); {found.free_gb:.3g} GB of the device and "
        f"{found.host_gb:.3g} GB of host memory are free. Use it with hardware=local.",
        highlight=False,
    )
    if found.readings["link_misfit"] > BUSY:
        console.print("Copies do not lie on a line, the machine was not idle; measure again when it is.")
    console.print(str(path), soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
