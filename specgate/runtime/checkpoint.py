"""A checkpoint's tensors as places in its safetensors files: found, checked, never loaded.

The format: 8 bytes with the header's length, the header as JSON (name -> dtype, shape, offsets), the tensors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from specgate.errors import CheckpointError
from specgate.moe.hosts import fingerprint, quiet_imports, readable_errors, resolve_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64,
    "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies.

    Attributes:
        file: position in the list of files.
        dtype: as safetensors writes it (``BF16``).
        shape: of the tensor.
        offset: bytes from the start of the file.
        length: bytes.
    """

    file: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model.

    Attributes:
        directory: where they are.
        model_id: bundled name, directory name or hub name, as ``specgate.moe.hosts.Host`` has it.
        config: transformers' configuration.
        paths: the safetensors files.
        tensors: name -> place.
        commit: on the hub; empty for local files.
    """

    directory: Path
    model_id: str
    config: Any
    paths: tuple[Path, ...]
    tensors: dict[str, TensorPlace]
    commit: str = ""

    @cached_property
    def revision(self) -> str:
        """Commit on the hub, or a hash of the local files."""
        return self.commit or fingerprint(self.directory)


def open_checkpoint(name_or_path: str, revision: str | None = None) -> Checkpoint:
    """Finds a model and reads the headers of its files, downloading it first if it is on the hub.

    Args:
        name_or_path: a bundled name, a directory, or a name on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: not found, no safetensors, a shard missing, truncated or damaged.
    """
    quiet_imports()
    import transformers

    found = resolve_model(name_or_path)
    directory = found if isinstance(found, Path) else _download(found, revision)
    with readable_errors(name_or_path):
        config = transformers.AutoConfig.from_pretrained(directory)
    paths = _files(directory)
    tensors: dict[str, TensorPlace] = {}
    for number, path in enumerate(paths):
        tensors |= read_header(path, number)
    if isinstance(found, Path):
        return Checkpoint(directory, found.name, config, tuple(paths), tensors)
    return Checkpoint(directory, found, config, tuple(paths), tensors, commit=directory.name)


def _download(name: str, revision: str | None) -> Path:
    """The folder of a snapshot, which is named after its commit."""
    import huggingface_hub

    with readable_errors(name):
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=["*.safetensors", "*.json"]
        )
    return Path(folder)


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, those of an index in the order of their names."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            paths = [directory / str(name) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(
                f"{index} is damaged ({error}); copy or download the model again."
            ) from error
        for path in paths:
            if not path.resolve().is_file() or path.parent != directory:
                raise CheckpointError(
                    f"The shard {path.name} that {index} names is missing; copy or download the model again."
                )
        return paths
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.bin.index.json")):
        raise CheckpointError(
            f"{directory} holds only .bin weights; load the model with transformers and save_pretrained it, "
            "which writes safetensors."
        )
    raise CheckpointError(
        f"{directory} holds no {SINGLE} and no {INDEX}; give a directory written by save_pretrained."
    )


def read_header(path: Path, number: int = 0) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file, checked against its size.

    Raises:
        CheckpointError: truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= LONGEST_HEADER:
                raise CheckpointError(f"{path} is not a safetensors file; copy or download it again.")
            if 8 + length > size:
                raise CheckpointError(_truncated(path, 8 + length, size))
            header = json.loads(f.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except ValueError as error:
        raise CheckpointError(f"The header of {path} is damaged; copy or download it again.") from error
    places: dict[str, TensorPlace] = {}
    reached = 8 + length
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(at) for at in entry["data_offsets"])
            shape = tuple(int(axis) for axis in entry["shape"])
            bits = BITS[entry["dtype"]] * math.prod(shape)
            if not 0 <= begin <= end or (end - begin) * 8 != bits or min(shape, default=0) < 0:
                raise ValueError(name)
            places[name] = TensorPlace(number, entry["dtype"], shape, 8 + length + begin, end - begin)
            reached = max(reached, 8 + length + end)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The header of {path} makes no sense; copy or download it again.") from error
    if reached > size:
        raise CheckpointError(_truncated(path, reached, size))
    return places


def _truncated(path: Path, needed: int, size: int) -> str:
    return (
        f"{path} is truncated: it has {size:,} bytes and its header promises {needed:,}; copy or download it "
        "again."
    )
