"""Reading a trace: every array of every shard mapped into memory and addressed as if it were one.

Letters: N flat tokens of a stack over all shards, S sequences, L MoE layers, E experts, K experts per token,
D hidden.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from specgate.errors import TraceError
from specgate.traces.arrays import SEQUENCE_FIELDS, TOKEN_FIELDS, Array, map_safetensors
from specgate.traces.schema import SPLITS, StackInfo, TraceHeader, split_of

HEADER, PLAN, ROUTERS, SHARDS = "trace.json", "plan.json", "routers.safetensors", "shards"
RATIOS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class SequenceTable:
    """All sequences of a stack, in the order of the shards.

    Shapes (all ``[S]``):
        start_S: int64 first token, counted over the whole stack.
        length_S: int64 tokens.
        document_S: int32 index into ``header.documents``.
        domain_S: int32 index into ``header.domains``.
        phase_S: uint8, 0 prefill and 1 decode.
        split_S: uint8 index into ``SPLITS`` (train, validation, test).
    """

    start_S: Array
    length_S: Array
    document_S: Array
    domain_S: Array
    phase_S: Array
    split_S: Array

    def __len__(self) -> int:
        return len(self.start_S)


class StackView:
    """One stack of a trace, all shards joined; arrays are mapped, so only what is gathered is read.

    Attributes:
        name, info: the stack's name and description.
        num_tokens: N over all shards.
        sequences: where sequences start and what they are.
    """

    def __init__(self, name: str, header: TraceHeader, shards: list[dict[str, Array]]) -> None:
        self.name, self.info, self._shards = name, header.stacks[name], shards
        counts = [s["token_ids"].shape[0] for s in shards]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # [shards + 1]
        self.num_tokens = int(self._first[-1])
        self.sequences = self._table(header)

    def _table(self, header: TraceHeader) -> SequenceTable:
        offsets = [s["seq_offsets"] for s in self._shards]
        start = np.concatenate([o[:-1] + first for o, first in zip(offsets, self._first[:-1], strict=True)])
        document, phase = (
            np.concatenate([s[k] for s in self._shards]) for k in ("seq_document", "seq_phase")
        )
        domain_of = {name: i for i, name in enumerate(header.domains)}
        domains = np.array([domain_of[d.domain] for d in header.documents], np.int32)
        splits = np.array(
            [SPLITS.index(d.split or split_of(d.name, RATIOS)) for d in header.documents], np.uint8
        )
        return SequenceTable(
            start_S=start,
            length_S=np.concatenate([np.diff(o) for o in offsets]),
            document_S=document,
            domain_S=domains[document],
            phase_S=phase,
            split_S=splits[document],
        )

    @property
    def fields(self) -> list[str]:
        """Names of the per-token arrays that this stack has, for :meth:`gather` (``hidden_scale`` left
        out).
        """
        return [f for f in TOKEN_FIELDS if f in self._shards[0] and f != "hidden_scale"]

    def gather(self, field: str, token_index: Array) -> Array:
        """Rows of a per-token array at any tokens of the stack, in one vectorised read per shard.

        Args:
            field: one of :attr:`fields`.
            token_index: integer array of any shape, tokens counted over the whole stack, below
                ``num_tokens``.

        Returns:
            array of shape ``token_index.shape + row``, in the stored type (hidden states stored as int8 come
            dequantised, as float32).

        Raises:
            TraceError: if the trace does not record the field.
            IndexError: if an index is out of range.
        """
        if field not in self.fields:
            raise TraceError(
                f"Stack {self.name!r} of this trace does not record {field!r} (it has "
                f"{', '.join(self.fields)}); collect it again with that field, or use a predictor that does "
                "not need it."
            )
        index = np.asarray(token_index, dtype=np.int64)
        flat = index.reshape(-1)
        if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_tokens:
            raise IndexError(f"tokens {flat.min()} to {flat.max()} of {self.num_tokens}")
        shard_of = np.searchsorted(self._first, flat, side="right") - 1
        touched = np.unique(shard_of)
        if len(touched) == 1:
            rows = self._take(int(touched[0]), field, flat)
        else:
            row = self._shards[0][field].shape[1:]
            kind = np.dtype(np.float32) if self._quantised(field) else self._shards[0][field].dtype
            rows = np.empty((flat.size, *row), dtype=kind)
            for s in touched.tolist():
                here = np.nonzero(shard_of == s)[0]
                rows[here] = self._take(s, field, flat[here])
        return rows.reshape((*index.shape, *rows.shape[1:]))

    def _quantised(self, field: str) -> bool:
        return field == "hidden" and self.info.hidden_dtype == "int8"

    def _take(self, shard: int, field: str, flat: Array) -> Array:
        local = flat - self._first[shard]
        rows = np.take(self._shards[shard][field], local, axis=0)
        if not self._quantised(field):
            return rows
        scale = np.take(self._shards[shard]["hidden_scale"], local, axis=0).astype(np.float32)
        return rows.astype(np.float32) * scale[..., None]

    def shard_arrays(self, shard: int) -> dict[str, Array]:
        """The mapped arrays of one shard by field name, as stored (for exporters)."""
        return self._shards[shard]


class TraceReader:
    """Opens a complete trace.

    Args:
        path: the trace's directory.
        verify: read every file once and compare its SHA-256 with the header (about 1 s per GB); without it
            only
            presence and sizes are checked.

    Raises:
        TraceError: if the trace is absent, incomplete, truncated or differs from its header in any byte.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        listed = [(name, f.bytes, f.sha256) for name, f in self.header.files.items()]
        listed += [(s.file, s.bytes, s.sha256) for s in self.header.shards]
        for name, size, sha256 in listed:
            check_file(self.path / name, size, sha256 if verify else None)
        self._views: dict[str, StackView] = {}
        self._shards: list[dict[str, Array]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "header": self.header,
            "_views": {},
            "_shards": None,
        }  # workers map files anew

    def stack(self, name: str) -> StackView:
        """The stack called ``name``.

        Raises:
            TraceError: if the trace has no such stack.
        """
        if name not in self.header.stacks:
            raise TraceError(
                f"{self.path} has no stack {name!r}; it has {', '.join(sorted(self.header.stacks))} "
                "(set data.stack)."
            )
        if self._shards is None:
            self._shards = [map_safetensors(self.path / s.file)[0] for s in self.header.shards]
        if name not in self._views:
            parts = [self._of_stack(i, name) for i in range(len(self._shards))]
            self._views[name] = StackView(name, self.header, parts)
        return self._views[name]

    def _of_stack(self, shard: int, name: str) -> dict[str, Array]:
        assert self._shards is not None
        info = self.header.shards[shard]
        arrays = {k: self._shards[shard].get(f"{name}/{k}") for k in (*TOKEN_FIELDS, *SEQUENCE_FIELDS)}
        found = {k: v for k, v in arrays.items() if v is not None}
        counted = (info.tokens[name], info.sequences[name])
        if {"token_ids", "seq_document", "experts"} - set(found) or counted != (
            len(found["token_ids"]),
            len(found["seq_document"]),
        ):
            raise TraceError(
                f"{self.path / info.file} does not hold what {HEADER} says; delete it and run the collection "
                "again to resume."
            )
        return found

    def shard_meta(self, shard: int) -> dict[str, Any]:
        """The JSON that the collection kept with a shard."""
        metadata = map_safetensors(self.path / self.header.shards[shard].file)[1]
        return dict(metadata.get("meta", {}))

    def info(self, stack: str) -> StackInfo:
        """Description of a stack (also checks that it exists)."""
        return self.stack(stack).info

    def routers(self, stack: str) -> dict[int, dict[str, Tensor]] | None:
        """The host's routers: MoE layer -> part (``norm_weight``, ``router_weight``, ...) -> tensor; None if
        unknown.
        """
        if ROUTERS not in self.header.files:
            return None
        out: dict[int, dict[str, Tensor]] = {}
        for key, value in sorted(safetensors.torch.load_file(self.path / ROUTERS).items()):
            name, layer, part = key.split(".")
            if name == stack:
                out.setdefault(int(layer), {})[part] = value
        return dict(sorted(out.items())) or None


