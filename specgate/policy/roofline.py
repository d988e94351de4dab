"""How long a model's parts take on a machine: bytes over bandwidth, operations over speed, kernels to launch.

Letters: L MoE layers, E experts of a layer, K experts per token, N events, S steps, M entries of a workload's
lists, T tokens of a step.

The model of Williams, Waterman and Patterson ("Roofline", doi:10.1145/1498765.1498785), part by part; every
formula is in docs/hardware.md. Times are nanoseconds, one byte per nanosecond is one GB/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.policy.costs import Costs
from specgate.policy.hardware import Hardware
from specgate.policy.launches import Ends, Work, answered_at_once, launched_ahead, waited_for
from specgate.policy.workload import Workload

Nanoseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Attention:
    """One attention that every token runs.

    Attributes:
        stretch: it runs before the router of this MoE layer; L: after the last one.
        cached: values that each token of context leaves in the cache, all of which a step reads.
        scored: multiply-adds per pair of a token and a token of context.
        window: tokens of context at most; 0: all.
        expanded: multiply-adds per token of context that a step does before anything is scored (latent
            attention, whose cache is kept compressed).
    """

    stretch: int
    cached: int
    scored: int
    window: int = 0
    expanded: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """A model in plain numbers.

    Attributes:
        name: in texts.
        layers, experts, top_k: L, E, K.
        expert_parameters: weights of one expert. slot_bytes: it takes on the device.
        itemsize: bytes of a weight and of a value in the cache.
        stretch_parameters: weights of everything that every token runs between the experts of one MoE layer
            and the router of the next, L numbers: attention, norms, routers, shared experts, dense layers.
        step_parameters: the same after the last MoE layer: whatever layers follow, and the head.
        attentions: of all stretches.

    Raises:
        ConfigError: if a number makes no sense.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    expert_parameters: int
    slot_bytes: int
    itemsize: int
    stretch_parameters: tuple[int, ...]
    step_parameters: int
    attentions: tuple[Attention, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k", "expert_parameters", "slot_bytes", "itemsize"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}={getattr(self, name)} of {self.name} is too small; write 1 or more."
                )
        if self.top_k > self.experts:
            raise ConfigError(
                f"{self.name} has {self.experts} experts in a layer and uses {self.top_k} per token; more "
                "than there are cannot be used."
            )
        if len(self.stretch_parameters) != self.layers:
            raise ConfigError(
                f"{self.name} has {self.layers} MoE layers and {len(self.stretch_parameters)} stretches "
                "before them; write one number for each."
            )
        if min(self.stretch_parameters) < 0 or self.step_parameters < 0:
            raise ConfigError(f"A part of {self.name} has fewer than 0 weights; write 0 or more.")
        if any(not 0 <= a.stretch <= self.layers for a in self.attentions):
            raise ConfigError(f"An attention of {self.name} runs in no stretch; write 0 to {self.layers}.")


@dataclass(frozen=True)
class Runtime:
    """How the kernels are launched and which ones the experts run by.

    Attributes:
        name: in tables.
        dense_launches: kernels of a transformer layer but its experts. expert_launches: of a layer's experts.
        step_launches: outside of the layers, per step.
        gathers: whether each token's experts are copied together before they are multiplied
            (``batched_mm``): three passes over an expert's bytes for every token that it serves, instead of
            one for all of them (``grouped_mm``).
        event_us: the host's work around each event: indices, acquire, release.
        waits: whether the host must know each router's choice before it goes on, and sends slots to the
            device; what that costs is in a measured profile (:mod:`specgate.policy.launches`).
        ahead: whether it sends slots without waiting for the experts' copies, and launches meanwhile.
        graphs: whether a stretch, a layer's experts and the head are one launch each (CUDA graphs); needs
            ``ahead``, and a profile that says what that costs, else it counts for nothing.
    """

    name: str
    dense_launches: int
    expert_launches: int
    step_launches: int
    gathers: bool
    event_us: float
    waits: bool = False
    ahead: bool = False
    graphs: bool = False


