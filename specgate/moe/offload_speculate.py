"""Foresees experts by the speculation kernel: a launch per layer, and the store's own thread reads on.

Beside :mod:`specgate.moe.offload_forecast`, which asks any predictor in torch: here the host neither waits
for a probability nor hands an expert on. For the predictors that the kernel runs, while decoding.

Letters: B sequences, T tokens of a call, K experts per token, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from specgate.moe.families import MoELayer
from specgate.moe.offload_hooks import Routed, StackWatcher, Start


class Speculates(Protocol):
    """What is asked of ``specgate.runtime.speculate.Speculator``."""

    batch: int
    ring: Any

    def launch(
        self,
        layer: int,
        hidden: Tensor | None = None,
        experts: Tensor | None = None,
        weights: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None: ...

    def reset(self) -> None: ...

    def close(self) -> None: ...


class Follower(Protocol):
    """What is asked of ``specgate.runtime.store.ExpertStore``."""

    def follow(self, ring: Any, first_layer: int = 0, layers: int | None = None) -> None: ...

    def unfollow(self) -> None: ...


class KernelForecaster(StackWatcher):
    """Launches a predictor's step at every point of a decoded token.

    Sequences begin anew with each prompt: traces of generation, which the predictor learned from, hold none.
    If threads share the model, the forecasts are of the one that began first.

    Args:
        model: offloaded.
        layers: its MoE layers in running order.
        stack: the predictor's.
        make: a Speculator for so many sequences.
        store: that follows it.

    Attributes:
        asked: launches so far.
        ignored: always 0; the kernel leaves out what is no number.
        speculator: once a token was decoded.
    """

    in_order = False  # what the kernel computes of them is a sum

    def __init__(
        self,
        model: Any,
        layers: Sequence[MoELayer],
        stack: str,
        make: Callable[[int], Speculates],
        store: Follower,
    ) -> None:
        super().__init__(model, layers)
        self.asked = self.ignored = 0
        self.speculator: Speculates | None = None
        self._stack, self._make, self._store = stack, make, store
        self._rows = 0
        self._owner: threading.Thread | None = None
        self._lock = threading.Lock()

    def watched(self) -> list[str]:
        """The predictor's stack."""
        return [self._stack]

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        with self._lock:
            self._close()

    def started(self, stack: str, start: Start | None) -> None:
        """The first launch of a token."""
        with self._lock:
            mine = self._owner in (None, threading.current_thread()) or not self._owner.is_alive()
            if not mine:
                return
            self._owner = None
            if start is None or not start.decodes:
                self._rows = 0  # a prompt: what was decoded before is over
                return
            rows = len(start.ids_BT)
            if self.speculator is None or rows > self.speculator.batch:
                self._close()
                self.speculator = self._make(rows)
                self._store.follow(self.speculator.ring, self._first[stack], len(self._stacks[stack]))
            if rows != self._rows or not start.past:
                self.speculator.reset()
            self._rows, self._owner = rows, threading.current_thread()
            self.asked += 1
            self.speculator.launch(-1, token_ids=start.ids_BT[:, 0].contiguous())

    def passed(self, layer: MoELayer, routed: Routed) -> None:
        """The launch of a layer."""
        with self._lock:
            if self._owner is not threading.current_thread() or layer.stack != self._stack:
                return
            assert self.speculator is not None
            weights_BTK = routed.weights_BTK
            if routed.dropped_BT is not None:
                weights_BTK = weights_BTK.masked_fill(routed.dropped_BT[..., None], 0)
            parts = routed.hidden_BTD, routed.experts_BTK, weights_BTK
            self.asked += 1
            self.speculator.launch(layer.index, *(part[:, -1].contiguous() for part in parts))
            if layer.index == len(self._stacks[self._stack]) - 1:
                self._owner = None

    def _close(self) -> None:
        if self.speculator is not None:
            self._store.unfollow()
            self.speculator.close()
            self.speculator = None
