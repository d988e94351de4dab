"""What a replayed token costs: by a measured profile alone, or with what the run itself tells of its machine.

Letters: L MoE layers, E experts, K experts per token, D hidden size, V token ids.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from specgate.errors import ConfigError
from specgate.policy.costs import Costs
from specgate.policy.hardware import Hardware
from specgate.policy.operations import operations_of
from specgate.policy.roofline import RUNTIMES, ModelSizes, Runtime, costs_of
from specgate.policy.workload import Workload
from specgate.report.replay_body import SlotExperts
from specgate.report.replay_settings import ReplaySettings
from specgate.report.replay_shape import ModelShape
from specgate.runtime.store import StoreSettings

#: Operations of :class:`specgate.report.replay_body.Body` that are not views; a test counts them.
ATTEND_OPERATIONS, ADD_OPERATIONS, FINISH_OPERATIONS = 3, 2, 3
#: As graphs: what keeps tensors in their places, and finds an event's weights.
KEPT_OPERATIONS, ROW_OPERATIONS = 1, 3
Row = Mapping[str, Any]


def sizes_of_replay(shape: ModelShape, settings: ReplaySettings) -> ModelSizes:
    """A shape as mode=replay runs it: a layer's dense part is one matrix of its size, without attention."""
    D = shape.hidden
    rows = max(D, math.ceil(shape.dense_parameters / D)) if settings.dense else 0
    return ModelSizes(
        name=shape.name,
        layers=shape.layers,
        experts=shape.experts,
        top_k=shape.top_k,
        expert_parameters=shape.expert_parameters,
        slot_bytes=shape.layout(settings.codec).slot_bytes,
        itemsize=shape.torch_dtype.itemsize,
        stretch_parameters=(rows * D,) * shape.layers,
        step_parameters=shape.vocabulary * D if settings.head else 0,
    )


def expert_operations(shape: ModelShape, kernels: str) -> int:
    """Operations of a layer's experts for one token, counted without any weights."""
    K, dtype = shape.top_k, shape.torch_dtype
    with torch.device("meta"):
        arenas = {name: torch.empty(K, *size, dtype=dtype) for name, size in shape.pieces.items()}
        hidden_1D, weights_1K = torch.empty(1, shape.hidden, dtype=dtype), torch.empty(1, K, dtype=dtype)
        slots_1K = torch.zeros(1, K, dtype=torch.int64)
    experts = SlotExperts(shape, arenas, kernels)
    with torch.inference_mode():
        return operations_of(lambda: experts(hidden_1D, slots_1K, weights_1K))


def runtime_of(shape: ModelShape, settings: ReplaySettings, graphs: bool = False) -> Runtime:
    """How mode=replay launches this shape; ``graphs``: whether as CUDA graphs."""
    runtime = replace(
        RUNTIMES["replay"],
        dense_launches=ADD_OPERATIONS + (ATTEND_OPERATIONS if settings.dense else 0),
        expert_launches=expert_operations(shape, settings.kernels),
        step_launches=FINISH_OPERATIONS - (0 if settings.head else 1),
        gathers=settings.kernels == "batched_mm",
        ahead=settings.ahead,
    )
    if not graphs:
        return runtime
    attend = ATTEND_OPERATIONS + KEPT_OPERATIONS if settings.dense else KEPT_OPERATIONS
    return replace(
        runtime,
        dense_launches=attend,
        expert_launches=runtime.expert_launches + ADD_OPERATIONS + KEPT_OPERATIONS + ROW_OPERATIONS,
        graphs=True,
    )


Parts = tuple[Runtime, ModelSizes, int | None, int]


def profile_costs(shape: ModelShape, settings: ReplaySettings, device: str, graphs: bool = False) -> Parts:
    """What :func:`costs_by_profile` needs of a replay: runtime, sizes, bytes of a block, of a piece."""
    sizes = sizes_of_replay(shape, settings)
    block = shape.layout(settings.codec).block_bytes
    pieces = StoreSettings().chunk_bytes if device.startswith("cuda") else 0
    return runtime_of(shape, settings, graphs), sizes, None if block == sizes.slot_bytes else block, pieces


def known_after_us(runtime: Runtime, hardware: Hardware, costs: Costs, handover_us: float) -> float:
    """Microseconds from a router's choice until the store knows what is foreseen.

    The replay hands it over once a layer's experts are launched; on a processor they are computed by then.
    """
    added = ADD_OPERATIONS * hardware.operation_ns * 1e-3
    if not hardware.ahead:
        return float(costs.exec_ns_N.mean()) * 1e-3 + added + handover_us
    if runtime.graphs and hardware.graph_us is not None:
        return (hardware.write_us or 0.0) + hardware.graph_us + handover_us
    sent = hardware.send_us if runtime.ahead and hardware.send_us is not None else hardware.upload_us
    return (sent or 0.0) + runtime.expert_launches * hardware.operation_ns * 1e-3 + added + handover_us


def costs_by_profile(
    parts: Parts,
    hardware: Hardware,
    workload: Workload,
    handover_us: float = 0.0,
) -> Costs:
    """Costs by a measured machine and the shape alone; no measurement of the replay enters.

    Args:
        handover_us: of the host, to hand over what is foreseen at a point; 0 where nothing is.
    """
    runtime, sizes, block, pieces = parts
    costs = costs_of(
        sizes,
        workload,
        hardware,
        block_bytes=block,
        runtime=runtime,
        asked_us=handover_us,
        chunk_bytes=pieces,
        piece_bytes=StoreSettings().piece_bytes if pieces else 0,
    )
    return replace(costs, forecast_ns=1e3 * known_after_us(runtime, hardware, costs, handover_us))


def is_all_hits(row: Row, blocks: int) -> bool:
    """Whether a row had everything on the device and asked the store for it."""
    return bool(row["budgeted"]) and int(row["slots"]) >= blocks and not row.get("demand_bytes")


def all_hits_row(row: Row, rows: Sequence[Row], blocks: int) -> Row | None:
    """The row that tells what an event without copies takes: of its variant, else ``lru``, else any."""
    found = [r for r in rows if is_all_hits(r, blocks)]
    for name in (row["variant"], "lru"):
        for candidate in found:
            if candidate["variant"] == name:
                return candidate
    return found[0] if found else None


def costs_by_rows(costs: Costs, row: Row, rows: Sequence[Row], blocks: int, layers: int) -> Costs:
    """Costs with the speed of the link, and the time of an event without copies, from the run's own rows.

    Args:
        costs: by the profile; its times are scaled so that a token without copies takes what was measured.
        rows: of the same run.

    Raises:
        ConfigError: no row had everything on the device.
    """
    hits = all_hits_row(row, rows, blocks)
    if hits is None:
        raise ConfigError("No row of the run asked the store with everything on the device.")
    per_event = 1e9 / float(hits["tokens_per_second"]) / layers
    scale = per_event / (costs.compute_ns / max(1, costs.events))
    speeds = [r["link_gb_per_second"] for r in rows if r.get("link_gb_per_second")]
    more: dict[str, Any] = {}
    if speeds:
        more = {"link_bytes_per_ns": statistics.median(speeds), "link_latency_ns": 0.0}
    return replace(costs.scaled(scale), **more)
