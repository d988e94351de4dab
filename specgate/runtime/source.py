"""Where the bytes of every expert lie: in a packed file, or in a checkpoint's own safetensors.

A block is one expert. Blocks are in running order: layer by layer over the MoE layers (the encoder's first),
and in each by the expert's number. The native core reads them by the segments named here;
:meth:`ExpertSource.read` does the same in Python and is the reference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specgate.errors import CheckpointError, ConfigError, StoreError, UnknownArchitectureError
from specgate.moe import expert_tensors
from specgate.moe.families import MoELayer
from specgate.moe.hosts import local_directory
from specgate.runtime import codecs, native
from specgate.runtime.checkpoint import Checkpoint, TensorPlace, open_checkpoint
from specgate.runtime.checksum import crc32c
from specgate.runtime.layout import BlockLayout
from specgate.runtime.packed import PackedHeader, is_packed, read_packed

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Segment:
    """Bytes of a file.

    Attributes:
        file: position in the list of paths.
        offset: bytes from the start of the file.
        length: bytes.
        at: where they go, from the start of the block (or of its compressed bytes).
    """

    file: int
    offset: int
    length: int
    at: int


@dataclass(frozen=True)
class Block:
    """One expert.

    Attributes:
        layer: of all MoE layers, in running order.
        expert: in its layer.
        segments: that make its encoded block, or its one zstd frame.
        crc: CRC-32C of the segment's bytes; None in a checkpoint, which has no checksums.
        compressed: length of the zstd frame; 0 if not compressed.
    """

    layer: int
    expert: int
    segments: tuple[Segment, ...]
    crc: int | None = None
    compressed: int = 0


@dataclass(frozen=True)
class ExpertSource:
    """The experts of a model, readable one by one.

    Attributes:
        paths: the files.
        blocks: in running order; a block's number is its position.
        layout: of every block, and of the slots it goes to.
        model_id, revision, family: of the model.
        layers: MoE layers.
        experts: of each layer.
        packed: whether this is a packed file.
    """

    paths: tuple[Path, ...]
    blocks: tuple[Block, ...]
    layout: BlockLayout
    model_id: str
    revision: str
    family: str
    layers: int
    experts: int
    packed: bool

    @classmethod
    def open(
        cls, where: str | Path, dtype: torch.dtype | str | None = None, revision: str | None = None
    ) -> ExpertSource:
        """Opens a packed file, or a model by its bundled name, directory or hub name.

        Args:
            where: the file or the model.
            dtype: of the slots; None is the checkpoint's own.
            revision: branch, tag or commit on the hub.

        Raises:
            StoreError: a packed file that is missing, truncated or damaged.
            CheckpointError: a model without safetensors, with a shard or an expert's tensor missing,
                truncated or of another shape.
            UnknownArchitectureError: no adapter, a broken implementation, or quantised experts.
            ConfigError: a dtype that experts are not kept in.
        """
        path = Path(where).expanduser()
        if path.is_file() or (path.suffix == ".experts" and local_directory(str(where)) is None):
            return _from_packed(path, dtype)
        return from_checkpoint(open_checkpoint(str(where), revision), dtype)

    @property
    def compressed(self) -> bool:
        """Whether blocks are zstd frames."""
        return any(block.compressed for block in self.blocks)

    @cached_property
    def _numbers(self) -> dict[tuple[int, int], int]:
        return {(block.layer, block.expert): b for b, block in enumerate(self.blocks)}

    def block_id(self, layer: int, expert: int) -> int:
        """The number of an expert's block.

        Raises:
            ConfigError: if there is no such expert.
        """
        try:
            return self._numbers[layer, expert]
        except KeyError:
            raise ConfigError(
                f"Layer {layer}, expert {expert} does not exist; {self.model_id} has {self.layers} MoE "
                f"layers of {self.experts} experts."
            ) from None

    def read(self, block: int) -> bytearray:
        """The encoded block, read, checked and decompressed: ``layout.block_bytes`` bytes.

        Raises:
            StoreError: short read, wrong checksum, damaged frame.
        """
        place = self.blocks[block]
        data = bytearray(place.compressed or self.layout.block_bytes)
        for segment in place.segments:
            _read_into(self.paths[segment.file], segment.offset, data, segment.at, segment.length)
        if place.crc is not None and crc32c(data) != place.crc:
            raise StoreError(
                f"Layer {place.layer}, expert {place.expert} in {self.paths[place.segments[0].file]} is "
                "damaged (wrong checksum); copy the file again, or pack the model again."
            )
        if not place.compressed:
            return data
        out = bytearray(self.layout.block_bytes)
        core: Any = native.require()
        core.zstd_decompress(np.frombuffer(data, np.uint8), np.frombuffer(out, np.uint8))
        return out

    def tensors(self, block: int) -> dict[str, Tensor]:
        """The pieces of an expert, decoded, in the slots' dtype."""
        return codecs.decode_block(self.layout, torch.frombuffer(self.read(block), dtype=torch.uint8))


