"""Decodes the tokens of a trace: the dense part of each layer, the experts of the trace from a store's slots.

The order of a layer's work is that of a real model: its dense part (attention and router) as one matrix of
the same size, then the router's choice, which the host waits for, then one event of the store, the experts by
the kernels that transformers decodes with, the release. What is foreseen is asked for while the device
computes. A resident model asks nothing of the host within a token.

Letters: L MoE layers, E experts, K experts per token, D hidden size, M rows of a layer's dense part, S slots,
V token ids.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.errors import ConfigError
from specgate.moe.offload_kernels import MAX_GROUPS, Face
from specgate.report.replay_shape import ModelShape
from specgate.report.replay_trace import Asked, Document, asked_of
from specgate.report.spans import Marks, Span
from specgate.runtime.store import ExpertStore
from specgate.small_tensors import to_device

KERNELS = ("batched_mm", "grouped_mm")


class Body:
    """A model of random weights without its experts: what every token runs through.

    Args:
        shape: of the model.
        device: where it runs.
        dense: whether a layer has its dense part.
        head: whether a token ends with the language-model head.
        seed: of the weights.

    Attributes:
        hidden_1D: the residual stream.
    """

    def __init__(
        self, shape: ModelShape, device: torch.device, dense: bool = True, head: bool = True, seed: int = 0
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        D, self._dtype = shape.hidden, shape.torch_dtype
        rows = max(D, math.ceil(shape.dense_parameters / D))

        def matrix(count: int) -> Tensor:
            values = torch.empty(count, D, dtype=self._dtype, device=device)
            return values.normal_(0, D**-0.5, generator=generator)

        self.dense_LMD = [matrix(rows) for _ in range(shape.layers)] if dense else []
        self.head_VD = matrix(shape.vocabulary) if head else None
        self._start_1D = matrix(1)
        self.hidden_1D = self._start_1D

    @property
    def bytes(self) -> int:
        """Of all weights."""
        every = [*self.dense_LMD, *([] if self.head_VD is None else [self.head_VD])]
        return sum(t.numel() * t.element_size() for t in every)

    def restart(self) -> None:
        """Back to where the first token began."""
        self.hidden_1D = self._start_1D

    def attend(self, layer: int) -> None:
        """The dense part of a layer."""
        if self.dense_LMD:
            out_1M = F.linear(self.hidden_1D, self.dense_LMD[layer])
            self.add(out_1M[:, : self.hidden_1D.shape[1]])

    def add(self, out_1D: Tensor) -> None:
        """Adds to the residual stream, which is kept at unit size."""
        self.hidden_1D = F.rms_norm(self.hidden_1D + out_1D, self.hidden_1D.shape[1:])

    def finish(self) -> int:
        """The token that comes next; the host waits for it."""
        if self.head_VD is None:
            return int(self.hidden_1D[0].argmax())
        return int(F.linear(self.hidden_1D, self.head_VD).argmax())

    def digest(self) -> str:
        """Of the residual stream: equal if and only if every value so far was."""
        values = self.hidden_1D.detach().cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.sha256(values.tobytes()).hexdigest()[:16]


class SlotExperts:
    """The experts' kernels of a family on slots.

    Args:
        shape: of the model.
        arenas: the tensors of all slots, ``[S, ...]`` each, by name.
        kernels: ``batched_mm``, with which transformers decodes on a GPU, or ``grouped_mm``.

    Raises:
        ConfigError: unknown kernels, or more slots than ``grouped_mm`` takes.
    """

    def __init__(self, shape: ModelShape, arenas: Mapping[str, Tensor], kernels: str = "batched_mm") -> None:
        slots = len(next(iter(arenas.values())))
        if kernels not in KERNELS:
            raise ConfigError(f"kernels={kernels} cannot run from slots; choose {' or '.join(KERNELS)}.")
        if kernels == "grouped_mm" and slots > MAX_GROUPS:
            raise ConfigError(
                f"grouped_mm takes {MAX_GROUPS} slots at most and there are {slots}; choose batched_mm."
            )
        self._module: Any = shape.experts_module
        self._kernels = kernels
        self._face = Face(self._module, arenas, num_experts=slots)

    def __call__(self, hidden_1D: Tensor, slots_1K: Tensor, weights_1K: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs, ``[1, D]``."""
        config = self._module.config
        if config._experts_implementation != self._kernels:  # to set it takes longer than to look
            config._experts_implementation = self._kernels
        out: Tensor = type(self._module).forward(self._face, hidden_1D, slots_1K, weights_1K)
        return out


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
        body: the rest of the model.
        experts: the kernels, on the store's slots.
        store: that lends them.
        foresight: which of the documents' plans is followed; None: nothing is asked for ahead.
        resident: every expert is loaded for good, and the store is not asked again.
        ahead: slots go to a GPU without the host waiting for their copies.
    """

    def __init__(
        self,
        body: Body,
        experts: SlotExperts,
        store: ExpertStore,
        foresight: str | None = None,
        resident: bool = False,
        ahead: bool = True,
    ) -> None:
        self.body, self.experts, self.store = body, experts, store
        self.foresight, self.clock, self.ahead = foresight, 0, ahead
        self._device = store.device
        self._dtype = body.hidden_1D.dtype
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
        if self._table_LE is not None:
            layers_L1 = torch.arange(experts_TLK.shape[1], device=self._device)[:, None]
            experts_TLK = self._table_LE[layers_L1, experts_TLK]
        plan = None
        if self.foresight is not None:
            plan = asked_of(document.plans[self.foresight], self.store.experts)
        seconds = []
        with torch.inference_mode():
            for t in range(len(document)):
                start = time.perf_counter()
                if self._table_LE is None:
                    self._token(document, t, experts_TLK, weights_TLK, plan, probe)
                else:
                    self._resident_token(t, experts_TLK, weights_TLK, probe)
                self.body.finish()
                seconds.append(time.perf_counter() - start)
        if probe is not None:
            probe.read()
        return seconds

    def _token(
        self,
        document: Document,
        t: int,
        experts_TLK: Tensor,
        weights_TLK: Tensor,
        plan: list[list[Asked | None]] | None,
        probe: Probe | None,
    ) -> None:
        store, body, cuda = self.store, self.body, self._device.type == "cuda"
        if plan is not None:
            hand_over(store, self.clock, plan[t][0])
        for layer in range(store.layers):
            began = probe.mark() if probe else None
            body.attend(layer)
            attended = probe.mark() if probe else None
            # On a GPU the host waits for the router here, as it does in a real model.
            chosen = experts_TLK[t, layer].tolist() if cuda else document.experts_TLK[t][layer]
            self.clock += 1
            store.advance(self.clock)
            asked = probe.mark() if probe else None
            slots = store.acquire(layer, chosen)
            there = probe.mark() if probe else None
            try:
                if self.ahead:
                    slots_1K = to_device(slots, self._device)[None]
                else:
                    slots_1K = torch.tensor([slots], device=self._device)
                ready = probe.mark() if probe else None
                body.add(self.experts(body.hidden_1D, slots_1K, weights_TLK[t, layer : layer + 1]))
                computed = probe.mark() if probe else None
                if plan is not None:  # while the device computes
                    hand_over(store, self.clock, plan[t][layer + 1])
            finally:
                store.release(layer, chosen)
            if probe:
                probe.add("dense", began, attended)
                probe.add("wait", asked, there)
                probe.add("experts", ready, computed)

    def _resident_token(self, t: int, slots_TLK: Tensor, weights_TLK: Tensor, probe: Probe | None) -> None:
        body = self.body
        for layer in range(slots_TLK.shape[1]):
            began = probe.mark() if probe else None
            body.attend(layer)
            attended = probe.mark() if probe else None
            here = slice(layer, layer + 1)
            body.add(self.experts(body.hidden_1D, slots_TLK[t, here], weights_TLK[t, here]))
            if probe:
                probe.add("dense", began, attended)
                probe.add("experts", attended, probe.mark())


def hand_over(store: ExpertStore, clock: int, asked: Asked | None) -> None:
    """Tells a store what is foreseen at a point; ``clock``: calls of layers so far."""
    if asked is not None:
        blocks_N, p_N, horizons_N = asked
        store.foresee(blocks_N, p_N, clock + horizons_N)