#: Operations of one decoded token that are not views. Counted in transformers 5.23: 41 to 68 per layer
#: outside of the experts, 9 to 18 in them. Those of ``replay`` are of gpt_oss; a test counts them. event_us
#: is what docs/RESULTS.md has (the store's paths).
#: Of the experts' operations, those that move their weights: with ``batched_mm`` two tensors are copied
#: together, then multiplied.
GATHER_OPERATIONS, MATRIX_OPERATIONS = 4, 2
RUNTIMES = {
    "transformers": Runtime("transformers", 55, 10, 50, True, 25.0, waits=True, ahead=True),
    "grouped": Runtime("grouped", 55, 10, 50, False, 25.0, waits=True, ahead=True),
    "replay": Runtime("replay", 5, 18, 3, True, 25.0, waits=True, ahead=True),
    "fused": Runtime("fused", 4, 2, 4, False, 2.0),
}


@dataclass(frozen=True, eq=False)
class Roofline:
    """Times of a workload's events when everything is on the device.

    Attributes:
        pre_ns_N, exec_ns_N, launch_ns_N, host_pre_ns_N, host_exec_ns_N: as in
            :class:`specgate.policy.costs.Costs`.
        shares: of the time of all events, by what bounds it: ``memory``, ``compute``, ``launches``, ``host``.
    """

    pre_ns_N: Nanoseconds
    exec_ns_N: Nanoseconds
    shares: dict[str, float] = field(default_factory=dict)
    launch_ns_N: Nanoseconds | None = None
    host_pre_ns_N: Nanoseconds | None = None
    host_exec_ns_N: Nanoseconds | None = None

    @property
    def binds(self) -> str:
        """What most of the time is bounded by."""
        return max(self.shares, key=lambda name: self.shares[name])


def tokens_of(workload: Workload) -> Nanoseconds:
    """T of each event's step, ``[N]``: what the experts of its layer serve, divided by K."""
    event_N1 = workload.event_start_N1
    event_M = np.repeat(np.arange(workload.events), np.diff(event_N1))
    served_N = np.bincount(event_M, workload.tokens_M.astype(np.float64), workload.events)
    return np.asarray(served_N / workload.top_k, dtype=np.float64)


def step_tokens(workload: Workload) -> Nanoseconds:
    """T of each step, ``[S]``: of its fullest layer, since a layer may drop tokens."""
    if workload.steps == 0:
        return np.zeros(0)
    most: Nanoseconds = tokens_of(workload).reshape(workload.steps, workload.layers).max(1)
    return most


