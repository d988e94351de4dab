"""Small traces for tests: random but well-formed, and made without the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specgate.traces.arrays import quantise_int8
from specgate.traces.schema import Document, StackInfo, TraceHeader
from specgate.traces.store import StackArrays, TraceWriter


def stack_info(
    L: int = 3,
    E: int = 8,
    K: int = 2,
    D: int | None = 4,
    hidden: str = "fp16",
    dropped: bool = False,
    **more: Any,
) -> StackInfo:
    return StackInfo(
        layers=L,
        experts=E,
        top_k=K,
        hidden_size=D,
        layer_map=[f"model.layers.{i}.mlp" for i in range(L)],
        hidden_layers=None if hidden == "none" else list(range(L)),
        hidden_dtype=hidden,
        has_dropped=dropped,
        score_semantics="softmax",
        **more,
    )


def header_for(
    stacks: dict[str, StackInfo], documents: int = 6, phases: Sequence[str] = ("prefill",), **more: Any
) -> TraceHeader:
    return TraceHeader(
        model_id="tests/random",
        family="olmoe",
        stacks=stacks,
        vocab_size=100,
        phases=list(phases),
        documents=[Document(f"doc-{i}", f"domain-{i % 3}") for i in range(documents)],
        **more,
    )


def arrays_for(
    info: StackInfo, lengths: Sequence[int], seed: int, documents: int = 6, phases: Sequence[int] = (0,)
) -> StackArrays:
    """Random arrays of sequences of these lengths."""
    rng = np.random.default_rng(seed)
    n, layers, k = int(sum(lengths)), info.layers, info.top_k
    experts = np.argsort(rng.random((n, layers, info.experts)), axis=2)[:, :, :k]
    weights = -np.sort(-rng.random((n, layers, k)), axis=2).astype(np.float16)
    hidden: np.ndarray | None = None
    scale: np.ndarray | None = None
    if info.hidden_dtype != "none":
        kept = len(info.hidden_layers or [])
        hidden = rng.standard_normal((n, kept, info.hidden_size or 0)).astype(np.float16)
        if info.hidden_dtype == "int8":
            hidden, scale = quantise_int8(hidden)
    return StackArrays(
        experts=experts,
        weights=weights if info.has_weights else None,
        token_ids=rng.integers(0, 100, n),
        positions=np.concatenate([np.arange(m) for m in lengths]) if n else np.zeros(0, np.int64),
        seq_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        seq_document=rng.integers(0, documents, len(lengths)),
        seq_phase=np.asarray([phases[i % len(phases)] for i in range(len(lengths))], np.uint8),
        dropped=rng.random((n, layers)) < 0.3 if info.has_dropped else None,
        hidden=hidden,
        hidden_scale=scale,
    )


def routers_for(stacks: dict[str, StackInfo], seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, info in sorted(stacks.items()):
        for i in range(info.layers):
            out[f"{name}.{i}.norm_weight"] = torch.rand(info.hidden_size or 0, generator=g)
            out[f"{name}.{i}.router_weight"] = torch.randn(info.experts, info.hidden_size or 0, generator=g)
    return out


def write_trace(
    path: Path,
    stacks: dict[str, StackInfo],
    shards: Sequence[Sequence[int]] = ((5, 3), (7,), (2, 2, 4)),
    header: TraceHeader | None = None,
    phases: Sequence[int] = (0,),
    routers: bool = True,
    seed: int = 0,
) -> dict[str, list[StackArrays]]:
    """Write a trace whose shard i holds, in every stack, sequences of lengths ``shards[i]``; returns all."""
    names = ["prefill", "decode"]
    header = header or header_for(stacks, phases=[names[p] for p in sorted(set(phases))])
    writer = TraceWriter(path, header, {"seed": seed}, len(shards))
    content: dict[str, list[StackArrays]] = {s: [] for s in stacks}
    for i, lengths in enumerate(shards):
        for j, (name, info) in enumerate(stacks.items()):
            part = arrays_for(info, lengths, 1000 * seed + 10 * i + j, len(header.documents), phases)
            content[name].append(part)
        writer.write_shard(i, {s: content[s][i] for s in stacks}, {"count": i})
    with_routers = routers and all(s.hidden_size for s in stacks.values())
    writer.finish(routers=routers_for(stacks, seed) if with_routers else None)
    return content


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
