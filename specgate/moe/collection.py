"""Collects routing traces: plans, says what it will cost, runs batch after batch, survives being killed.

The plan (model, text, settings, versions) determines every byte of the trace. A shard is a fixed group of
batches and every batch has a seed of its own, so a killed collection that is started again ends with the
same files as one that was never interrupted.

Letters: S sequences, N flat tokens, L MoE layers, K experts per token, D hidden size.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from specgate.errors import SpecgateError
from specgate.moe.batches import Batch, Control, Settings, concatenate
from specgate.moe.families import router_tensors
from specgate.moe.hosts import Host
from specgate.moe.planning import Job, check_space, describe, duration, no_arrays, prepare
from specgate.moe.text import TextDocument
from specgate.traces.schema import TraceHeader
from specgate.traces.store import StackArrays, TraceWriter

SMALL_HOST = 50_000_000  # parameters
TIMED_SECONDS = 2.0  # a second batch is timed when the first took less


class Interrupted(SpecgateError):
    """A collection was stopped by Ctrl-C; it can be resumed."""


@dataclass
class Outcome:
    """What a collection did.

    Attributes:
        header: of the finished trace.
        seconds, tokens: time spent and tokens routed by this process (resumed shards are not counted).
        control: counts of the routing control per stack, over the whole trace.
    """

    header: TraceHeader
    seconds: float
    tokens: int
    control: dict[str, Control] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        return {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds if self.tokens else None,
            "routing_control": self.header.routing_control,
        }


def choose_threads(host: Host, out: Path, wanted: int | None = None) -> int:
    """CPU threads to run on; rounding depends on their number, so a resumed collection keeps its own.

    A small host on the CPU runs on one thread: its matrices are too small to share out.
    """
    if wanted:
        return wanted
    try:
        return int(json.loads((out / "plan.json").read_text())["plan"]["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        parameters = sum(p.numel() for p in host.model.parameters())
        small = host.device.type == "cpu" and parameters < SMALL_HOST
        return 1 if small else torch.get_num_threads()


def collect(
    host: Host,
    documents: list[TextDocument],
    settings: Settings,
    out: str | Path,
    console: Console | None = None,
) -> Outcome:
    """Collects a trace into ``out``, or goes on with one that was interrupted there.

    Raises:
        TraceError: if ``out`` holds another plan's collection.
        Interrupted: on Ctrl-C.
        SpecgateError: if the disk is too full, or a decision recomputed by hand is not what executed.
    """
    console = console or Console()
    out = Path(out)
    job = prepare(host, documents, settings)
    describe(job, out, console)
    check_space(job, out)
    writer = TraceWriter(out, job.header, job.plan, job.num_shards)
    pending = [shard for shard in range(job.num_shards) if not writer.done(shard)]
    if len(pending) < job.num_shards:
        console.print(
            f"Going on: {job.num_shards - len(pending)} of {job.num_shards} shards are there already."
        )
    start, tokens = time.perf_counter(), 0
    try:
        if pending:
            ready = _time_first(job, pending, console)
            tokens = _run(job, writer, pending, ready, console)
    except KeyboardInterrupt:
        done = sum(writer.done(shard) for shard in range(job.num_shards))
        raise Interrupted(
            f"Stopped with {done} of {job.num_shards} shards in {out}; run the same command again to go on."
        ) from None
    seconds = time.perf_counter() - start
    control = {name: Control() for name in job.header.stacks}
    for shard in range(job.num_shards):
        for name, counts in writer.shard_meta(shard)["control"].items():
            control[name].add(counts)
    header = writer.finish(_control_summary(control, settings), _routers(job))
    if tokens:
        console.print(f"{tokens:,} tokens in {duration(seconds)}, {tokens / seconds:,.0f} tokens/s")
    _tell_control(header.routing_control, settings, console)
    return Outcome(header, seconds, tokens, control)


def _run(job: Job, writer: TraceWriter, pending: list[int], ready: dict[int, Batch], console: Console) -> int:
    """Runs what is pending, shard by shard; returns how many tokens that was."""
    tokens = 0
    columns = (
        TextColumn("collecting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches,"),
        TimeRemainingColumn(),
        TextColumn("left, {task.fields[rate]}"),
    )
    total = sum(len(job.batches_of(shard)) for shard in pending)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, rate="")
        begin = time.perf_counter()
        for shard in pending:
            parts: dict[str, list[StackArrays]] = {name: [] for name in job.header.stacks}
            control = {name: Control() for name in job.header.stacks}
            for number in job.batches_of(shard):
                batch = ready.pop(number, None) or job.runner.run(number, job.batch(number))
                for name, arrays in batch.arrays.items():
                    parts[name].append(arrays)
                    tokens += arrays.tokens
                for name, counts in batch.control.items():
                    control[name].add(asdict(counts))
                rate = tokens / max(time.perf_counter() - begin, 1e-9)
                progress.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")
            writer.write_shard(
                shard,
                {
                    name: concatenate(p) if p else no_arrays(job.header.stacks[name])
                    for name, p in parts.items()
                },
                {"control": {name: asdict(counts) for name, counts in control.items()}},
            )
    return tokens


def _time_first(job: Job, pending: list[int], console: Console) -> dict[int, Batch]:
    """Runs the first one or two batches, says how long the rest will take; they are not run again."""
    numbers = [number for shard in pending for number in job.batches_of(shard)]
    ready: dict[int, Batch] = {}
    seconds = 0.0
    for number in numbers[:2]:  # the first also pays for warming up
        start = time.perf_counter()
        ready[number] = job.runner.run(number, job.batch(number))
        seconds = time.perf_counter() - start
        if seconds > TIMED_SECONDS:
            break
    left = seconds * (len(numbers) - len(ready))
    console.print(f"  about {duration(left)} ({seconds:.2f} s for a batch of {len(job.batch(numbers[0]))})")
    return ready


def _routers(job: Job) -> dict[str, Tensor]:
    """Norms and routers of every layer in float32, named as the trace names them."""
    return {
        f"{name}.{layer.index}.{part}": tensor.float().cpu()
        for name, layers in job.runner.layers.items()
        for layer in layers
        for part, tensor in router_tensors(layer).items()
    }


def _control_summary(control: dict[str, Control], settings: Settings) -> dict[str, Any]:
    """The header's routing control: agreement overall and counts per stack."""
    total = Control()
    for counts in control.values():
        total.add(asdict(counts))
    return {
        "mode": settings.control,
        "decisions": total.decisions,
        "agreement": total.agree / total.decisions if total.decisions else None,
        "decisions_stored_hidden": total.stored_decisions,
        "agreement_stored_hidden": (
            total.stored_agree / total.stored_decisions if total.stored_decisions else None
        ),
        "stacks": {name: asdict(counts) for name, counts in control.items()},
    }


def _tell_control(summary: dict[str, Any], settings: Settings, console: Console) -> None:
    if summary["agreement"] is None:
        console.print("Routing control was off (control=none).")
        return
    stored = ""
    if summary["agreement_stored_hidden"] is not None:
        stored = f"; from the stored {settings.hidden} hidden states {summary['agreement_stored_hidden']:.3%}"
    console.print(
        f"Routing control: {summary['decisions']:,} decisions recomputed by hand, "
        f"{summary['agreement']:.2%} are what executed{stored}"
    )
