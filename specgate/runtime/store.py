"""The expert store: experts in device slots, host memory and a file, moved by the native core's own threads.

The Python face of ``csrc/store.h``. One call to :meth:`ExpertStore.acquire` is one event: all experts of a
layer's call at once. Forecasts (:meth:`ExpertStore.prefetch`) change when bytes move, never which values are
computed. docs/runtime.md states the semantics.

Letters: S slots, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgate.errors import BudgetError, ConfigError, StoreError
from specgate.runtime import native
from specgate.runtime.layout import BlockLayout
from specgate.runtime.source import ExpertSource
from specgate.runtime.store_settings import StoreSettings, host_slots_that_fit

NEVER = 1 << 62  # a deadline
_KINDS = ("read", "copy", "direct", "stall")
_LEVELS = ("demand", "prefetch")
_HANDED_OVER = [field.name for field in fields(StoreSettings) if field.name not in ("price_scale", "faults")]


class ExpertStore:
    """Experts in ``num_slots`` slots of a device, with copies in host memory and the rest in files.

    Args:
        source: where the experts lie for good; None: in memory, filled through :meth:`fill`.
        num_slots: S; more than there are experts are not made.
        host_bytes: for encoded experts in (pinned) host memory; None takes half of what is free, 0 none.
        device: ``cpu``, ``cuda`` or ``cuda:<n>``.
        settings: how bytes are moved.
        layout, layers, experts: of a store without a source.
        share: another store without a source, whose experts this one reads too instead of having its own; it
            cannot be closed before this one.

    Attributes:
        layout: of a slot and an encoded expert.
        num_slots, device, layers, experts.

    Raises:
        ConfigError: a setting that makes no sense.
        BudgetError: no slot at all.
        StoreError: the native core is absent, a file is missing, or memory is refused.
    """

    def __init__(
        self,
        source: ExpertSource | None,
        num_slots: int,
        host_bytes: int | None = None,
        device: torch.device | str = "cpu",
        settings: StoreSettings | None = None,
        *,
        layout: BlockLayout | None = None,
        layers: int | None = None,
        experts: int | None = None,
        share: ExpertStore | None = None,
    ) -> None:
        settings = settings or StoreSettings()
        if source is not None:
            layout, layers, experts = source.layout, source.layers, source.experts
        if layout is None or layers is None or experts is None:
            raise ConfigError("A store without a source needs layout, layers and experts; give all three.")
        self.layout, self.layers, self.experts = layout, layers, experts
        self.settings = settings
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"device={device} has no expert store; choose cpu or cuda.")
        self._index: int = self.device.index if self.device.type == "cuda" else -1
        if num_slots < 1:
            raise BudgetError(f"num_slots={num_slots} holds no expert; write 1 or more.")
        count = layers * experts
        self.num_slots = num_slots = min(num_slots, count)
        host_slots = 0 if source is None else host_slots_that_fit(layout.block_bytes, count, host_bytes)
        blocks: list[tuple[int, list[tuple[int, int, int, int]], int | None, int]]
        if source is None:
            blocks = [(0, [], None, 0)] * count
        else:
            blocks = [
                (0, [(s.file, s.offset, s.length, s.at) for s in b.segments], b.crc, b.compressed)
                for b in source.blocks
            ]
        memory: list[int] = []
        if share is not None:
            if source is not None or (share.layout, share.layers, share.experts) != (layout, layers, experts):
                raise ConfigError("share= names a store of other experts; open this one with its layout.")
            memory = [torch.from_dlpack(share._core.slab(b)).data_ptr() for b in range(count)]
        self._shared, self._sharers = share, 0
        core: Any = native.require()
        self._core: Any = core.Store(
            [] if source is None else [str(path) for path in source.paths],
            blocks,
            [layout.native_format()],
            [num_slots],
            [host_slots],
            price_scale=-1.0 if settings.price_scale is None else settings.price_scale,
            faults=list(settings.faults),
            device=self._index,
            **{name: getattr(settings, name) for name in _HANDED_OVER},
            in_memory=source is None,
            memory=memory,
        )
        if share is not None:
            share._sharers += 1  # its memory is not to be freed before
        self.host_slots = count if source is None else host_slots
        self._views: dict[str, Tensor] = layout.views(torch.from_dlpack(self._core.arena(0)))

    # ------------------------------------------------------------------ experts

    def arena(self, name: str) -> Tensor:
        """A piece of all slots, ``[S, *shape]``, strided over the slots; :meth:`close` frees its memory."""
        self._require_open()
        return self._views[self.layout.piece(name).name]

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Brings experts to the device and pins them.

        On a GPU the host goes on once their copies are on the way: kernels launched on the current stream
        from now on run after them.

        Returns:
            Their slots, in the order given; they stay until :meth:`release`.

        Raises:
            BudgetError: more than the slots that are not in use; nothing changes.
            StoreError: an expert cannot be read, or the store was closed; nothing stays pinned.
        """
        slots: list[int] = self._core.acquire(self._blocks(layer, experts), self._stream())
        return slots

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Gives back what :meth:`acquire` pinned; kernels launched so far are the last that read it."""
        self._core.release(self._blocks(layer, experts), self._stream())

    def prefetch(
        self, layer: int, expert: int, p: float, deadline: int | None = None, host: bool = False
    ) -> str:
        """An expert that is needed with probability ``p`` by the time ``deadline`` (see :meth:`advance`).

        Returns:
            ``queued``, ``merged`` with an earlier forecast, ``demanded`` already, ``resident``, ``stale``
            (its time is over) or ``refused`` (the queue is full of more probable ones).
        """
        (block,) = self._blocks(layer, [expert])
        answer: str = self._core.prefetch(block, p, NEVER if deadline is None else deadline, host)
        return answer

    def prefetch_all(
        self, layer: int, wanted: Sequence[tuple[int, float]], deadline: int | None = None
    ) -> None:
        """The same for many experts of a layer: (expert, p) each."""
        blocks, due = self._blocks(layer, [e for e, _ in wanted]), NEVER if deadline is None else deadline
        self._core.prefetch_all([(b, p, due) for b, (_, p) in zip(blocks, wanted, strict=True)])

    def prefetch_many(
        self, blocks_N: NDArray[np.uint32], p_N: NDArray[np.float64], deadlines_N: NDArray[np.int64]
    ) -> None:
        """The same for experts of several layers, in one call.

        Args:
            blocks_N: ``layer * E + expert``, uint32 ``[N]``.
            p_N: their probabilities, float64 ``[N]``. deadlines_N: see :meth:`prefetch`, int64 ``[N]``.

        Raises:
            ConfigError: if one is longer than another, or a block is not of this store.
        """
        self._check_blocks(blocks_N)
        self._core.prefetch_many(blocks_N, p_N, deadlines_N)

    def foresee(
        self, blocks_N: NDArray[np.uint32], p_N: NDArray[np.float64], deadlines_N: NDArray[np.int64]
    ) -> None:
        """The same as :meth:`prefetch_many`, by a thread of the store's own: the caller goes on at once.

        Raises:
            ConfigError: if one is longer than another, a block is not of this store or a p no probability.
        """
        self._core.foresee(blocks_N, p_N, deadlines_N)

    def _check_blocks(self, blocks_N: NDArray[np.uint32]) -> None:
        if len(blocks_N) and int(blocks_N.max()) >= self.layers * self.experts:
            raise ConfigError(
                f"Block {int(blocks_N.max())} is not one of {self.layers} layers of {self.experts} experts; "
                f"write layer * {self.experts} + expert."
            )

    def follow(self, ring: Any, first_layer: int = 0, layers: int | None = None) -> None:
        """Lets a thread of the store's own prefetch what a ring of forecasts says, without Python.

        Each forecast moves the clock; :meth:`advance` is not to be called then.

        Args:
            ring: of :class:`specgate.runtime.speculate.Speculator`.
            first_layer: the layer that the forecasts call 0 (a decoder's first).
            layers: how many there are; None is all from there on.

        Raises:
            ConfigError: if the store has not so many layers.
        """
        count = self.layers - first_layer if layers is None else layers
        self._core.follow(ring, first_layer * self.experts, self.experts, count)

    def unfollow(self) -> None:
        """Stops following; the thread ends."""
        self._core.unfollow()

    def advance(self, clock: int) -> None:
        """Tells the time that deadlines are in; forecasts whose time is over are dropped."""
        self._core.advance(clock)

    def fill(self, layer: int, expert: int, encoded: Tensor) -> None:
        """Writes an expert of a store without a source: uint8 ``[block_bytes]``."""
        (block,) = self._blocks(layer, [expert])
        torch.from_dlpack(self._core.slab(block)).copy_(encoded)

    def warm(self, host: bool = False, experts: Iterable[tuple[int, int]] | None = None) -> None:
        """Loads experts before they are needed: as many as there is room for, or those named.

        Args:
            host: into host memory instead of the device.
            experts: (layer, expert); None takes the first ones.
        """
        room = self.host_slots if host else self.num_slots
        every = ((layer, e) for layer in range(self.layers) for e in range(self.experts))
        named = list(every if experts is None else experts)[:room]
        batch = max(1, min(self.settings.max_pending, 256))
        for start in range(0, len(named), batch):
            for layer, expert in named[start : start + batch]:
                self.prefetch(layer, expert, 1.0, host=host)
            self.drain()

    def drain(self, seconds: float = 600.0) -> None:
        """Waits until nothing moves.

        Raises:
            StoreError: if something still moves after so many seconds.
        """
        if not self._core.drain(seconds):
            raise StoreError(f"Transfers did not end within {seconds:g} s; is the disk answering?")

    def set_weights(self, weights: Tensor) -> None:
        """Weights of eviction ``static``, least first out: ``[L, E]``."""
        self._core.set_weights(weights.double().flatten().tolist())

    def set_reuse(
        self, half_life: float = 64.0, discount: float = 0.99, intercept: float = 0.0, slope: float = 1.0
    ) -> None:
        """What eviction ``priced`` knows of reuse, fitted by :mod:`specgate.policy.reuse`.

        Args:
            half_life: of uses, in steps (each runs every layer once).
            discount: of a later use, per event.
            intercept, slope: of the logarithm of the probability of a use in that of the decayed uses.

        Raises:
            ConfigError: numbers that say nothing of reuse.
        """
        self._core.set_reuse(self.experts, half_life, discount, intercept, slope)

    def set_future(self, events: Sequence[tuple[int, Sequence[int]]]) -> None:
        """All events to come, (layer, experts) each, for eviction ``belady``."""
        self._core.set_future([self._blocks(layer, experts) for layer, experts in events])

    def state(self, layer: int, expert: int) -> tuple[str, int, int, str, int]:
        """On the device (ABSENT, LOADING, PRESENT), slot, pins, in host memory, slab; -1: none."""
        (block,) = self._blocks(layer, [expert])
        found: tuple[str, int, int, str, int] = self._core.state(block)
        return found

    # ------------------------------------------------------------------ what happened

    def stats(self) -> dict[str, Any]:
        """Counters since the store was opened: of experts, of bytes by kind, of nanoseconds waited."""
        found = dict(self._core.stats())
        found["stall_seconds"] = found["stall_ns"] * 1e-9
        if self._shared is not None and not self._core.closed():
            found["host_bytes"] += self._shared.stats()["host_bytes"]  # what it reads, whoever opened it
        return found

    def timeline(self) -> list[dict[str, Any]]:
        """The newest transfers and stalls as events of the Chrome trace format, times in microseconds."""
        events = []
        for begin, end, block, kind, level, status, size in self._core.timeline():
            layer, expert = divmod(block, self.experts)
            name, lane = _KINDS[kind], 2 if kind == 3 else level
            events.append(
                {
                    "name": f"{name}: layer {layer}" + ("" if kind == 3 else f", expert {expert}"),
                    "cat": name if kind == 3 else f"{name},{_LEVELS[level]}",
                    "ph": "X",
                    "ts": begin * 1e-3,
                    "dur": (end - begin) * 1e-3,
                    "pid": 0,
                    "tid": 10 * kind + lane,
                    "args": {"bytes": size, "ok": status == 0},
                }
            )
        return events

    def save_timeline(self, path: str | Path) -> Path:
        """Writes :meth:`timeline` for chrome://tracing or ui.perfetto.dev."""
        lanes = [(k, lane) for k in range(3) for lane in range(2)]
        names = {10 * k + lane: f"{_KINDS[k]}, {_LEVELS[lane]}" for k, lane in lanes}
        names[32] = "the caller waits"
        threads = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": name}}
            for tid, name in names.items()
        ]
        path = Path(path)
        path.write_text(json.dumps({"traceEvents": threads + self.timeline()}))
        return path

    def time_hits(self, layer: int, experts: Sequence[int], rounds: int) -> tuple[list[int], list[int]]:
        """Nanoseconds that the native core takes to acquire, and to release, experts that are on the device.

        Raises:
            ConfigError: if one of them is not.
        """
        found: tuple[list[int], list[int]] = self._core.time_hits(
            self._blocks(layer, experts), rounds, self._stream()
        )
        return found

    @property
    def reader(self) -> str:
        """How files are read: ``io_uring``, ``pread``, ``memory`` or ``closed``."""
        return str(self._core.reader_backend())

    # ------------------------------------------------------------------ life

    def close(self) -> None:
        """Cancels reads, waits for copies, gives all memory back. Callers that wait get a StoreError.

        Raises:
            StoreError: while another store shares this one's experts.
        """
        if not self._core.closed():
            if self._sharers:
                raise StoreError(f"{self._sharers} stores still share this one's experts; close them first.")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._views = {}
            self._core.close()
            if self._shared is not None:
                self._shared._sharers -= 1

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._core.closed():
            raise StoreError("The expert store is closed; open the model again with specgate.offload.")

    def _stream(self) -> int:
        return int(torch._C._cuda_getCurrentRawStream(self._index)) if self._index >= 0 else 0

    def _blocks(self, layer: int, experts: Sequence[int]) -> list[int]:
        inside = 0 <= layer < self.layers
        if not inside or (experts and not (min(experts) >= 0 and max(experts) < self.experts)):
            raise ConfigError(
                f"layer {layer} or one of the experts {list(experts)} is outside the {self.layers} layers of "
                f"{self.experts} experts; count from 0."
            )
        first = layer * self.experts
        return [first + e for e in experts]
