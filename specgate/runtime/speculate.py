"""The speculation kernel: which experts of the next layers will be needed, in one launch and without waiting.

Letters: B sequences, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, K experts per
token, D hidden size.

A launch at one source point computes a predictor's step, calibrates it, merges the sequences (1 - prod(1 -
p)) and leaves (layer, expert, p) of all experts that reach a threshold in a ring of forecasts that any host
thread polls: in mapped, pinned memory on a CUDA device. The scheduler's thread polls the ring itself
(``ForecastReader`` in csrc/speculate.h); :meth:`Speculator.poll` is for Python.

On CUDA a launch is one kernel for every batch: it asks for nothing from the host, allocates nothing, and can
be captured into a graph. On the CPU it runs in the caller's thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specgate.errors import ConfigError, StoreError
from specgate.runtime import native
from specgate.runtime.speculation_state import Prompt, clear_rows, state_buffers

_SCALARS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INDICES = {torch.int64: 8, torch.int32: 4}


class Parts(Protocol):
    """A predictor and its calibrator as plain numbers and tensors."""

    @property
    def sizes(self) -> Mapping[str, int | float]:
        """Fields of ``SpeculationSizes`` (csrc/speculate.h)."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Fields of ``SpeculationWeights``."""


class Foreseen(NamedTuple):
    """One forecast of the ring.

    Attributes:
        sequence: number of the launch, from 1.
        source_layer: where it was launched, among the predictor's layers.
        ignored: sequences that were left out because their hidden state was not finite.
        entries: (layer, expert, p, ahead), nearest layer first; ``ahead`` counts MoE layers from the source,
            so a layer at or before it is the next token's.
    """

    sequence: int
    source_layer: int
    ignored: int
    entries: list[tuple[int, int, float, int]]


