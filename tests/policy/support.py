"""Small workloads and costs for the tests of policies, and a cache written the slow way.

Letters: L MoE layers, E experts of a layer, K experts per token, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Forecasts, Workload, decoding

#: From a block, the events that used it so far and the event now, its key: the least is evicted first.
KeyOf = Callable[[int, Sequence[int], int], tuple[float, ...]]


def small_workload(
    seed: int = 0, layers: int = 3, experts: int = 6, top_k: int = 2, tokens: Sequence[int] = (12, 9)
) -> Workload:
    """Documents whose tokens prefer some experts, and repeat the last token's now and then."""
    rng = np.random.default_rng(seed)
    documents = []
    for T in tokens:
        liking_LE = rng.dirichlet(np.full(experts, 0.7), size=layers)
        rows: list[list[np.ndarray]] = []
        for t in range(T):
            rows.append(
                [
                    rows[t - 1][layer]
                    if t and rng.random() < 0.3
                    else rng.choice(
                        experts, top_k, replace=False, p=(liking_LE[layer] + 0.02) / (1 + 0.02 * experts)
                    )
                    for layer in range(layers)
                ]
            )
        documents.append(np.array(rows))
    return decoding(documents, experts, [f"d{i}" for i in range(len(documents))])


def some_costs(workload: Workload, **changes: Any) -> Costs:
    """A copy takes 100 ns on the link, a read of the file 1,000 ns, an event 60 ns."""
    values: dict[str, Any] = {
        "expert_bytes": 1000,
        "link_bytes_per_ns": 10.0,
        "link_latency_ns": 0.0,
        "link_chunk_bytes": 0,
        "file_bytes_per_ns": 1.0,
        "file_latency_ns": 0.0,
        "event_ns": 0.0,
        "forecast_ns": 0.0,
        "pre_ns_N": np.full(workload.events, 40.0),
        "exec_ns_N": np.full(workload.events, 20.0),
    }
    return Costs(**(values | changes))


def noisy_forecasts(workload: Workload, depth: int, seed: int = 0) -> Forecasts:
    """Of every expert of the next ``depth`` events: high probabilities mostly for those that are used."""
    rng = np.random.default_rng(seed)
    L, E = workload.layers, workload.experts
    p_PHE = np.zeros((workload.points, depth, E))
    for point in range(workload.points):
        step, p = divmod(point, L + 1)
        for h in range(depth):
            n = step * L + p + h
            if n < workload.events and workload.document_S[n // L] == workload.document_S[step]:
                used = np.isin(np.arange(E), workload.event(n))
                p_PHE[point, h] = np.where(used, rng.beta(4, 2, E), rng.beta(1, 5, E))
    return Forecasts.from_dense(p_PHE.astype(np.float32))


def slow_misses(workload: Workload, slots: int, key: KeyOf) -> int:
    """Misses of one cache for all layers that evicts the block of least key, ties by block."""
    E, L = workload.experts, workload.layers
    present: set[int] = set()
    uses: dict[int, list[int]] = {}
    misses = 0
    for n in range(workload.events):
        wanted = {(n % L) * E + e for e in workload.event(n)}
        absent = wanted - present
        misses += len(absent)
        for b in wanted:
            uses.setdefault(b, []).append(n)
        for _ in range(max(0, len(present) + len(absent) - slots)):
            present.remove(min(present - wanted, key=lambda b: (*key(b, uses.get(b, []), n), b)))
        present |= wanted
    return misses


def simulated(workload: Workload, rules: Rules, slots: Any, costs: Costs | None = None, **room: Any) -> Any:
    """The native simulator's result; skips the test where there is no native core."""
    simulator = pytest.importorskip("specgate.runtime.simulator")
    native = pytest.importorskip("specgate.runtime.native")
    if not native.available():
        pytest.skip("the native core is not built here")
    blocks = workload.layers * workload.experts
    return simulator.simulate(
        workload, costs or some_costs(workload), rules, slots, room.pop("host_slots", blocks), **room
    )


def count(result: Any, name: str) -> float:
    """A total of a simulation."""
    return float(result.total(name))