def roofline(
    sizes: ModelSizes,
    workload: Workload,
    hardware: Hardware,
    context: int = 1,
    sequences: int | None = None,
    runtime: Runtime = RUNTIMES["transformers"],
    asked_us: float = 0.0,
) -> Roofline:
    """Times of every event.

    Args:
        context: tokens that each sequence's attention looks back at.
        sequences: whose caches a step reads; None: every token of a step is of a sequence of its own
            (decoding), 1: all are of one (a prompt).
        asked_us: the host's time to hand over what is foreseen after a router, or before a step.

    Raises:
        ConfigError: sizes of another model than the workload's, or a context below 1.
    """
    check(sizes, workload, context)
    L, S = workload.layers, workload.steps
    bandwidth, speed = hardware.memory_bytes_per_ns, hardware.operations_per_ns
    launch = _launch_ns(hardware, runtime)
    graphs = _graphs(hardware, runtime)
    node, gap = (1e3 * (us or 0.0) if graphs else 0.0 for us in (hardware.node_us, hardware.gap_us))
    tokens_S = step_tokens(workload)
    caches_S = tokens_S if sequences is None else np.minimum(tokens_S, sequences)

    def dense(stretch: int, parameters: int) -> tuple[Nanoseconds, Nanoseconds]:
        """Nanoseconds of memory and of arithmetic of a stretch, ``[S]`` each."""
        moved_S = np.full(S, float(parameters * sizes.itemsize))
        done_S = 2.0 * parameters * (caches_S if stretch == L else tokens_S)  # the head: a sequence's last
        for attention in sizes.attentions:
            if attention.stretch == stretch:
                seen = min(context, attention.window) if attention.window else context
                moved_S = moved_S + caches_S * (seen * attention.cached * sizes.itemsize)
                done_S = done_S + tokens_S * (2.0 * seen * attention.scored)
                done_S = done_S + caches_S * (2.0 * seen * attention.expanded)
        return moved_S / bandwidth, done_S / speed

    memory_SL, compute_SL = np.zeros((S, L)), np.zeros((S, L))
    launches_SL = np.zeros((S, L))
    for stretch in range(L):
        memory_SL[:, stretch], compute_SL[:, stretch] = dense(stretch, sizes.stretch_parameters[stretch])
        launches_SL[:, stretch] = runtime.dense_launches * _blocks(sizes, stretch)
    nodes_SL = np.maximum(0.0, launches_SL - 1)  # besides the one that moves the weights
    last_memory_S, last_compute_S = dense(L, sizes.step_parameters)
    last = runtime.step_launches + runtime.dense_launches * (
        _blocks(sizes, L) if any(a.stretch == L for a in sizes.attentions) else 0
    )
    experts_N, by_memory_N = _experts(sizes, workload, hardware, runtime)
    if graphs:
        launches_SL, launched = np.minimum(launches_SL, 1), (min(1, runtime.expert_launches), min(1, last))
    else:
        launched = (runtime.expert_launches, last)
    small = max(0, runtime.expert_launches - (GATHER_OPERATIONS if runtime.gathers else MATRIX_OPERATIONS))
    work = Work(
        dense_N=(np.maximum(memory_SL, compute_SL) + gap + node * nodes_SL).reshape(-1),
        launches_N=launches_SL.reshape(-1) * launch,
        experts_N=experts_N + gap + node * small,
        launch_experts=launched[0] * launch,
        head_S=np.maximum(last_memory_S, last_compute_S) + gap + node * max(0, last - 1),
        launch_head=launched[1] * launch,
        operation=launch,
        layers=L,
        asked=asked_us * 1e3,
    )
    ends = _ends(work, hardware, runtime)

    dense_bound = np.where(ends.late_pre_N, 2, np.where((memory_SL >= compute_SL).reshape(-1), 0, 1))
    exec_bound = np.where(ends.late_exec_N, 2, np.where(by_memory_N, 0, 1))
    event_host = len(ends.exec_N) * runtime.event_us * 1e3
    host = event_host + float(ends.host_N.sum())
    total = float(ends.unhidden_N.sum() + ends.exec_N.sum()) + event_host
    sent = _sent_ns(hardware, runtime)
    own_pre_N, own_exec_N = ends.unhidden_N - (ends.host_N - sent), ends.exec_N - sent
    spent = [
        float(own_pre_N[dense_bound == kind].sum() + own_exec_N[exec_bound == kind].sum())
        for kind in range(3)
    ]
    names = ("memory", "compute", "launches", "host")
    shares = {n: v / total if total else 0.0 for n, v in zip(names, [*spent, host], strict=True)}
    bound_N, begun_N = np.minimum(ends.bound_pre_N, ends.pre_N), np.minimum(ends.bound_exec_N, ends.exec_N)
    return Roofline(ends.pre_N, ends.exec_N, shares, ends.launch_N, bound_N, begun_N)


def _graphs(hardware: Hardware, runtime: Runtime) -> bool:
    """Whether stretches and experts are one launch each."""
    return runtime.graphs and runtime.ahead and hardware.ahead and hardware.graph_us is not None


def _launch_ns(hardware: Hardware, runtime: Runtime) -> float:
    """The host's time for one launch."""
    if _graphs(hardware, runtime):
        return 1e3 * (hardware.graph_us or 0.0)
    return hardware.operation_ns if runtime.waits else hardware.kernel_us * 1e3


def _waits(hardware: Hardware, runtime: Runtime) -> bool:
    """Whether what the host waits for is known."""
    return runtime.waits and hardware.readback_us is not None


def _ahead(hardware: Hardware, runtime: Runtime) -> bool:
    """Whether launches hide behind copies, and it is known what sending slots costs."""
    return runtime.ahead and hardware.ahead and hardware.send_us is not None


def _sent_ns(hardware: Hardware, runtime: Runtime) -> float:
    """Of an event: sending the slots of its experts."""
    if not _waits(hardware, runtime):
        return 0.0
    if _graphs(hardware, runtime):
        return 1e3 * (hardware.write_us or 0.0)
    return 1e3 * ((hardware.send_us if _ahead(hardware, runtime) else hardware.upload_us) or 0.0)


def _ends(work: Work, hardware: Hardware, runtime: Runtime) -> Ends:
    if not _waits(hardware, runtime):
        return answered_at_once(work)
    answer = hardware.answer_us if _graphs(hardware, runtime) else hardware.readback_us
    readback, sent = 1e3 * (answer or 0.0), _sent_ns(hardware, runtime)
    if _ahead(hardware, runtime):
        return launched_ahead(work, readback, sent)
    return waited_for(work, readback, sent, hardware.ahead)


