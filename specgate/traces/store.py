"""Traces on disk: a writer that survives being killed, and a reader that maps everything and believes
nothing.

Letters: N flat tokens, S sequences, L MoE layers, K experts per token, D hidden size.

A trace is a directory::

    plan.json             what is being collected; written first, and a resumed collection must bring the same
    shards/00000.safetensors ...  every stack's arrays, keys ``{stack}/{field}``; visible only when whole
    routers.safetensors   the host's routers (absent for imported traces)
    trace.json            the header; written last, so that its presence says that the trace is complete

The same content gives the same bytes, however often the collection was killed and started again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from specgate.errors import TraceError
from specgate.traces.arrays import StackArrays, map_safetensors
from specgate.traces.reader import HEADER, PLAN, ROUTERS, SHARDS, SequenceTable, StackView, TraceReader
from specgate.traces.schema import FileInfo, ShardInfo, TraceHeader, canonical_json, sha256_hex

__all__ = ["SequenceTable", "StackArrays", "StackView", "TraceReader", "TraceWriter", "write_atomic"]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either absent (or its old self) or whole, even if the machine stops now."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class TraceWriter:
    """Writes a trace shard by shard; construct it again with the same plan to resume after a kill.

    One writer at a time may work on a directory.

    Args:
        path: the trace's directory; made if absent.
        header: everything that is known before the first shard (no ``shards``, no ``files``).
        plan: plain JSON that determines the content (models, texts, seed, ...); resuming with another one is
            refused.
        num_shards: how many shards the finished trace will have.

    Raises:
        TraceError: if the directory holds another plan's collection or files that are not a trace.
    """

    def __init__(self, path: str | Path, header: TraceHeader, plan: dict[str, Any], num_shards: int) -> None:
        self.path = Path(path)
        self.header = header.with_(shards=[], files={})
        self.num_shards = num_shards
        if num_shards < 1:
            raise TraceError(f"A trace needs at least 1 shard, not {num_shards}.")
        self._plan = canonical_json({"num_shards": num_shards, "plan": plan}).encode()
        self._plan_hash = sha256_hex(self._plan)
        (self.path / SHARDS).mkdir(parents=True, exist_ok=True)
        self._agree_with_plan(plan)
        for stale in [*self.path.glob("*.tmp"), *(self.path / SHARDS).glob("*.tmp")]:
            stale.unlink()
        self._done: dict[int, tuple[ShardInfo, dict[str, Any]]] = {}
        for i in range(num_shards):
            if (known := self._inspect(i)) is not None:
                self._done[i] = known

    def _agree_with_plan(self, plan: dict[str, Any]) -> None:
        file = self.path / PLAN
        if not file.exists():
            if (self.path / HEADER).exists() or any((self.path / SHARDS).glob("*.safetensors")):
                raise TraceError(
                    f"{self.path} holds shards but no {PLAN}; delete the directory or choose another one."
                )
            write_atomic(file, self._plan)
            return
        found = file.read_bytes()
        if found == self._plan:
            return
        try:
            old = json.loads(found)
            old_plan = {**old["plan"], "num_shards": old["num_shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"{file} is damaged ({error}); delete {self.path} and collect again.") from error
        new_plan = {**json.loads(canonical_json(plan)), "num_shards": self.num_shards}
        changed = sorted(k for k in old_plan.keys() | new_plan.keys() if old_plan.get(k) != new_plan.get(k))
        shown = ", ".join(f"{k}: {_short(old_plan.get(k))} -> {_short(new_plan.get(k))}" for k in changed[:4])
        raise TraceError(
            f"{self.path} was started with another plan ({shown or 'its file was edited'}); choose another "
            "output directory, or delete this one to start afresh."
        )

    def _file(self, shard: int) -> Path:
        return self.path / SHARDS / f"{shard:05d}.safetensors"

    def _inspect(self, shard: int) -> tuple[ShardInfo, dict[str, Any]] | None:
        """Read an existing shard whole: what it holds, or None if it is absent, damaged or of another
        plan.
        """
        path = self._file(shard)
        if not path.exists():
            return None
        try:
            arrays, metadata = map_safetensors(path)
            if metadata["plan"] != self._plan_hash or metadata["payload"] != _payload_digest(arrays):
                return None
            meta = metadata["meta"]
        except (TraceError, KeyError):
            return None
        data = path.read_bytes()
        return self._describe(shard, arrays, data), meta

    def _describe(self, shard: int, arrays: dict[str, Any], data: bytes) -> ShardInfo:
        stacks = self.header.stacks
        return ShardInfo(
            file=f"{SHARDS}/{self._file(shard).name}",
            sha256=sha256_hex(data),
            bytes=len(data),
            tokens={s: int(arrays[f"{s}/token_ids"].shape[0]) for s in stacks},
            sequences={s: int(arrays[f"{s}/seq_document"].shape[0]) for s in stacks},
        )

    def done(self, shard: int) -> bool:
        """Whether this shard is there, whole and of this plan. A damaged one counts as absent."""
        return shard in self._done

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do: every shard is there and so is the header."""
        return len(self._done) == self.num_shards and (self.path / HEADER).exists()

    def shard_meta(self, shard: int) -> dict[str, Any]:
        """The ``shard_meta`` that :meth:`write_shard` was given, also when an earlier process wrote the
        shard.
        """
        if shard not in self._done:
            raise TraceError(f"Shard {shard} of {self.path} is not written yet.")
        return dict(self._done[shard][1])

    def write_shard(
        self, shard: int, stacks: dict[str, StackArrays], shard_meta: dict[str, Any] | None = None
    ) -> ShardInfo:
        """Write (or replace) one shard; when this returns, it survives a kill and a power cut.

        Args:
            shard: number of the shard, 0 to ``num_shards - 1``.
            stacks: the arrays of every stack in the header (empty arrays where a stack has nothing here).
            shard_meta: plain JSON to keep with the shard, such as counts to add up at the end.

        Raises:
            TraceError: if the number, the stacks or the arrays contradict the header.
        """
        if not 0 <= shard < self.num_shards:
            raise TraceError(f"Shard {shard} is outside of the plan's 0 to {self.num_shards - 1}.")
        if set(stacks) != set(self.header.stacks):
            raise TraceError(
                f"Shard {shard} has stacks {sorted(stacks)}, the header {sorted(self.header.stacks)}."
            )
        arrays = {
            f"{name}/{key}": value
            for name, a in sorted(stacks.items())
            for key, value in a.checked(name, self.header.stacks[name], self.header).items()
        }
        meta = json.loads(canonical_json(shard_meta or {}))
        note = {"meta": meta, "payload": _payload_digest(arrays), "plan": self._plan_hash, "shard": shard}
        data = safetensors.numpy.save(arrays, metadata={"specgate": json.dumps(note, sort_keys=True)})
        (self.path / HEADER).unlink(missing_ok=True)  # while a shard changes, the trace is not complete
        write_atomic(self._file(shard), data)
        info = self._describe(shard, arrays, data)
        self._done[shard] = (info, meta)
        return info

    def finish(
        self,
        routing_control: dict[str, Any] | None = None,
        routers: dict[str, Tensor] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> TraceHeader:
        """Write the routers and, last, the header: from here on the trace is complete.

        Args:
            routing_control: see :class:`TraceHeader`.
            routers: ``{stack}.{l}.norm_weight [D]``, ``{stack}.{l}.router_weight [E, D]``, optionally
                ``.router_bias [E]`` and ``.correction_bias [E]``; None where the routers are not known.
            extra: added to the header's ``extra`` (nothing that differs between runs, such as times, belongs
                here).

        Raises:
            TraceError: if a shard is still missing or a router's shape contradicts its stack.
        """
        missing = [i for i in range(self.num_shards) if i not in self._done]
        if missing:
            raise TraceError(
                f"{self.path} lacks {len(missing)} of {self.num_shards} shards (first: {missing[0]}); write "
                "them first."
            )
        files = {PLAN: FileInfo(self._plan_hash, len(self._plan))}
        if routers is not None:
            check_routers(routers, self.header)
            data = safetensors.torch.save(
                {k: v.detach().cpu().contiguous() for k, v in sorted(routers.items())}
            )
            write_atomic(self.path / ROUTERS, data)
            files[ROUTERS] = FileInfo(sha256_hex(data), len(data))
        else:
            (self.path / ROUTERS).unlink(missing_ok=True)
        header = self.header.with_(
            shards=[self._done[i][0] for i in range(self.num_shards)],
            files=files,
            routing_control=routing_control if routing_control is not None else self.header.routing_control,
            extra={**self.header.extra, **(extra or {})},
        )
        write_atomic(self.path / HEADER, header.to_json().encode())
        return header


def check_routers(routers: dict[str, Tensor], header: TraceHeader) -> None:
    """Raise TraceError unless every tensor is a known part of a known layer's router, of the right shape."""
    for key, value in routers.items():
        parts = key.split(".")
        stack, layer, part = parts if len(parts) == 3 else ("", "", "")
        info = header.stacks.get(stack)
        if info is None or not layer.isdigit() or int(layer) >= info.layers:
            raise TraceError(
                f"Router tensor {key!r} must be named {{stack}}.{{layer}}.{{part}} of a layer of the trace."
            )
        D = info.hidden_size or 0
        shapes = {
            "norm_weight": (D,),
            "router_weight": (info.experts, D),
            "router_bias": (info.experts,),
            "correction_bias": (info.experts,),
        }
        if part not in shapes or tuple(value.shape) != shapes[part]:
            raise TraceError(
                f"Router tensor {key!r} of shape {list(value.shape)} is not one of {shapes} of its stack."
            )


def _payload_digest(arrays: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of a shard's arrays, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        value = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {value.dtype.str} {value.shape};".encode())
        digest.update(value.reshape(-1).view(np.uint8).data if value.size else b"")
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
