"""Experts with random weights in host memory or in a packed file, and the stores that lend them to a replay.

Letters: R rows of a matrix (all axes but the last).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from specgate.errors import ConfigError
from specgate.report.replay_shape import ModelShape
from specgate.runtime import codecs
from specgate.runtime.layout import aligned
from specgate.runtime.packed import PackedHeader, PackedWriter
from specgate.runtime.source import ExpertSource
from specgate.runtime.store import ExpertStore, StoreSettings
from specgate.runtime.store_settings import PAGE

TIERS = ("memory", "file")
STEP = 7919  # a prime: rows by which a block's matrices are turned against those of the block before

#: Told how many of how many experts were made.
Told = Callable[[int, int], None]


class RandomBlocks:
    """Encoded experts of a shape: one of scaled normal values, and the others by turning its matrices' rows.

    Turning costs no more than copying, and an expert that lies in another's place is found out.

    Args:
        shape: of the model.
        codec: ``none``, ``int8``, ``int4`` or ``fp8``.
        seed: of the values.
    """

    def __init__(self, shape: ModelShape, codec: str = "none", seed: int = 0) -> None:
        self.shape, self.layout = shape, shape.layout(codec)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, size in shape.pieces.items():
            values = torch.empty(size).normal_(0, shape.hidden**-0.5, generator=generator)
            tensors[name] = values.to(shape.torch_dtype)
        self._first = codecs.encode_block(self.layout, tensors, "random weights").contiguous()
        self._stretches: list[tuple[int, int, int]] = []  # offset, rows, bytes of a row
        for piece in self.layout.pieces:
            values_bytes, scale_bytes = piece.sizes(self.layout.codec, self.layout.group)
            self._stretches.append((piece.block_offset, piece.rows, values_bytes // piece.rows))
            if scale_bytes:
                self._stretches.append((piece.scale_offset, piece.rows, scale_bytes // piece.rows))

    @property
    def count(self) -> int:
        """Experts over all layers."""
        return self.shape.layers * self.shape.experts

    def write(self, block: int, out: Tensor) -> Tensor:
        """Writes a block over ``out`` (uint8 ``[block_bytes]``) and returns it."""
        out.copy_(self._first)
        for offset, rows, width in self._stretches:
            by = block * STEP % rows
            if by:
                ours = out[offset : offset + rows * width].view(rows, width)
                first = self._first[offset : offset + rows * width].view(rows, width)
                ours[by:].copy_(first[: rows - by])
                ours[:by].copy_(first[rows - by :])
        return out


class Stores:
    """Opens stores over the same experts, one after the other or several at a time; a context.

    Args:
        blocks: the experts.
        device: of the slots.
        tier: ``memory``: all experts lie in (pinned) host memory. ``file``: in a packed file, with the part
            ``host`` of them in host memory.
        folder: for the file, which is removed at the end.
        host: share of the experts that host memory holds with ``tier=file``.
        told: of the experts made.

    Raises:
        ConfigError: an unknown tier, or a share outside 0 to 1.
        StoreError: no room in memory or on the disk.
    """

    def __init__(
        self,
        blocks: RandomBlocks,
        device: torch.device,
        tier: str = "memory",
        folder: Path | None = None,
        host: float = 0.0,
        told: Told | None = None,
    ) -> None:
        if tier not in TIERS:
            raise ConfigError(f"tier={tier} is unknown; choose {' or '.join(TIERS)}.")
        if not 0 <= host <= 1:
            raise ConfigError(f"host={host} is no share of the experts; write a number from 0 to 1.")
        self.blocks, self.device, self.tier = blocks, device, tier
        self._folder, self._host, self._told = folder, host, told or (lambda done, total: None)
        self._stack = ExitStack()
        self._lender: ExpertStore | None = None
        self._source: ExpertSource | None = None

    def __enter__(self) -> Stores:
        if self.tier == "file":
            self._source = self._pack()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._lender = None

    def open(self, slots: int, settings: StoreSettings) -> ExpertStore:
        """A store of its own with so many slots; the caller closes it."""
        if self._source is not None:
            slab = aligned(self.blocks.layout.block_bytes, PAGE)
            room = round(self._host * self.blocks.count) * slab
            return ExpertStore(self._source, slots, room, self.device, settings)
        if not shares_memory():
            return self._filled(slots, settings)
        if self._lender is None:
            self._lender = self._filled(1, replace(settings, eviction="lru", timeline=0))
            self._stack.callback(self._lender.close)
        return self._new(slots, settings, share=self._lender)

    def _new(self, slots: int, settings: StoreSettings, **more: Any) -> ExpertStore:
        shape, layout = self.blocks.shape, self.blocks.layout
        return ExpertStore(
            None, slots, None, self.device, settings,
            layout=layout, layers=shape.layers, experts=shape.experts, **more,
        )  # fmt: skip

    def _filled(self, slots: int, settings: StoreSettings) -> ExpertStore:
        store = self._new(slots, settings)
        try:
            scratch = torch.empty(self.blocks.layout.block_bytes, dtype=torch.uint8)
            for block in range(self.blocks.count):
                store.fill(*divmod(block, self.blocks.shape.experts), self.blocks.write(block, scratch))
                self._told(block + 1, self.blocks.count)
        except BaseException:
            store.close()
            raise
        return store

    def _pack(self) -> ExpertSource:
        shape, layout = self.blocks.shape, self.blocks.layout
        if self._folder is None:
            raise ConfigError("tier=file needs a folder for the packed file; name one.")
        path = self._folder / f"{shape.name}-{layout.codec}.experts"
        header = PackedHeader(
            shape.name, "random", shape.config["model_type"], shape.layers, shape.experts, layout, False
        )
        scratch = torch.empty(layout.block_bytes, dtype=torch.uint8)
        self._stack.callback(path.unlink, missing_ok=True)
        with PackedWriter(path, header, layout.block_bytes) as writer:
            for block in range(self.blocks.count):
                writer.add(self.blocks.write(block, scratch).numpy())
                self._told(block + 1, self.blocks.count)
            writer.finish()
        return ExpertSource.open(path, shape.dtype)


def shares_memory() -> bool:
    """Whether several stores can read the same experts in memory (``ExpertStore(share=...)``)."""
    return "share" in inspect.signature(ExpertStore.__init__).parameters
