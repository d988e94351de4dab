"""How fast the simulator is: expert events per second on one core, rule by rule.

``python -m benchmarks.simulator`` (``--help`` for the options). Random calls of a model of gpt-oss-20b's
size (24 layers of 32 experts, 4 per token; some are used more often than others), with slots for a quarter of
the experts. Forecasts, where a rule looks at them, name every expert whose p is at least 0.05, for the next
three events: a mixture of what comes and of how often each expert is used, of which the share of truth falls
with the horizon. An expert event is one expert asked for by one layer in one step. Given is the median of
several rounds, in turns, of the time that the core worked for it: other programs do not count.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Forecasts, Workload, decoding
from specgate.report.record import Run, describe_hardware, read_record
from specgate.report.simulator_page import table_of
from specgate.runtime.simulator import Simulator

EXPERT_BYTES = 49_800_000  # 24.9 M parameters in bf16
DEPTH = 3
LEAST = 0.05  # p of an expert that a forecast names


def workload_of(layers: int, experts: int, top_k: int, steps: int, seed: int = 0) -> Workload:
    """Random calls with the forecasts that the module's docstring describes."""
    random = np.random.default_rng(seed)
    share_LE = random.dirichlet(np.full(experts, 0.5), size=layers)
    noise_SLE = random.gumbel(size=(steps, layers, experts))
    ids_SLK = np.argsort(-(np.log(share_LE) + noise_SLE), axis=2)[:, :, :top_k]
    workload = decoding([ids_SLK], experts)
    used_NE = np.zeros((workload.events, experts), dtype=np.float32)
    used_NE[np.repeat(np.arange(workload.events), top_k), workload.expert_M] = 1
    usual_NE = np.tile(used_NE.reshape(steps, layers, experts).mean(axis=0), (steps, 1))
    return workload.with_forecasts(forecasts_of(workload, used_NE, usual_NE))


def forecasts_of(workload: Workload, used_NE: NDArray[Any], usual_NE: NDArray[Any]) -> Forecasts:
    """Truth and custom, mixed 2 : 1 at horizon 1, 1 : 1 at 2, 1 : 2 at 3."""
    L, N = workload.layers, workload.events
    point_P = np.arange(workload.points)
    first_P = point_P // (L + 1) * L + point_P % (L + 1)
    p_PHE = np.zeros((workload.points, DEPTH, workload.experts), dtype=np.float32)
    for h, truth in enumerate((2 / 3, 1 / 2, 1 / 3)):
        inside_P = first_P + h < N
        events = first_P[inside_P] + h
        p_PHE[inside_P, h] = truth * used_NE[events] + (1 - truth) * usual_NE[events]
    return Forecasts.from_dense(p_PHE, LEAST)


def costs_of(workload: Workload) -> Costs:
    """PCIe 4 x16, and events of half the time of a copy."""
    N = workload.events
    return Costs(
        expert_bytes=EXPERT_BYTES,
        link_bytes_per_ns=25.0,
        link_latency_ns=10_000.0,
        link_chunk_bytes=4 << 20,
        file_bytes_per_ns=3.0,
        file_latency_ns=100_000.0,
        event_ns=5_000.0,
        forecast_ns=5_000.0,
        pre_ns_N=np.full(N, 400_000.0),
        exec_ns_N=np.full(N, 600_000.0),
    )


def cases_of(layers: int, experts: int) -> dict[str, tuple[Rules, bool, bool]]:
    """Rules, whether each layer has its own slots, whether a file tier is used, by name."""
    thresholds = np.full(layers, 0.5)
    weights = np.arange(layers * experts, dtype=np.float64).reshape(layers, experts)
    cases = {
        name: (Rules(eviction=name, weights_LE=weights if name == "static" else None), False, False)
        for name in ("lru", "none", "lfu", "lfru", "lru2", "static", "belady")
    }
    lru = Rules()
    ahead: dict[str, Any] = {"prefetch": "threshold", "thresholds_L": thresholds}
    cases |= {
        "lru, slots per layer": (lru, True, False),
        "lru, file tier": (lru, False, True),
        "lru, gate": (Rules(admission="gate"), False, False),
        "lru, threshold, depth 1": (Rules(**ahead, depth=1), False, False),
        "lru, threshold, depth 3": (Rules(**ahead, depth=DEPTH), False, False),
        "forecast, threshold, depth 3": (Rules(eviction="forecast", **ahead, depth=DEPTH), False, False),
        "priced, evict only": (Rules(eviction="priced"), False, False),
        "priced, depth 1": (Rules(eviction="priced", prefetch="priced", depth=1), False, False),
        "priced, depth 3": (Rules(eviction="priced", prefetch="priced", depth=DEPTH), False, False),
    }
    return cases


def measure(workload: Workload, share: float, rounds: int) -> list[dict[str, Any]]:
    """A row per rule; ``share`` of the experts fit the device."""
    L, E, asked = workload.layers, workload.experts, len(workload.expert_M)
    costs, simulators = costs_of(workload), {}
    for name, (rules, per_layer, file) in cases_of(L, E).items():
        slots = [max(workload.widest, int(share * E))] * L if per_layer else int(share * L * E)
        simulators[name] = Simulator(workload, costs, rules, slots, L * E // 2 if file else None)
    seconds: dict[str, list[float]] = {name: [] for name in simulators}
    results = {}
    for _ in range(rounds):
        for name, simulator in simulators.items():
            simulator.reset()
            start = time.thread_time()
            results[name] = simulator.run()
            seconds[name].append(time.thread_time() - start)
    return [
        {
            "rules": name,
            "million_expert_events_per_second": asked / statistics.median(seconds[name]) / 1e6,
            "best": asked / min(seconds[name]) / 1e6,
            "hit_rate": result.hit_rate,
            "prefetches_per_event": result.total("prefetches") / workload.events,
        }
        for name, result in results.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts that fit the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/simulator"))
    args = parser.parse_args(arguments)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    log = Run("simulator.py", config)
    workload = workload_of(args.layers, args.experts, args.top_k, args.steps)
    assert workload.forecasts is not None
    named = len(workload.forecasts.p_M) / workload.points
    rows = measure(workload, args.share, args.rounds)
    command = shlex.join(["python", "-m", "benchmarks.simulator", *(arguments or sys.argv[1:])])
    path = log.write(args.out, command=command, simulator={"rows": rows, "foreseen_per_point": named})
    console = Console() if sys.stdout.isatty() else Console(width=132)
    record = read_record(path)
    console.print(table_of(record).to_rich())
    console.print(f"on {describe_hardware(record['hardware'])}", highlight=False)
    print(path)


if __name__ == "__main__":
    main()