def _blocks(sizes: ModelSizes, stretch: int) -> int:
    """Transformer layers of a stretch: as many as it has attentions, one at least."""
    return max(1, sum(a.stretch == stretch for a in sizes.attentions))


def _experts(
    sizes: ModelSizes, workload: Workload, hardware: Hardware, runtime: Runtime
) -> tuple[Nanoseconds, NDArray[np.bool_]]:
    """Device nanoseconds of each event's experts, and whether memory bounds them."""
    tokens_M = workload.tokens_M.astype(np.float64)
    passes_M = 3.0 * tokens_M if runtime.gathers else np.ones_like(tokens_M)
    bandwidth = hardware.gathered_bytes_per_ns if runtime.gathers else hardware.memory_bytes_per_ns
    memory_M = passes_M * (sizes.slot_bytes / bandwidth)
    compute_M = tokens_M * (2.0 * sizes.expert_parameters / hardware.operations_per_ns)
    event_M = np.repeat(np.arange(workload.events), np.diff(workload.event_start_N1))

    def per_event(values_M: Nanoseconds) -> Nanoseconds:
        return np.bincount(event_M, values_M, workload.events).astype(np.float64)

    device_N = per_event(np.maximum(memory_M, compute_M))
    by_memory_N = per_event(np.where(memory_M >= compute_M, memory_M, 0.0)) * 2 >= device_N
    return device_N, np.asarray(by_memory_N, dtype=np.bool_)


def costs_of(
    sizes: ModelSizes,
    workload: Workload,
    hardware: Hardware,
    *,
    block_bytes: int | None = None,
    context: int = 1,
    sequences: int | None = None,
    runtime: Runtime = RUNTIMES["transformers"],
    forecast_us: float = 20.0,
    asked_us: float = 0.0,
    chunk_bytes: int = 0,
    piece_bytes: int = 0,
) -> Costs:
    """All that a simulation must know of a model on a machine.

    Args:
        block_bytes: an expert as it lies in the file and in host memory; None: as in its slot, nothing to
            decode.
        context, sequences, runtime, asked_us: see :func:`roofline`.
        forecast_us: from a router's choice until its forecast is known.
        chunk_bytes: where a forecast's copy can be stopped; 0: nowhere.
        piece_bytes: by which it is handed over, each with the latency of a copy; 0: as a whole.

    Raises:
        ConfigError: see :func:`roofline`, or an expert of no bytes.
    """
    times = roofline(sizes, workload, hardware, context, sequences, runtime, asked_us)
    block = sizes.slot_bytes if block_bytes is None else block_bytes
    latency = hardware.link_latency_us * 1e3
    if block != sizes.slot_bytes:  # one kernel reads the block and writes the slot
        latency += (block + sizes.slot_bytes) / hardware.memory_bytes_per_ns
    return Costs(
        expert_bytes=block,
        link_bytes_per_ns=hardware.link_bytes_per_ns,
        link_latency_ns=latency,
        link_chunk_bytes=chunk_bytes,
        forecast_share=hardware.share_in_pieces(piece_bytes),
        file_bytes_per_ns=hardware.file_gb_per_s,
        file_latency_ns=hardware.file_latency_us * 1e3,
        event_ns=runtime.event_us * 1e3,
        forecast_ns=forecast_us * 1e3,
        pre_ns_N=times.pre_ns_N,
        exec_ns_N=times.exec_ns_N,
        launch_ns_N=times.launch_ns_N,
        link_slowdown=hardware.graph_slowdown if _graphs(hardware, runtime) else hardware.launch_slowdown,
        host_pre_ns_N=times.host_pre_ns_N,
        host_exec_ns_N=times.host_exec_ns_N,
    )


def check(sizes: ModelSizes, workload: Workload, context: int) -> None:
    """Refuses sizes of another model, and a context that is none.

    Raises:
        ConfigError: naming both.
    """
    have, want = (
        (workload.layers, workload.experts, workload.top_k),
        (sizes.layers, sizes.experts, sizes.top_k),
    )
    if have != want:
        raise ConfigError(
            f"The workload has {have[0]} layers, {have[2]} of {have[1]} experts, and {sizes.name} has "
            f"{want[0]} layers, {want[2]} of {want[1]}; choose the two that fit."
        )
    if isinstance(context, bool) or not math.isfinite(context) or context < 1:
        raise ConfigError(f"context={context} leaves nothing to look back at; write 1 or more tokens.")
