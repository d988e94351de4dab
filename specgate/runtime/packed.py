"""The packed expert file: one aligned, checksummed block per expert, and an index in front of them.

::

    0       magic "SGEXPERT", version, CRC-32C of the header, length of the header, length of the file
    32      the header, JSON, filled up with spaces
    4096 n  the blocks, each at a multiple of 4 KiB and followed by zeros up to the next one

docs/packed-format.md has every field. A file is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from specgate.errors import ConfigError, StoreError
from specgate.runtime.checksum import crc32c
from specgate.runtime.layout import BlockLayout, aligned

MAGIC = b"SGEXPERT"
VERSION = 1
PREAMBLE = struct.Struct("<8sIIQQ")
PAGE = 4096
MOST_HEADER = 1 << 30  # bytes
SUFFIX = ".partial"


@dataclass(frozen=True)
class PackedHeader:
    """What a packed file says of itself.

    Attributes:
        model_id, revision, family: of the model, as ``specgate.moe.hosts.Host`` has them.
        layers: MoE layers.
        experts: of each layer.
        layout: of every block; slots have the stored dtype.
        zstd: whether each block is one zstd frame.
        index: offset, length and CRC-32C of each block, layer by layer, expert by expert.
    """

    model_id: str
    revision: str
    family: str
    layers: int
    experts: int
    layout: BlockLayout
    zstd: bool
    index: tuple[tuple[int, int, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; a block's row is layer, expert, offset, length, CRC-32C."""
        return {
            "model_id": self.model_id,
            "revision": self.revision,
            "family": self.family,
            "layers": self.layers,
            "experts": self.experts,
            "zstd": self.zstd,
            "layout": self.layout.to_json(),
            "blocks": [
                [i // self.experts, i % self.experts, offset, length, crc]
                for i, (offset, length, crc) in enumerate(self.index)
            ],
        }


def is_packed(path: str | Path) -> bool:
    """Whether a file begins like a packed one."""
    try:
        with Path(path).open("rb") as f:
            return f.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_packed(path: Path) -> PackedHeader:
    """Reads and checks the header; blocks are checked when they are read.

    Raises:
        StoreError: missing, no packed file, of another version, truncated, or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(PREAMBLE.size)
            if not start.startswith(MAGIC) or len(start) < PREAMBLE.size:
                raise StoreError(
                    f"{path} is not a packed expert file; make one with python -m specgate.runtime.pack."
                )
            _, version, crc, length, whole = PREAMBLE.unpack(start)
            if version != VERSION:
                raise StoreError(
                    f"{path} has format version {version} and this specgate reads {VERSION}; pack the model "
                    "again."
                )
            if size != whole:
                change = "truncated" if size < whole else "longer than it was written"
                raise StoreError(
                    f"{path} is {change}: {size:,} bytes instead of {whole:,}; copy it again, or pack the "
                    "model again."
                )
            text = f.read(min(length, MOST_HEADER))
    except OSError as error:
        raise StoreError(f"{path} cannot be opened ({error.strerror}); check the path.") from error
    if len(text) != length or crc32c(text) != crc:
        raise StoreError(f"The header of {path} is damaged; copy it again, or pack the model again.")
    try:
        return _parse(json.loads(text), PREAMBLE.size + length, whole)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"The header of {path} makes no sense ({error}); pack the model again.") from error
    except StoreError as error:
        raise StoreError(f"{path} cannot be read. {error}") from error


def _parse(values: dict[str, Any], first: int, size: int) -> PackedHeader:
    layout = BlockLayout.from_json(values["layout"])
    layers, experts, zstd = int(values["layers"]), int(values["experts"]), bool(values["zstd"])
    if min(layers, experts) < 1 or len(values["blocks"]) != layers * experts:
        raise ValueError(f"{len(values['blocks'])} blocks for {layers} x {experts} experts")
    index: list[tuple[int, int, int]] = []
    reached = first
    for i, (layer, expert, offset, length, crc) in enumerate(values["blocks"]):
        good = (layer, expert) == divmod(i, experts) and offset % PAGE == 0 and reached <= offset
        fits = 0 < length <= size - offset and (zstd or length == layout.block_bytes)
        if not (good and fits and 0 <= crc < 1 << 32):
            raise ValueError(f"block {i} is at {offset}, {length} bytes")
        reached = offset + length
        index.append((offset, length, crc))
    return PackedHeader(
        model_id=str(values["model_id"]),
        revision=str(values["revision"]),
        family=str(values["family"]),
        layers=layers,
        experts=experts,
        layout=layout,
        zstd=zstd,
        index=tuple(index),
    )


def largest_size(header: PackedHeader, bound: int) -> int:
    """Bytes that a file takes at most if no block is longer than ``bound``."""
    count = header.layers * header.experts
    return _reserved(header, bound) + count * aligned(bound, PAGE)


def _reserved(header: PackedHeader, bound: int) -> int:
    """Where the blocks begin: behind the longest header there can be."""
    count = header.layers * header.experts
    text = len(json.dumps(header.to_json())) + count * (len(str(bound)) + 64)
    return aligned(PREAMBLE.size + text, PAGE)


class PackedWriter:
    """Writes a packed file, visible under its name only when it is whole.

    Use it in a ``with``; blocks come in running order, then :meth:`finish`. Left without that, it removes
    what it wrote. What a killed process left is written over by the next one; two at a time are refused.

    Args:
        path: of the file.
        header: without an index.
        bound: no block is longer than so many bytes.

    Raises:
        ConfigError: if the file exists.
        StoreError: if another process writes it, the folder cannot be written, or the disk has no room.
    """

    def __init__(self, path: Path, header: PackedHeader, bound: int) -> None:
        self.path, self.header = path, header
        self._partial = path.with_name(path.name + SUFFIX)
        self._index: list[tuple[int, int, int]] = []
        self._at = _reserved(header, bound)
        if path.exists():
            raise ConfigError(f"{path} exists already; delete it or choose another out=.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _locked(self._partial)
            self._file.truncate(0)
            free = shutil.disk_usage(path.parent).free
        except OSError as error:
            raise StoreError(f"{path} cannot be written ({error.strerror}); choose another out=.") from error
        needed = largest_size(header, bound)
        if needed > free:
            self._remove()
            most = "at most " if header.zstd else ""
            raise StoreError(
                f"{path} needs {most}{_size(needed)} and its disk has {_size(free)} free; choose another out="
                " or a smaller codec."
            )

    def add(self, data: Any) -> None:
        """Appends the next expert's block.

        Raises:
            StoreError: if the disk is full or fails.
        """
        view = memoryview(data).cast("B")
        self._write(self._at, view)
        self._index.append((self._at, len(view), crc32c(view)))
        self._at = aligned(self._at + len(view), PAGE)

    def finish(self) -> int:
        """Writes the header and gives the file its name; returns its length in bytes.

        Raises:
            StoreError: if blocks are missing, or the disk is full or fails.
        """
        header = self.header
        if len(self._index) != header.layers * header.experts:
            raise StoreError(
                f"{self.path} got {len(self._index)} blocks of {header.layers * header.experts}."
            )
        values = PackedHeader(**{**vars(header), "index": tuple(self._index)}).to_json()
        room = self._index[0][0] - PREAMBLE.size
        text = json.dumps(values).encode().ljust(room)
        assert len(text) == room, "the reserved header was too short"
        start = PREAMBLE.pack(MAGIC, VERSION, crc32c(text), len(text), self._at)
        self._write(0, memoryview(start + text))
        try:
            self._file.truncate(self._at)
            os.fsync(self._file.fileno())
            os.replace(self._partial, self.path)
            self._file.close()
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StoreError(self._failed(error)) from error
        return self._at

    def _write(self, offset: int, view: memoryview) -> None:
        try:
            while view:
                done = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise StoreError(self._failed(error)) from error

    def _failed(self, error: OSError) -> str:
        return f"Writing {self.path} failed ({error.strerror}); free some space or choose another out=."

    def _remove(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            self._remove()


def _size(number: int) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _locked(path: Path) -> BinaryIO:
    """Opens a file that no other process is writing."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StoreError(
                f"Another process is writing {path}; wait for it or choose another out=."
            ) from None
        try:
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()  # the other process renamed it between opening and locking
