"""What a replayed token runs through: a model of random weights without experts, experts' kernels on slots.

Letters: L MoE layers, K experts per token, D hidden size, M rows of a layer's dense part, S slots, V token
ids.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.errors import ConfigError
from specgate.moe.offload_kernels import MAX_GROUPS, Face
from specgate.report.replay_shape import ModelShape

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

    def next_token(self) -> Tensor:
        """The token that comes next, int64 ``[]``."""
        if self.head_VD is None:
            return self.hidden_1D[0].argmax()
        return F.linear(self.hidden_1D, self.head_VD).argmax()

    def finish(self) -> int:
        """The same; the host waits for it."""
        return int(self.next_token())

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
