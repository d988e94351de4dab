"""An expert store in plain torch: one thread, no host tier, every transfer at once and waited for.

The same face as the native store and the same ledger, so that what runs on one runs on the other. It serves
where the native core is not built, and in tests: with ``poison`` every slot holds NaN until an expert lies in
it, and again when it has lost one.

Letters: S slots.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from specgate.errors import BudgetError, ConfigError, StoreError
from specgate.runtime.layout import BlockLayout
from specgate.runtime.reference import Ledger

EVENTS = 100_000  # of the timeline, the last ones
_NEVER = 1 << 62  # a deadline


class BlockSource(Protocol):
    """What is asked of the place where experts lie for good."""

    @property
    def layout(self) -> BlockLayout: ...

    @property
    def layers(self) -> int: ...

    @property
    def experts(self) -> int: ...

    def tensors(self, block: int) -> Mapping[str, Tensor]:
        """The decoded pieces of one expert on the CPU; StoreError if they cannot be read."""
        ...


class SimpleStore:
    """Experts in ``num_slots`` slots of one arena.

    Args:
        source: where the experts come from; block ``layer * experts + expert`` is an expert of a layer.
        num_slots: S.
        device: of the arena.
        eviction: policy of the ledger (``lru``, ``lfu``, ``lfru``, ``static``, ``forecast``, ``belady``).
        poison: fill free slots with NaN.

    Raises:
        ConfigError: for a number that makes no sense or an unknown policy.
        StoreError: if the device has not enough memory for the arena.
    """

    def __init__(
        self,
        source: BlockSource,
        num_slots: int,
        device: torch.device | str = "cpu",
        eviction: str = "lru",
        poison: bool = False,
    ) -> None:
        if num_slots < 1:
            raise ConfigError(f"num_slots={num_slots} holds nothing; write 1 or more.")
        self.layout = source.layout
        self.layers, self.experts, self.num_slots = source.layers, source.experts, num_slots
        self.device = torch.device(device)
        self._source, self._poison = source, poison
        size = self.layout.slot_bytes
        self._ledger = Ledger(
            [0] * (self.layers * self.experts), [self.layout.block_bytes], [num_slots], [0], eviction
        )
        try:
            self._arena: Tensor | None = torch.zeros(num_slots, size, dtype=torch.uint8, device=self.device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            raise StoreError(
                f"{num_slots} slots of {size} bytes do not fit {self.device}; write a smaller budget_gb."
            ) from error
        self._views = self.layout.views(self._arena)
        self._stall = 0.0
        self._error: StoreError | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        if poison:
            for slot in range(num_slots):
                self._spoil(slot)

    # ------------------------------------------------------------------ face

    def arena(self, name: str) -> Tensor:
        """A piece of all slots: ``[S, *shape]``, strided over the slots."""
        self._open()
        return self._views[self.layout.piece(name).name]

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Loads what is absent and pins all of them.

        Returns:
            Their slots, in the order given; they stay until :meth:`release`.

        Raises:
            BudgetError: if they are more than the slots that are not in use; nothing changes.
            StoreError: if an expert cannot be read; nothing stays pinned.
        """
        self._open()
        blocks = self._blocks(layer, experts)
        self._ledger.demand(blocks)
        start = time.perf_counter()
        try:
            self._drain()
            if failed := self._ledger.take_failed():
                raise self._error or StoreError(
                    f"Expert {failed[0]} could not be read; copy the model again."
                )
            if not self._ledger.ready(blocks):
                raise BudgetError(f"{len(blocks)} experts found no slot; write a larger budget_gb.")
        except BaseException:
            self._ledger.release(blocks)
            raise
        finally:
            self._stall += time.perf_counter() - start
        return [self._ledger.state(b)[1] for b in blocks]

    def release(self, layer: int, experts: Sequence[int]) -> None:
        """Gives back what :meth:`acquire` pinned; once the store is closed, nothing."""
        if self._arena is not None:
            self._ledger.release(self._blocks(layer, experts))

    def prefetch(
        self, layer: int, expert: int, p: float, deadline: int | None = None, host: bool = False
    ) -> str:
        """An expert that is needed with probability ``p`` by ``deadline``; loaded now if there is room.

        A prefetch to host memory goes nowhere here: there is no host tier.
        """
        self._open()
        if host:
            return "refused"
        (block,) = self._blocks(layer, [expert])
        answer: str = self._ledger.prefetch(block, p, _NEVER if deadline is None else deadline)
        self._drain()
        self._ledger.take_failed()  # one that cannot be read fails when it is needed
        return answer

    def advance(self, clock: int) -> None:
        """Tells the time that deadlines are in."""
        self._open()
        self._ledger.advance(clock)

    def stats(self) -> dict[str, Any]:
        """The ledger's counters, and the seconds that :meth:`acquire` spent loading."""
        return dict(self._ledger.stats()) | {"stall_seconds": self._stall}

    def timeline(self) -> list[dict[str, Any]]:
        """The last transfers as events of the Chrome trace format, times in microseconds."""
        return list(self._events)

    def close(self) -> None:
        """Gives the arena back; only counters, :meth:`release` and :meth:`close` may be called later."""
        self._arena = None
        self._views = {}

    def __enter__(self) -> SimpleStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _open(self) -> None:
        if self._arena is None:
            raise StoreError("The expert store is closed; open the model again with specgate.offload.")

    def _blocks(self, layer: int, experts: Sequence[int]) -> list[int]:
        if not 0 <= layer < self.layers or any(not 0 <= e < self.experts for e in experts):
            raise ConfigError(
                f"layer {layer} or one of the experts {list(experts)} is outside the {self.layers} layers of "
                f"{self.experts} experts; count from 0."
            )
        return [layer * self.experts + e for e in experts]

    def _drain(self) -> None:
        """Moves whatever the ledger wants moved."""
        while (job := self._ledger.next_job()) is not None:
            status = "CANCELLED"
            start = time.perf_counter()
            try:
                self._load(job.block, job.slot)
                status = "OK"
            except StoreError as error:
                self._error, status = error, "FAILED"
            finally:
                if status != "OK" and self._poison:
                    self._spoil(job.slot)
                self._ledger.complete(job.id, status)
            layer, expert = divmod(job.block, self.experts)
            self._events.append(
                {
                    "name": f"layer {layer} expert {expert}",
                    "cat": job.level.lower(),
                    "ph": "X",
                    "ts": start * 1e6,
                    "dur": (time.perf_counter() - start) * 1e6,
                    "pid": 0,
                    "tid": 0,
                }
            )

    def _load(self, block: int, slot: int) -> None:
        if self._poison:
            self._spoil(slot)
        for name, tensor in self._source.tensors(block).items():
            self._views[name][slot].copy_(tensor)

    def _spoil(self, slot: int) -> None:
        for view in self._views.values():
            view[slot].fill_(float("nan"))