def read_header(path: Path) -> TraceHeader:
    """The header of the trace in directory ``path``.

    Raises:
        TraceError: if there is no complete trace there.
    """
    file = path / HEADER
    if not path.is_dir():
        raise TraceError(f"There is no trace at {path}; collect one (python collect.py) or correct the path.")
    if not file.exists():
        if not (path / PLAN).exists():
            raise TraceError(f"{path} is not a trace (no {HEADER}); collect one there or correct the path.")
        shards = len(list((path / SHARDS).glob("*.safetensors")))
        raise TraceError(
            f"{path} is an incomplete trace ({shards} shards, no {HEADER} yet); re-run the collection to "
            "resume it."
        )
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{file} is damaged ({error}); delete it and run the collection again to resume."
        ) from error
    return TraceHeader.from_json(text, str(file))


def check_file(path: Path, size: int, sha256: str | None) -> None:
    """Raise TraceError unless the file exists, has ``size`` bytes and (if given) that SHA-256."""
    remedy = "delete it and run the collection again to resume"
    if not path.exists():
        raise TraceError(f"{path} is missing; run the collection again to resume.")
    found = path.stat().st_size
    if found != size:
        raise TraceError(
            f"{path} is damaged ({found} bytes, {size} expected: truncated or overwritten); {remedy}."
        )
    if sha256 is None:
        return
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != sha256:
        raise TraceError(
            f"{path} is corrupted (SHA-256 {digest[:12]}..., expected {sha256[:12]}...); {remedy}."
        )