class Speculator:
    """Runs a predictor's step beside the model, for up to ``batch`` sequences at once.

    While decoding, call :meth:`launch` once at every source point in order: layer -1 with the ids of the
    tokens that are decoded now, then each MoE layer with the hidden state that enters its norm and what its
    router chose. What earlier tokens left behind is kept here and moved on by each launch; a prompt is put in
    by :meth:`read`.

    Args:
        parts: what ``speculation_parts`` (predictors/speculation.py) makes of a predictor.
        threshold: least p that is reported; see :meth:`set_threshold`.
        batch: most sequences.
        device: where the model's tensors are.
        context: tokens that the predictor's attention looks back on; older ones are forgotten.
        slots: forecasts that the ring holds before it overwrites the oldest.
        backend: ``"cpu"``, ``"cuda"`` or, for tests, ``"emulated"``: the kernel's source run on the CPU;
            default: the device's.
        option: most thread blocks (cuda; 0: what the device holds) or the order of threads (emulated).

    Attributes:
        state: the buffers, by name (see ``SpeculationState``). ``state["live"][b] = 0`` leaves sequence b
            out, and rows may be moved about between tokens.
        ring: for :meth:`specgate.runtime.store.ExpertStore.follow`, which prefetches what it says.

    Raises:
        StoreError: if the native core is missing, or memory is refused.
        ConfigError: if the parts or a setting make no sense.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        threshold: float | Tensor = 0.5,
        batch: int = 1,
        device: torch.device | str = "cpu",
        context: int = 512,
        slots: int = 64,
        backend: str | None = None,
        option: int = 0,
    ) -> None:
        if batch < 1 or context < 1 or slots < 2:
            raise ConfigError(
                f"speculation with batch={batch}, context={context}, slots={slots} makes no sense: use at"
                " least 1, 1, 2"
            )
        self.device, self.batch = torch.device(device), batch
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device {device} is not there: choose device=cpu, or ask `specgate doctor`")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.sizes = dict(parts.sizes) | {"batch": batch, "context": context}
        self.tensors = {name: tensor.to(self.device).contiguous() for name, tensor in parts.tensors.items()}
        self.layers, self.top_k = int(self.sizes["layers"]), int(self.sizes["top_k"])
        self.hidden, self.routed = int(self.sizes["hidden"]), bool(self.sizes.get("width"))
        points = (self.layers + 1, int(self.sizes["horizons"]))
        self.tensors["threshold"] = torch.zeros(points, device=self.device)
        self.set_threshold(threshold)
        self.state = state_buffers(self.sizes, batch, context, self.device)
        named = self.tensors | {f"state.{name}": tensor for name, tensor in self.state.items()}
        addresses = {name: tensor.data_ptr() for name, tensor in named.items()}
        core = native.require()
        on = backend or self.device.type
        self._native: Any = core.make_speculation(
            on, self.sizes, addresses, slots, self.device.index or 0, option
        )
        self.ring: Any = self._native.ring
        self._reader: Any = core.ForecastReader(self.ring)
        self._prompt: Prompt | None = None
        self._on_cuda = on == "cuda"

    # ------------------------------------------------------------------ launches

    def launch(
        self,
        layer: int,
        hidden: Tensor | None = None,
        experts: Tensor | None = None,
        weights: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        """Foresee from one source point. On CUDA: enqueued on the current stream; launches must not overlap.

        Args:
            layer: the last MoE layer whose router input exists, -1 before the first.

        Shapes:
            hidden: ``[B, D]`` float32, bfloat16 or float16, the residual stream that enters the layer's norm.
                A sequence whose hidden state is not finite is left out of the forecast.
            experts: ``[B, K]`` int64 or int32 and weights: ``[B, K]`` floats, the layer's routing (weight 0:
                chosen but not run); needed by ``mlp`` and ``router_residual``. token_ids: ``[B]``, at layer
                -1.

        Raises:
            ConfigError: if a tensor is missing or has another shape, type or device.
            StoreError: if the Speculator was closed.
        """
        if self._native is None:
            raise StoreError("the Speculator was closed: make another one")
        first = token_ids if layer < 0 else hidden if self.hidden else experts
        if first is None:
            raise ConfigError(f"launch at layer {layer} has no input: {self._needs()}")
        rows = first.shape[0]
        ids = self._address("token_ids", token_ids, (rows,), _INDICES) if layer < 0 else (0, 8)
        state = (0, 0)
        choice, weight = (0, 8), (0, 0)
        if layer >= 0 and self.hidden:
            state = self._address("hidden", hidden, (rows, self.hidden), _SCALARS)
        if layer >= 0 and self.routed:
            choice = self._address("experts", experts, (rows, self.top_k), _INDICES)
            weight = self._address("weights", weights, (rows, self.top_k), _SCALARS)
        stream = torch.cuda.current_stream(self.device).cuda_stream if self._on_cuda else 0
        self._native.launch(layer, rows, *state, *choice, *weight, *ids, stream)

    def _needs(self) -> str:
        parts = ["hidden"] * bool(self.hidden) + ["experts", "weights"] * self.routed
        return "pass token_ids at layer -1, else " + (", ".join(parts) or "hidden")

    def _address(
        self, name: str, tensor: Tensor | None, shape: tuple[int, ...], types: Mapping[torch.dtype, int]
    ) -> tuple[int, int]:
        if tensor is None:
            raise ConfigError(f"launch lacks {name}: {self._needs()}")
        if tensor.shape != shape or tensor.dtype not in types or tensor.device != self.device:
            kinds = " or ".join(str(kind).removeprefix("torch.") for kind in types)
            raise ConfigError(
                f"launch got {name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: pass {shape} in"
                f" {kinds} on {self.device}"
            )
        if not tensor.is_contiguous():
            raise ConfigError(f"launch got {name} that is not contiguous: pass {name}.contiguous()")
        return tensor.data_ptr(), types[tensor.dtype]

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Least p that is reported from now on: one number, or ``[P, H]`` by source point and horizon.

        Raises:
            ConfigError: if it is not within 0..1 (1 or more: report nothing but certainties).
        """
        value = torch.as_tensor(threshold, dtype=torch.float32)
        if not bool(((value >= 0) & (value <= 1)).all()):
            raise ConfigError(f"threshold {threshold} is no probability: choose numbers from 0 to 1")
        self.tensors["threshold"].copy_(value.expand_as(self.tensors["threshold"]))

    # ------------------------------------------------------------------ what came before

    def reset(self, rows: Tensor | slice | None = None) -> None:
        """Make sequences fresh (all of them by default), as if no token had been decoded."""
        clear_rows(self.state, slice(None) if rows is None else rows)

    def read(
        self,
        layer: int,
        *,
        token_ids: Tensor | None = None,
        valid: Tensor | None = None,
        hidden: Tensor | None = None,
        experts: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Take note of a prompt, before the first decoded token: once at every source point, in order.

        Args:
            layer: -1 with ``token_ids`` (and ``valid``), then each MoE layer with what a launch takes.

        Shapes:
            token_ids: ``[B, T]``. valid: ``[B, T]`` bool, False for padding on either side; default: no
            padding. hidden: ``[B, T, D]``. experts, weights: ``[B, T, K]``.

        Raises:
            ConfigError: if a point is left out, or a tensor.
        """
        if layer < 0:
            if token_ids is None or token_ids.shape[0] > self.batch:
                raise ConfigError(
                    f"read at layer -1 needs token_ids [B, T] of at most {self.batch} sequences"
                )
            self._prompt, self._read = Prompt(self.state, self.sizes, self.tensors, token_ids, valid), -1
            return
        if self._prompt is None or layer != self._read + 1:
            raise ConfigError(
                f"read at layer {layer} comes out of order: start at layer -1 and leave none out"
            )
        self._read = layer
        if self.routed and (experts is None or weights is None or (self.hidden and hidden is None)):
            raise ConfigError(f"read at layer {layer} lacks an input: {self._needs()}")
        if experts is not None and weights is not None:
            self._prompt.layer(layer, hidden, experts, weights)
        if layer == self.layers - 1:
            self._prompt = None

    # ------------------------------------------------------------------ results

    def poll(self) -> list[tuple[int, int, float]]:
        """(layer, expert, p) of the oldest forecast not polled yet; empty if there is none."""
        found = self.poll_forecast()
        return [] if found is None else [entry[:3] for entry in found.entries]

    def poll_forecast(self, newest: bool = False) -> Foreseen | None:
        """The oldest (or newest) forecast not polled yet, None if there is none. Never waits."""
        found = self._reader.poll_newest() if newest else self._reader.poll()
        return None if found is None else Foreseen(*found)

    @property
    def lost(self) -> int:
        """Forecasts that were overwritten, or skipped, before they were polled."""
        return int(self._reader.lost)

    def close(self) -> None:
        """Wait for the device and free its memory (the ring lives as long as its readers)."""
        self._native = None

    def __enter__(self) -> Speculator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
