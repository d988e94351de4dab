"""How a replayed token's layers are launched: operation by operation, or as CUDA graphs captured once.

A graph costs the host one launch however many operations it holds, as in engines that capture their decoding,
and only then is it the device and the link that a replay measures, not Python. All layers' experts are one
graph: slots and weights come from tensors that stay where they are.

Letters: T tokens, L MoE layers, R = T L rows, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from specgate.cuda_graphs import capture, pool_of
from specgate.report.replay_body import Body, SlotExperts
from specgate.small_tensors import to_device, write_into


class Steps(Protocol):
    """The launches of a token."""

    def begin(self, slots_TLK: Tensor | None, weights_TLK: Tensor) -> None:
        """A document: where its experts lie, if that is known beforehand, and their weights."""

    def attend(self, t: int, layer: int) -> None:
        """The dense part of a layer."""

    def send(self, slots: list[int]) -> None:
        """Where the experts of the layer lie."""

    def experts(self, t: int, layer: int) -> None:
        """The experts, added to the residual stream."""

    def finish(self) -> int:
        """The token that comes next; the host waits for it."""


class OneByOne:
    """Every operation is launched by itself.

    Args:
        body, experts: what runs.
        ahead: slots go to a GPU without the host waiting for the experts' copies.
    """

    def __init__(self, body: Body, experts: SlotExperts, ahead: bool = True) -> None:
        self._body, self._experts, self._ahead = body, experts, ahead
        self._device = body.hidden_1D.device
        self._slots_TLK: Tensor | None = None
        self._slots_1K: Tensor | None = None

    def begin(self, slots_TLK: Tensor | None, weights_TLK: Tensor) -> None:
        """See :class:`Steps`."""
        self._slots_TLK, self._weights_TLK = slots_TLK, weights_TLK

    def attend(self, t: int, layer: int) -> None:
        """See :class:`Steps`."""
        self._body.attend(layer)

    def send(self, slots: list[int]) -> None:
        """See :class:`Steps`."""
        if self._ahead:
            self._slots_1K = to_device(slots, self._device)[None]
        else:
            self._slots_1K = torch.tensor([slots], device=self._device)

    def experts(self, t: int, layer: int) -> None:
        """See :class:`Steps`."""
        known = None if self._slots_TLK is None else self._slots_TLK[t, layer : layer + 1]
        slots_1K = self._slots_1K if known is None else known
        assert slots_1K is not None, "send() comes before"
        hidden_1D, weights_1K = self._body.hidden_1D, self._weights_TLK[t, layer : layer + 1]
        self._body.add(self._experts(hidden_1D, slots_1K, weights_1K))

    def finish(self) -> int:
        """See :class:`Steps`."""
        return self._body.finish()


class BodyGraphs:
    """The dense parts and the head of a body as graphs, and the tensors that all graphs share.

    Captured once for all stores. On a CPU the same calls run as they are.

    Args:
        body: whose residual stream stays in one tensor from now on.
        layers, top_k: L and K. rows: R of the longest document.
    """

    def __init__(self, body: Body, layers: int, top_k: int, rows: int) -> None:
        self.body, device = body, body.hidden_1D.device
        self._pool = pool_of(device)
        with torch.inference_mode():
            self.hidden_1D = body.hidden_1D.clone()
            self.row_1 = torch.zeros(1, dtype=torch.int64, device=device)
            self.slots_1K = torch.zeros(1, top_k, dtype=torch.int64, device=device)
            self.slots_RK = torch.zeros(rows, top_k, dtype=torch.int64, device=device)
            self.weights_RK = torch.zeros(rows, top_k, dtype=body.hidden_1D.dtype, device=device)
            self._token = torch.zeros((), dtype=torch.int64, device=device)
        body.hidden_1D = self.hidden_1D

        def attend(layer: int) -> Callable[[], None]:
            return lambda: self._kept(lambda: body.attend(layer))

        self.attends = [self.capture(attend(layer)) for layer in range(layers)]
        self._finish = self.capture(lambda: self._token.copy_(body.next_token()))
        self.restart()

    def restart(self) -> None:
        """Back to where the first token began."""
        self.body.restart()
        with torch.inference_mode():
            self.hidden_1D.copy_(self.body.hidden_1D)
        self.body.hidden_1D = self.hidden_1D

    def finish(self) -> int:
        """The token that comes next; the host waits for it."""
        self._finish()
        return int(self._token)

    def add(self, out_1D: Tensor) -> None:
        """Adds to the residual stream, in place."""
        self._kept(lambda: self.body.add(out_1D))

    def _kept(self, call: Callable[[], object]) -> None:
        """A call that makes a new residual stream, which then goes to where the old one was."""
        call()
        self.hidden_1D.copy_(self.body.hidden_1D)
        self.body.hidden_1D = self.hidden_1D

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """A call as a graph; on a CPU itself. It runs a few times meanwhile."""
        return capture(call, self.hidden_1D.device, self._pool)


class Captured:
    """Graphs of a body and of the experts of one store.

    Args:
        graphs: of the body.
        experts: on the store's slots.
        resident: slots are known beforehand, for a whole document.
    """

    def __init__(self, graphs: BodyGraphs, experts: SlotExperts, resident: bool = False) -> None:
        self._graphs, self._experts, self._resident = graphs, experts, resident
        with torch.inference_mode():  # another store's slots may be too many for this one
            graphs.slots_1K.zero_()
            graphs.slots_RK.zero_()
        self._run = graphs.capture(self._layer)
        graphs.restart()

    def _layer(self) -> None:
        g = self._graphs
        slots_1K = g.slots_RK.index_select(0, g.row_1) if self._resident else g.slots_1K
        g.add(self._experts(g.hidden_1D, slots_1K, g.weights_RK.index_select(0, g.row_1)))
        g.row_1.add_(1).remainder_(len(g.weights_RK))

    def begin(self, slots_TLK: Tensor | None, weights_TLK: Tensor) -> None:
        """See :class:`Steps`."""
        g, rows = self._graphs, weights_TLK.shape[0] * weights_TLK.shape[1]
        g.weights_RK[:rows].copy_(weights_TLK.flatten(0, 1))
        if slots_TLK is not None:
            g.slots_RK[:rows].copy_(slots_TLK.flatten(0, 1))
        g.row_1.zero_()

    def attend(self, t: int, layer: int) -> None:
        """See :class:`Steps`."""
        self._graphs.attends[layer]()

    def send(self, slots: list[int]) -> None:
        """See :class:`Steps`."""
        write_into(self._graphs.slots_1K, slots)

    def experts(self, t: int, layer: int) -> None:
        """See :class:`Steps`."""
        self._run()

    def finish(self) -> int:
        """See :class:`Steps`."""
        return self._graphs.finish()