def from_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype | str | None = None) -> ExpertSource:
    """The experts of a checkpoint, where they are.

    Raises:
        CheckpointError, UnknownArchitectureError, ConfigError: as :meth:`ExpertSource.open`.
    """
    layers = expert_tensors.skeleton(checkpoint.config)
    pieces = expert_tensors.piece_shapes(layers[0])
    stored: dict[str, str] = {}
    found: list[tuple[int, int, dict[str, list[Segment]]]] = []
    for number, layer in enumerate(layers):
        if expert_tensors.piece_shapes(layer) != pieces or layer.num_experts != layers[0].num_experts:
            raise UnknownArchitectureError(
                f"{layer.name} has experts of another shape or number than {layers[0].name}; one store keeps "
                "experts of one shape."
            )
        for expert, parts in enumerate(expert_tensors.expert_parts(layer, checkpoint.tensors)):
            segments = {
                name: _segments(checkpoint, layer, name, shape, parts[name], stored)
                for name, shape in pieces.items()
            }
            found.append((number, expert, segments))
    layout = BlockLayout.make(
        [(name, shape, stored[name]) for name, shape in pieces.items()], "none", dtype=dtype
    )
    blocks = []
    for number, expert, by_piece in found:
        placed = [
            Segment(s.file, s.offset, s.length, layout.piece(name).block_offset + s.at)
            for name, segments in by_piece.items()
            for s in segments
        ]
        blocks.append(Block(number, expert, tuple(placed)))
    return ExpertSource(
        paths=checkpoint.paths,
        blocks=tuple(blocks),
        layout=layout,
        model_id=checkpoint.model_id,
        revision=checkpoint.revision,
        family=layers[0].family.name,
        layers=len(layers),
        experts=layers[0].num_experts,
        packed=False,
    )


def _segments(
    checkpoint: Checkpoint,
    layer: MoELayer,
    piece: str,
    shape: tuple[int, ...],
    parts: tuple[expert_tensors.Part, ...],
    stored: dict[str, str],
) -> list[Segment]:
    """The bytes of one piece, ``at`` from its start; its dtype goes to ``stored``, or is compared with it."""
    segments: list[Segment] = []
    rows = (shape[0] // len(parts), *shape[1:])
    at = 0
    for part in parts:
        place = checkpoint.tensors[part.tensor]
        expected = rows if part.index is None else (layer.num_experts, *rows)
        _check(checkpoint, part.tensor, place, expected, stored.get(piece))
        stored[piece] = NAMES[place.dtype]
        length = place.length if part.index is None else place.length // layer.num_experts
        segments.append(Segment(place.file, place.offset + (part.index or 0) * length, length, at))
        at += length
    return segments


def _check(
    checkpoint: Checkpoint, name: str, place: TensorPlace, expected: tuple[int, ...], dtype: str | None
) -> None:
    """Refuses a tensor of another dtype or shape."""
    if place.dtype not in NAMES:
        if place.dtype.startswith("F8"):
            raise UnknownArchitectureError(expert_tensors.quantised("fp8"))
        raise CheckpointError(
            f"{name} is stored as {place.dtype}, and experts are read from F32, BF16 and F16; save the model "
            "again in one of these."
        )
    if place.shape != expected:
        raise CheckpointError(
            f"{name} has the shape {list(place.shape)} where config.json makes it {list(expected)}; the "
            "weights belong to another configuration, copy or download the model again."
        )
    if dtype not in (None, NAMES[place.dtype]):
        raise CheckpointError(
            f"{name} is stored as {NAMES[place.dtype]} while other experts are {dtype}; save the model again "
            "in one dtype."
        )


def _from_packed(path: Path, dtype: torch.dtype | str | None) -> ExpertSource:
    header: PackedHeader = read_packed(path)
    blocks = tuple(
        Block(
            layer=index // header.experts,
            expert=index % header.experts,
            segments=(Segment(0, offset, length, 0),),
            crc=crc,
            compressed=length if header.zstd else 0,
        )
        for index, (offset, length, crc) in enumerate(header.index)
    )
    return ExpertSource(
        paths=(path,),
        blocks=blocks,
        layout=header.layout.with_dtype(dtype),
        model_id=header.model_id,
        revision=header.revision,
        family=header.family,
        layers=header.layers,
        experts=header.experts,
        packed=True,
    )


def _read_into(path: Path, offset: int, data: bytearray, at: int, length: int) -> None:
    view = memoryview(data)[at : at + length]
    try:
        with path.open("rb", buffering=0) as f:
            while view:
                got = os.preadv(f.fileno(), [view], offset)
                if got == 0:
                    raise StoreError(
                        f"{path} ends at byte {offset:,}, {len(view):,} bytes before an expert's end; it was "
                        "truncated, copy it again."
                    )
                view, offset = view[got:], offset + got
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read at byte {offset:,} ({error.strerror}); copy it again."
        ) from error


__all__ = ["Block", "ExpertSource", "Segment", "from_checkpoint", "is_packed"]
