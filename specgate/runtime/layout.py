"""Where the tensors of one expert lie, in a slot of the device and in an encoded block: byte for byte.

Letters: R rows (all axes but the last), C columns (the last axis), G groups of a row.

A *slot* holds one expert as the kernels read it. A *block* holds the same expert as it lies in a file and in
host memory: plain, or with its matrices as integers or 8-bit floats and their scales. Pieces and scales begin
at multiples of 256 bytes in both. With codec ``none`` and a checkpoint in the slots' dtype the two are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specgate.errors import ConfigError, StoreError

ALIGNMENT = 256
CODECS = ("none", "int8", "int4", "fp8")
GROUPS = (32, 64)
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOST = 1 << 40  # bytes; a piece of a real expert is far smaller


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def dtype_name(dtype: torch.dtype | str) -> str:
    """The plain name of a dtype that a slot may have.

    Raises:
        ConfigError: for any other dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name} is not one that experts are kept in; choose {', '.join(DTYPES)}.")
    return name


@dataclass(frozen=True)
class Piece:
    """One tensor of an expert.

    Attributes:
        name: as the class that executes the experts calls it (``gate_up_proj``, ``down_proj``,
            ``gate_up_proj_bias``, ``down_proj_bias``; ``wi``, ``wo`` in Switch Transformers).
        shape: of one expert's tensor.
        dtype: in a slot.
        stored: in a block, if it is not coded; the checkpoint's dtype.
        coded: whether the codec applies. Biases and other 1-D pieces never are.
        slot_offset: bytes from the start of the slot.
        block_offset: bytes from the start of the block.
        scale_offset: of its scales in the block; 0 if not coded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    coded: bool
    slot_offset: int = 0
    block_offset: int = 0
    scale_offset: int = 0

    @property
    def rows(self) -> int:
        """R."""
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """C."""
        return self.shape[-1]

    @property
    def slot_bytes(self) -> int:
        """Bytes in a slot, without what pads it."""
        return self.rows * self.cols * DTYPES[self.dtype].itemsize

    def sizes(self, codec: str, group: int) -> tuple[int, int]:
        """Bytes of the values and of the scales in a block, without what pads them."""
        if not self.coded:
            return self.rows * self.cols * DTYPES[self.stored].itemsize, 0
        if codec == "int4":
            groups = -(-self.cols // group)
            return self.rows * groups * (group // 2), self.rows * groups * 2
        return self.rows * self.cols, self.rows * 4


@dataclass(frozen=True)
class BlockLayout:
    """The pieces of one expert, and how long a slot and a block are.

    Attributes:
        pieces: in the order in which they lie.
        codec: ``none``, ``int8``, ``int4`` or ``fp8``.
        group: values that share a scale (int4; 0 otherwise).
        slot_bytes: a multiple of 256.
        block_bytes: of an encoded block before zstd; a multiple of 256.
    """

    pieces: tuple[Piece, ...]
    codec: str
    group: int
    slot_bytes: int
    block_bytes: int

    @classmethod
    def make(
        cls,
        tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype | str]],
        codec: str = "none",
        group: int = 0,
        dtype: torch.dtype | str | None = None,
    ) -> BlockLayout:
        """Lays pieces one behind the other.

        Args:
            tensors: name, shape of one expert and dtype in the checkpoint of each piece.
            codec: one of :data:`CODECS`.
            group: 32 or 64 for int4 (0 takes 32).
            dtype: in a slot; None keeps the checkpoint's.

        Raises:
            ConfigError: for an unknown codec, group or dtype, a piece that is named twice or is empty.
        """
        if codec not in CODECS:
            raise ConfigError(f"codec={codec} is unknown; choose one of {', '.join(CODECS)}.")
        if codec == "int4":
            group = group or GROUPS[0]
            if group not in GROUPS:
                raise ConfigError(f"group={group} is not possible; int4 has groups of 32 or 64 values.")
        elif group:
            raise ConfigError(f"group={group} is only for codec=int4; leave it out with codec={codec}.")
        pieces: list[Piece] = []
        slot = block = 0
        for name, shape, stored in tensors:
            if not shape or min(shape) < 1 or math.prod(shape) * 4 > MOST:
                raise ConfigError(f"Piece {name} has the shape {list(shape)}; every axis must be at least 1.")
            if any(piece.name == name for piece in pieces):
                raise ConfigError(f"Piece {name} appears twice; each tensor of an expert has its own name.")
            coded = codec != "none" and len(shape) > 1
            in_slot = dtype_name(stored if dtype is None else dtype)
            piece = Piece(name, tuple(shape), in_slot, dtype_name(stored), coded, slot, block)
            values, scales = piece.sizes(codec, group)
            if coded:
                piece = Piece(
                    name, piece.shape, in_slot, piece.stored, coded, slot, block, block + aligned(values)
                )
            pieces.append(piece)
            slot += aligned(piece.slot_bytes)
            block += aligned(values) + aligned(scales)
        if not pieces:
            raise ConfigError("An expert without tensors has no layout; name at least one piece.")
        return cls(tuple(pieces), codec, group, slot, block)

    def with_dtype(self, dtype: torch.dtype | str | None) -> BlockLayout:
        """The same blocks in slots of another dtype (None: the checkpoint's)."""
        tensors = [(piece.name, piece.shape, piece.stored) for piece in self.pieces]
        return BlockLayout.make(tensors, self.codec, self.group, dtype)

    @property
    def is_copy(self) -> bool:
        """Whether a block is a slot, byte for byte, so that decoding is a copy."""
        return not any(piece.coded or piece.dtype != piece.stored for piece in self.pieces)

    def piece(self, name: str) -> Piece:
        """A piece by its name.

        Raises:
            ConfigError: if there is none.
        """
        for piece in self.pieces:
            if piece.name == name:
                return piece
        names = ", ".join(piece.name for piece in self.pieces)
        raise ConfigError(f"This expert has no piece {name}; it has {names}.")

    def views(self, slots: Tensor) -> dict[str, Tensor]:
        """The pieces inside slots, without a copy.

        Shapes:
            slots: uint8 ``[slot_bytes]`` or ``[S, slot_bytes]``, contiguous -> ``[*shape]`` or
            ``[S, *shape]`` each.
        """
        out = {}
        for piece in self.pieces:
            part = slots[..., piece.slot_offset : piece.slot_offset + piece.slot_bytes]
            out[piece.name] = part.view(DTYPES[piece.dtype]).unflatten(-1, piece.shape)
        return out

    def native_format(self) -> Any:
        """The same as ``specgate.runtime._native.BlockFormat``, for the native core.

        Raises:
            StoreError: if the native core is not built.
        """
        from specgate.runtime import native

        pieces = [
            (p.rows, p.cols, p.dtype, p.stored, p.coded, p.slot_offset, p.block_offset, p.scale_offset)
            for p in self.pieces
        ]
        core: Any = native.require()
        return core.BlockFormat(self.codec, self.group, pieces, self.slot_bytes, self.block_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a header."""
        return {
            "codec": self.codec,
            "group": self.group,
            "block_bytes": self.block_bytes,
            "pieces": [
                {
                    "name": piece.name,
                    "shape": list(piece.shape),
                    "stored": piece.stored,
                    "coded": piece.coded,
                    "offset": piece.block_offset,
                    "scale_offset": piece.scale_offset,
                }
                for piece in self.pieces
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], dtype: torch.dtype | str | None = None) -> BlockLayout:
        """Reads what :meth:`to_json` gave; ``dtype`` is that of the slots.

        Raises:
            StoreError: if the values contradict each other.
            ConfigError: for a dtype that slots cannot have.
        """
        if dtype is not None:
            dtype = dtype_name(dtype)
        try:
            tensors = [
                (str(p["name"]), tuple(int(size) for size in p["shape"]), str(p["stored"]))
                for p in values["pieces"]
            ]
            layout = cls.make(tensors, str(values["codec"]), int(values["group"]), dtype)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            reason = str(error).rstrip(".")
            raise StoreError(f"The layout in the header makes no sense ({reason}); pack again.") from error
        if layout.to_json() != dict(values):
            raise StoreError("The offsets in the header are not those of its pieces; pack again.")
        return layout
