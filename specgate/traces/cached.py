"""A split's windows held whole in the memory of one device, so that a step costs no gathering and no copy.

Letters: B windows in a batch, W windows in all, T tokens of the longest window, L MoE layers, K experts per
token, D hidden size.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from specgate.errors import TraceError
from specgate.traces.batch import RoutingBatch
from specgate.traces.windows import WindowDataset

_CHUNK = 64


class CachedDataset(Dataset[RoutingBatch]):
    """The windows of ``source``, read once into ``device``; batches are rows of what is held there.

    Expert ids are held as int16, weights and hidden states as float16 (what the shards hold), and widened
    when a batch is made.

    Args:
        source: windows over mapped traces.
        device: where to hold them, e.g. ``cpu`` or ``cuda``.

    Raises:
        TraceError: if the device is not there or its memory is too small.
    """

    def __init__(self, source: WindowDataset, device: str) -> None:
        self.phase, self.size = source.phase, len(source)
        key = (device, source.key())
        self.held: dict[str, Tensor] = _HELD.get(key, {})
        if self.held:  # the next job of a sweep, in the same process
            self.device = torch.device(device)
            return
        span = int((source.table.before + source.table.length + source.table.after).max())
        try:
            self.device = torch.device(device)
            for start in range(0, self.size, _CHUNK):
                part = source.__getitems__(list(range(start, min(start + _CHUNK, self.size))))
                self._keep(part, start, span)
            while len(_HELD) >= _KEPT:
                del _HELD[next(iter(_HELD))]
            _HELD[key] = self.held
        except (RuntimeError, AssertionError) as err:  # torch's own: no such device, or out of memory
            raise TraceError(
                f"data.cache={device} cannot hold {self.size} windows ({str(err).splitlines()[0]}); set"
                " data.cache=null, or fewer data.max_sequences."
            ) from None

    def _keep(self, part: RoutingBatch, start: int, span: int) -> None:
        for field in fields(part):
            value = getattr(part, field.name)
            if not isinstance(value, Tensor):
                continue
            kind = _NARROW.get(field.name, value.dtype)
            if field.name not in self.held:
                tail = (span, *value.shape[2:]) if value.dim() > 1 else ()
                self.held[field.name] = torch.zeros((self.size, *tail), dtype=kind, device=self.device)
            rows = self.held[field.name][start : start + len(value)]
            if value.dim() > 1:
                rows = rows[:, : value.shape[1]]
            rows.copy_(value.to(kind))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> RoutingBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> RoutingBatch:
        """The batch of these windows, padded to the longest window of the split."""
        index_B = torch.tensor(indices, device=self.device)
        rows: dict[str, Any] = {name: held[index_B] for name, held in self.held.items()}
        for name in _NARROW:
            if name in rows:
                rows[name] = rows[name].to(torch.int64 if name == "experts_BTLK" else torch.float32)
        return RoutingBatch(**rows, phase=self.phase)


_KEPT = 3
"""Splits that stay in memory: train, validation and test of the data set used last."""
_HELD: dict[Any, dict[str, Tensor]] = {}
_NARROW = {"experts_BTLK": torch.int16, "weights_BTLK": torch.float16, "hidden_BTLD": torch.float16}
