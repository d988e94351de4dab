"""What recording costs: the bare forward pass against the same pass under the recorder, interleaved.

``python -m benchmarks.recorder_overhead`` (``--help`` for the options). Each round times every variant once,
in an order that changes from round to round, so that a machine that slows down slows all of them down.
Reported are ratios of medians, of wall time and (on the CPU) of processor time, which other programs on the
machine disturb less. Taking the records out (``take``) is part of the time.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specgate.moe.hosts import Host, bundled_hosts, load_host
from specgate.moe.recorder import Recorder
from specgate.report.record import Run, describe_hardware, read_record

VARIANTS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "recorder": {},
    "recorder, control": {"control": True},
    "recorder, fp16 hidden states": {"hidden": "fp16"},
    "recorder, int8 hidden states": {"hidden": "int8"},
    "recorder, fp16 hidden states, control": {"hidden": "fp16", "control": True},
}


def forward(host: Host, batch: int, length: int) -> Callable[[], None]:
    """One whole forward pass, language-model head included, over random tokens ``[B, T]``."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(host.model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    ids_BT: Tensor = torch.randint(2, vocabulary, (batch, length), generator=generator).to(host.device)
    inputs = {"input_ids": ids_BT}
    if len(host.family.stacks) > 1:
        inputs["decoder_input_ids"] = ids_BT
    else:
        inputs["use_cache"] = False  # type: ignore[assignment]

    def run() -> None:
        with torch.no_grad():
            host.model(**inputs)

    return run


def timed(host: Host, run: Callable[[], None], options: dict[str, Any] | None) -> tuple[float, float]:
    """Wall and processor seconds of one pass; hooks are put up and taken down outside of the clock."""
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(host.model, **options)) if options is not None else None
        _wait(host)
        start, cpu = time.perf_counter(), time.process_time()
        run()
        if recorder is not None:
            recorder.take()
        _wait(host)
        return time.perf_counter() - start, time.process_time() - cpu


def _wait(host: Host) -> None:
    if host.device.type == "cuda":
        torch.cuda.synchronize(host.device)


def measure(host: Host, names: list[str], rounds: int, batch: int, length: int) -> dict[str, Any]:
    """Median times per variant, and their ratios to those of the bare pass."""
    run = forward(host, batch, length)
    names = ["bare", *(name for name in names if name != "bare")]
    for name in names:  # warm-up
        timed(host, run, VARIANTS[name])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            seconds[name].append(timed(host, run, VARIANTS[name]))
    wall, cpu = ({name: statistics.median(s[i] for s in seconds[name]) for name in names} for i in (0, 1))
    rows = {
        name: {
            "wall_ms": 1e3 * wall[name],
            "cpu_ms": 1e3 * cpu[name],
            "wall_ratio": wall[name] / wall["bare"],
            "cpu_ratio": cpu[name] / cpu["bare"],
        }
        for name in names
    }
    return {"model": host.model_id, "batch": batch, "length": length, "rounds": rounds, "variants": rows}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="*", default=bundled_hosts(), help="bundled names, directories or hub names"
    )
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/recorder_overhead"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log, results = Run("recorder_overhead.py", vars(args) | {"out": str(args.out)}), []
    for name in args.model:
        host = load_host(name, device=args.device)
        result = measure(host, args.variants, args.rounds, args.batch, args.length)
        results.append(result)
        print(f"{name}: {args.batch} x {args.length} tokens, {args.rounds} interleaved rounds")
        for variant, row in result["variants"].items():
            print(
                f"  {variant:38s} wall {row['wall_ms']:8.2f} ms (x {row['wall_ratio']:.4f})  "
                f"processor {row['cpu_ms']:8.2f} ms (x {row['cpu_ratio']:.4f})"
            )
    command = shlex.join(["python", "-m", "benchmarks.recorder_overhead", *sys.argv[1:]])
    path = log.write(args.out, command=command, overhead=results, threads=args.threads, device=args.device)
    print(f"on {describe_hardware(read_record(path)['hardware'])}, {args.threads} CPU thread(s)")
    print(path)


if __name__ == "__main__":
    main()
