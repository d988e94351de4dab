"""Decodes the tokens of a trace: the dense part of each layer, the experts of the trace from a store's slots.

The order of a layer's work is that of a real model: its dense part (attention and router) as one matrix of
the same size, then the router's choice, which the host waits for, then one event of the store, the experts by
the kernels that transformers decodes with, the release. What is foreseen is asked for while the device
computes. A resident model asks nothing of the host within a token.

Letters: T tokens, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from specgate.report.replay_steps import Steps
from specgate.report.replay_trace import Asked, Document, asked_of
from specgate.report.spans import Marks, Span
from specgate.runtime.store import ExpertStore


class Probe:
    """When a token's parts ran.

    Attributes:
        spans: ``dense``, ``experts`` and ``wait`` (for experts), once :meth:`read` was called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = Marks(device)
        self._pairs: list[tuple[str, Any, Any]] = []
        self.spans: dict[str, list[Span]] = {"dense": [], "experts": [], "wait": []}

    def mark(self) -> Any:
        return self._marks.mark()

    def add(self, what: str, begin: Any, end: Any) -> None:
        self._pairs.append((what, begin, end))

    def read(self) -> None:
        """Turns the marks so far into spans; the device is waited for."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for what, begin, end in self._pairs:
            self.spans[what].append((self._marks.read(begin), self._marks.read(end)))
        self._pairs.clear()
        self._marks = Marks(self._device)


class Runner:
    """Runs documents with the experts that a store lends.

    Args:
        steps: how the parts of a token are launched.
        store: that lends the experts.
        dtype: of the experts' weights in a sum.
        foresight: which of the documents' plans is followed; None: nothing is asked for ahead.
        resident: every expert is loaded for good, and the store is not asked again.
    """

    def __init__(
        self,
        steps: Steps,
        store: ExpertStore,
        dtype: torch.dtype,
        foresight: str | None = None,
        resident: bool = False,
    ) -> None:
        self.steps, self.store = steps, store
        self.foresight, self.clock = foresight, 0
        self._device, self._dtype = store.device, dtype
        self._table_LE: Tensor | None = self._load_all() if resident else None

    def _load_all(self) -> Tensor:
        self.store.warm()
        every = list(range(self.store.experts))
        rows = [self.store.acquire(layer, every) for layer in range(self.store.layers)]
        return torch.tensor(rows, device=self._device)

    def run(self, document: Document, probe: Probe | None = None) -> list[float]:
        """Decodes a document.

        Returns:
            Seconds of each token, until the next one is known.
        """
        experts_TLK = torch.tensor(document.experts_TLK, device=self._device)
        weights_TLK = document.weights_TLK.to(self._device, self._dtype)
        slots_TLK = None
        if self._table_LE is not None:
            layers_L1 = torch.arange(experts_TLK.shape[1], device=self._device)[:, None]
            slots_TLK = self._table_LE[layers_L1, experts_TLK]
        plan = None
        if self.foresight is not None:
            plan = asked_of(document.plans[self.foresight], self.store.experts)
        seconds = []
        with torch.inference_mode():
            self.steps.begin(slots_TLK, weights_TLK)
            for t in range(len(document)):
                start = time.perf_counter()
                if slots_TLK is None:
                    self._token(document, t, experts_TLK, plan, probe)
                else:
                    self._resident_token(t, probe)
                self.steps.finish()
                seconds.append(time.perf_counter() - start)
        if probe is not None:
            probe.read()
        return seconds

    def _token(
        self,
        document: Document,
        t: int,
        experts_TLK: Tensor,
        plan: list[list[Asked | None]] | None,
        probe: Probe | None,
    ) -> None:
        store, steps, cuda = self.store, self.steps, self._device.type == "cuda"
        if plan is not None:
            hand_over(store, self.clock, plan[t][0])
        for layer in range(store.layers):
            began = probe.mark() if probe else None
            steps.attend(t, layer)
            attended = probe.mark() if probe else None
            # On a GPU the host waits for the router here, as it does in a real model.
            chosen = experts_TLK[t, layer].tolist() if cuda else document.experts_TLK[t][layer]
            self.clock += 1
            store.advance(self.clock)
            asked = probe.mark() if probe else None
            slots = store.acquire(layer, chosen)
            there = probe.mark() if probe else None
            try:
                steps.send(slots)
                ready = probe.mark() if probe else None
                steps.experts(t, layer)
                computed = probe.mark() if probe else None
                if plan is not None:  # while the device computes
                    hand_over(store, self.clock, plan[t][layer + 1])
            finally:
                store.release(layer, chosen)
            if probe:
                probe.add("dense", began, attended)
                probe.add("wait", asked, there)
                probe.add("experts", ready, computed)

    def _resident_token(self, t: int, probe: Probe | None) -> None:
        for layer in range(self.store.layers):
            began = probe.mark() if probe else None
            self.steps.attend(t, layer)
            attended = probe.mark() if probe else None
            self.steps.experts(t, layer)
            if probe:
                probe.add("dense", began, attended)
                probe.add("experts", attended, probe.mark())


def hand_over(store: ExpertStore, clock: int, asked: Asked | None) -> None:
    """Tells a store what is foreseen at a point; ``clock``: calls of layers so far."""
    if asked is not None:
        blocks_N, p_N, horizons_N = asked
        store.foresee(blocks_N, p_N, clock + horizons_N)
