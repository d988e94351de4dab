"""The arrays of one stack in one shard, their checks, and the byte layout that holds them.

Letters: N flat tokens of a shard, S sequences, L MoE layers, K experts per token, D hidden size,
h as in ``Lh`` the layers whose hidden states are kept.

A shard is a safetensors file. It is written by the safetensors library and read by :func:`map_safetensors`,
which maps each tensor into memory instead of reading it, so that opening a trace of any size costs nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from specgate.errors import TraceError
from specgate.traces.schema import StackInfo, TraceHeader, expert_dtype

Array = np.ndarray[Any, np.dtype[Any]]

TOKEN_FIELDS = ("experts", "weights", "token_ids", "positions", "dropped", "hidden", "hidden_scale")
SEQUENCE_FIELDS = ("seq_offsets", "seq_document", "seq_phase")
FP16_MAX = 65504.0

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}


@dataclass
class StackArrays:
    """What one shard holds of one stack. :meth:`checked` casts and validates.

    Shapes:
        experts: ``[N, L, K]`` ids below E, distinct within a token and layer, in rank order (descending
            weight).
        weights: ``[N, L, K]`` stored as fp16, or None where the stack has no weights.
        token_ids: ``[N]`` stored as int32.
        positions: ``[N]`` stored as int32, absolute position in the model's context.
        seq_offsets: ``[S + 1]`` int64, sequence s is tokens ``seq_offsets[s]`` to ``seq_offsets[s + 1]``,
            never empty.
        seq_document: ``[S]`` index into the header's documents.
        seq_phase: ``[S]`` 0 for prefill, 1 for decode.
        dropped: ``[N, L]`` True where Switch's capacity dropped the token, or None.
        hidden: ``[N, Lh, D]`` fp16 or int8 residual stream entering each MoE layer's norm, or None.
        hidden_scale: ``[N, Lh]`` fp16 with int8 hidden states (x = q * scale), or None.
    """

    experts: Array
    weights: Array | None
    token_ids: Array
    positions: Array
    seq_offsets: Array
    seq_document: Array
    seq_phase: Array
    dropped: Array | None = None
    hidden: Array | None = None
    hidden_scale: Array | None = None

    @property
    def tokens(self) -> int:
        """Tokens in these arrays (N)."""
        return int(self.experts.shape[0])

    @property
    def sequences(self) -> int:
        """Sequences in these arrays (S)."""
        return int(self.seq_document.shape[0])

    def checked(self, name: str, info: StackInfo, header: TraceHeader) -> dict[str, Array]:
        """The arrays by field name, cast to the stored types and contiguous.

        Raises:
            TraceError: if a shape, a range or the presence of a field contradicts the header.
        """
        n, s = self.experts.shape[0] if self.experts.ndim else 0, self.seq_document.shape[0]
        kept = len(info.hidden_layers or [])
        hidden_type = np.dtype(np.int8) if info.hidden_dtype == "int8" else np.dtype(np.float16)
        token_layers, per_token = (n, info.layers, info.top_k), (n,)
        wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any], bool]] = {
            "experts": (token_layers, expert_dtype(info.experts), True),
            "weights": (token_layers, np.dtype(np.float16), info.has_weights),
            "token_ids": (per_token, np.dtype(np.int32), True),
            "positions": (per_token, np.dtype(np.int32), True),
            "dropped": ((n, info.layers), np.dtype(np.uint8), info.has_dropped),
            "hidden": ((n, kept, info.hidden_size or 0), hidden_type, info.hidden_dtype != "none"),
            "hidden_scale": ((n, kept), np.dtype(np.float16), info.hidden_dtype == "int8"),
            "seq_offsets": ((s + 1,), np.dtype(np.int64), True),
            "seq_document": ((s,), np.dtype(np.int32), True),
            "seq_phase": ((s,), np.dtype(np.uint8), True),
        }
        out: dict[str, Array] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            shape, dtype, present = wanted[f.name]
            what = f"{name}/{f.name}"
            if (value is not None) != present:
                state = (
                    "is missing but the header announces it" if present else "is given but not in the header"
                )
                raise TraceError(
                    f"Array {what} {state}; make the StackInfo of {name!r} agree with the arrays."
                )
            if value is None:
                continue
            value = np.asarray(value)
            if value.shape != shape:
                raise TraceError(
                    f"Array {what} has shape {list(value.shape)} but the trace needs {list(shape)}."
                )
            out[f.name] = _cast(value, dtype, what)
        _check_ranges(out, name, info, header, n)
        return out


def _cast(value: Array, dtype: np.dtype[Any], what: str) -> Array:
    """``value`` as ``dtype``, refusing to wrap an integer around or to overflow fp16."""
    if dtype.kind == "f":
        if value.dtype.kind != "f":
            raise TraceError(f"Array {what} holds {value.dtype} but must hold floating-point numbers.")
        with np.errstate(over="ignore", invalid="ignore"):
            cast = value.astype(dtype, copy=False)
        if not np.isfinite(cast).all():
            raise TraceError(
                f"Array {what} holds a value that fp16 cannot (infinite, NaN or beyond {FP16_MAX:.0f}); "
                "for hidden states choose hidden=int8."
            )
        return np.ascontiguousarray(cast)
    if value.dtype.kind not in "iub":
        raise TraceError(f"Array {what} holds {value.dtype} but must hold integers.")
    if value.size and value.dtype != dtype:
        limits, low, high = np.iinfo(dtype), int(value.min()), int(value.max())
        if low < limits.min or high > limits.max:
            raise TraceError(
                f"Array {what} holds values {low} to {high}, outside of {limits.min} to {limits.max}."
            )
    return np.ascontiguousarray(value.astype(dtype, copy=False))


def _check_ranges(a: dict[str, Array], name: str, info: StackInfo, header: TraceHeader, tokens: int) -> None:
    """Raise TraceError at ids, offsets, documents or phases that the header does not know."""
    check_experts(a["experts"], info.experts, name)
    ids = a["token_ids"]
    if tokens and not 0 <= int(ids.min()) <= int(ids.max()) < header.vocab_size:
        raise TraceError(
            f"Stack {name!r} has token ids {ids.min()} to {ids.max()} but vocab_size is {header.vocab_size}."
        )
    offsets = a["seq_offsets"]
    if offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) <= 0).any():
        raise TraceError(
            f"Stack {name!r} has seq_offsets that do not cut {tokens} tokens into non-empty sequences; they "
            f"must start at 0, ascend and end at {tokens}."
        )
    documents, phases = a["seq_document"], a["seq_phase"]
    if documents.size and not 0 <= int(documents.min()) <= int(documents.max()) < len(header.documents):
        raise TraceError(
            f"Stack {name!r} has seq_document {documents.min()} to {documents.max()} but the header lists "
            f"{len(header.documents)} documents."
        )
    known = [("prefill", "decode").index(p) for p in header.phases]
    if not np.isin(phases, known).all():
        raise TraceError(
            f"Stack {name!r} has a sequence whose phase is not among the header's phases {header.phases}."
        )


def check_experts(experts_NLK: Array, experts: int, name: str) -> None:
    """Raise TraceError at the first expert id outside of 0..E-1, or named twice for one token and layer."""
    if not experts_NLK.size:
        return
    low, high = int(experts_NLK.min()), int(experts_NLK.max())
    if low < 0 or high >= experts:
        t, layer, k = (int(i[0]) for i in np.nonzero((experts_NLK < 0) | (experts_NLK >= experts)))
        raise TraceError(
            f"Stack {name!r} names expert {experts_NLK[t, layer, k]} at token {t}, layer {layer}, but has "
            f"experts 0 to {experts - 1}; raise the number of experts or check the layout [T, L, K]."
        )
    if experts_NLK.shape[2] > 1:
        ranked = np.sort(experts_NLK, axis=2)
        twice = (ranked[..., 1:] == ranked[..., :-1]).any(2)
        if twice.any():
            t, layer = (int(i[0]) for i in np.nonzero(twice))
            raise TraceError(
                f"Stack {name!r} names one expert twice for token {t}, layer {layer} "
                f"({experts_NLK[t, layer].tolist()}); the K experts of a token must differ (drop padded "
                "rows)."
            )


def quantise_int8(hidden_NLD: Array) -> tuple[Array, Array]:
    """Hidden states as int8 with one fp16 scale per token and layer: x is close to q * scale.

    Shapes:
        hidden_NLD: ``[N, Lh, D]`` floating point, any magnitude up to 8.3e6.
        output: ``[N, Lh, D]`` int8 and ``[N, Lh]`` fp16.

    The scale is rounded to fp16 before the division, so dequantising errs by at most ``scale / 2`` per value
    wherever rounding the scale did not clip the largest one (and by 0.1 % of that one otherwise).
    """
    x = np.asarray(hidden_NLD, dtype=np.float32)
    scale_NL = (np.abs(x).max(axis=-1, initial=0.0) / 127.0).astype(np.float16)
    divisor = np.where(scale_NL > 0, scale_NL, np.float16(1)).astype(np.float32)[..., None]
    q = np.clip(np.rint(x / divisor), -127, 127).astype(np.int8)
    return q, scale_NL


def map_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Map every tensor of a safetensors file into memory (read-only), without reading them.

    Returns:
        the arrays by name, and the JSON value under the metadata key ``specgate`` (empty if there is none).

    Raises:
        TraceError: if the file is missing, truncated or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > size - 8:
                raise TraceError(
                    f"{path} is truncated ({size} bytes); delete it and run the collection again to resume."
                )
            head = json.loads(f.read(length))
        metadata = json.loads(head.pop("__metadata__", {}).get("specgate", "{}"))
        arrays: dict[str, Array] = {}
        mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        for key, entry in head.items():
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
                raise ValueError(f"{key} spans {end - begin} bytes")
            if 8 + length + end > size:
                raise TraceError(
                    f"{path} is truncated ({size} bytes, {8 + length + end} expected); delete it and run the "
                    "collection again to resume."
                )
            arrays[key] = mapped[8 + length + begin : 8 + length + end].view(dtype).reshape(shape)
        return arrays, metadata
    except FileNotFoundError as error:
        raise TraceError(f"{path} is missing; run the collection again to resume.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(
            f"{path} is not a readable shard ({error}); delete it and run the collection again to resume."
        ) from error
