"""What offloaded experts stand on: the store's face, layers that stay, and slots held for a call.

Letters: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from specgate.moe.offload_kernels import Face


class Store(Protocol):
    """What is asked of an expert store; see ``specgate.runtime``."""

    @property
    def num_slots(self) -> int: ...

    def arena(self, name: str) -> Tensor: ...

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]: ...

    def release(self, layer: int, experts: Sequence[int]) -> None: ...

    def prefetch(
        self, layer: int, expert: int, p: float, deadline: int | None = None, host: bool = False
    ) -> Any: ...

    def advance(self, clock: int) -> None: ...

    def stats(self) -> dict[str, Any]: ...

    def timeline(self) -> list[Any]: ...

    def close(self) -> None: ...


class Resident:
    """Experts of a layer that stay where they are.

    Args:
        views: their tensors, ``[E, ...]`` each.
        places: of each expert in them.
    """

    def __init__(self, views: dict[str, Tensor], places: list[int]) -> None:
        self.views, self.places = views, places
        self.in_order = places == sorted(places)
        self._table_E: Tensor | None = None
        self._face: Face | None = None

    def face_of(self, module: Any) -> Face:
        """The module's face, made once."""
        if self._face is None:
            self._face = Face(module, self.views, module.plain)
        return self._face

    def table_on(self, device: torch.device) -> Tensor:
        """``places`` as a tensor, made once."""
        if self._table_E is None:
            self._table_E = torch.tensor(self.places, device=device)
        return self._table_E


class Visits:
    """Holds the slots of one wave after another; a context that gives back what it holds."""

    def __init__(self, store: Store, layer: int, waves: list[list[int]], due: int | None) -> None:
        self._store, self._layer, self._waves, self._due = store, layer, waves, due
        self._wave_of = {expert: i for i, wave in enumerate(waves) for expert in wave}
        self._held = -1
        self._slots: dict[int, int] = {}

    def __enter__(self) -> Visits:
        self._hold(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        if self._held >= 0:
            wave, self._held = self._waves[self._held], -1
            self._store.release(self._layer, wave)

    def _hold(self, number: int) -> None:
        self._give_back()
        wave = self._waves[number]
        slots = self._store.acquire(self._layer, wave)
        self._held, self._slots = number, dict(zip(wave, slots, strict=True))
        for expert in self._waves[number + 1] if number + 1 < len(self._waves) else ():
            self._store.prefetch(self._layer, expert, 1.0, self._due)

    def slot(self, expert: int) -> int:
        """Where an expert lies; valid until one of another wave is asked for."""
        if self._wave_of[expert] != self._held:
            self._hold(self._wave_of[expert])
        return self._slots[expert]
