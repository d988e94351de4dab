"""Imported traces: routing that another program recorded, as plain arrays, made into a trace.

Letters: T tokens of one file or array, N tokens in all, S sequences, L MoE layers, E experts, K experts per
token, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from specgate import __version__
from specgate.errors import TraceError
from specgate.traces.arrays import Array, StackArrays, check_experts
from specgate.traces.reader import HEADER
from specgate.traces.schema import PHASES, Document, StackInfo, TraceHeader, split_of
from specgate.traces.store import TraceWriter

UNRANKED = "unranked"
DESCENDING = "as imported; experts in descending order of weight"


@dataclass
class RawRouting:
    """Routing as some program stored it; only ``experts`` is required.

    Shapes:
        experts: integer ``[T, L, K]``, or ``[S, T, L, K]`` for S sequences of equal length.
        weights: ``[T, L, K]``; without them the order of the K experts is taken to mean nothing.
        token_ids, positions: ``[T]``.
        sequence_ids: ``[T]``, or offsets: ``[S + 1]``; without both, all is one sequence.
        dropped: ``[T, L]``.
        hidden: ``[T, L, D]``.
        layers: ``[L]`` layer numbers or names in the host model.
    """

    experts: Array
    weights: Array | None = None
    token_ids: Array | None = None
    positions: Array | None = None
    sequence_ids: Array | None = None
    offsets: Array | None = None
    dropped: Array | None = None
    hidden: Array | None = None
    layers: Array | None = None

    def flat(self, where: str) -> RawRouting:
        """The same with tokens flattened, sequences contiguous, and sequence ids and positions set.

        Raises:
            TraceError: if shapes or types contradict each other; ``where`` names the source in the sentence.
        """
        e = np.asarray(self.experts)
        if e.dtype.kind not in "iu" or e.ndim not in (3, 4):
            raise TraceError(
                f"{where}: experts must be integers [T, L, K] or [S, T, L, K], not {e.dtype} "
                f"{list(e.shape)}; name the right array with --map experts=KEY."
            )
        lead = e.shape[:-2]
        layer = (e.shape[-2],)
        wanted = {
            "weights": (*lead, *e.shape[-2:]),
            "token_ids": lead,
            "positions": lead,
            "sequence_ids": lead,
            "dropped": (*lead, *layer),
            "hidden": (*lead, *layer),
            "layers": layer,
        }
        out: dict[str, Any] = {"experts": e}
        for name, shape in wanted.items():
            value = getattr(self, name)
            if value is None:
                continue
            value = np.asarray(value)
            if value.shape[: len(shape)] != shape or (name != "hidden" and value.ndim != len(shape)):
                raise TraceError(
                    f"{where}: {name} has shape {list(value.shape)} but experts {list(e.shape)} ask for "
                    f"{list(shape)}{' + [D]' if name == 'hidden' else ''}; every array needs the same tokens."
                )
            out[name] = value
        tokens = int(np.prod(lead))
        if self.offsets is not None:
            cuts = np.asarray(self.offsets, dtype=np.int64)
            if len(lead) == 2 or cuts.ndim != 1 or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != tokens:
                raise TraceError(
                    f"{where}: offsets must run from 0 to the {tokens} tokens of experts [T, L, K]."
                )
            out["sequence_ids"] = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
        elif len(lead) == 2:
            out["sequence_ids"] = np.repeat(np.arange(lead[0]), lead[1])
        else:
            out.setdefault("sequence_ids", np.zeros(tokens, np.int64))
        if len(lead) == 2:
            per_token = set(out) - {"layers", "sequence_ids"}
            out |= {k: out[k].reshape(tokens, *out[k].shape[2:]) for k in per_token}
        return _grouped(RawRouting(**out))


def _grouped(raw: RawRouting) -> RawRouting:
    """Bring the tokens of each sequence together (in their order), and number positions if nobody did."""
    ids = raw.sequence_ids
    assert ids is not None
    if (np.diff(ids) < 0).any():
        order = np.argsort(ids, kind="stable")
        sorted_fields = {
            f.name: v[order]
            for f in fields(raw)
            if f.name not in ("layers", "offsets") and (v := getattr(raw, f.name)) is not None
        }
        raw = replace(raw, **sorted_fields)
        ids = raw.sequence_ids
        assert ids is not None
    if raw.positions is None:
        starts = np.concatenate([[0], np.nonzero(np.diff(ids))[0] + 1]) if len(ids) else np.zeros(0, np.int64)
        lengths = np.diff(np.concatenate([starts, [len(ids)]]))
        raw = replace(raw, positions=np.arange(len(ids)) - np.repeat(starts, lengths))
    return raw


def by_weight(experts_NLK: Array, weights_NLK: Array) -> tuple[Array, Array]:
    """Both arrays with the K experts in descending order of weight (equal weights keep their order)."""
    w = weights_NLK.astype(np.float32)
    if (w[..., 1:] <= w[..., :-1]).all():
        return experts_NLK, weights_NLK
    order = np.argsort(-w, axis=-1, kind="stable")
    return np.take_along_axis(experts_NLK, order, -1), np.take_along_axis(weights_NLK, order, -1)


def import_arrays(
    out: str | Path,
    raw: RawRouting,
    experts: int,
    *,
    documents: Sequence[Document] | None = None,
    phase: str = "decode",
    stack: str = "decoder",
    model_id: str = "unknown",
    revision: str = "",
    family: str = "unknown",
    vocab_size: int | None = None,
    score_semantics: str = "",
    splits: tuple[float, float, float] | None = (0.8, 0.1, 0.1),
    seed: int = 0,
    tokens_per_shard: int = 262_144,
    extra: dict[str, Any] | None = None,
    where: str = "the import",
) -> TraceHeader:
    """Write a trace from arrays that another program recorded.

    Args:
        out: directory of the new trace; importing the same again into it changes nothing.
        raw: the arrays.
        experts: experts per layer (E).
        documents: one per sequence, in ascending order of the sequence ids; equal names are one document and
            go to the same split. None: each sequence is a document of its own.
        phase: ``prefill`` or ``decode``.
        stack: name of the stack.
        model_id, revision, family, seed, extra: see :class:`TraceHeader`.
        vocab_size: None takes the largest token id plus one.
        score_semantics: what the weights mean.
        splits: shares of train, validation and test for documents without a split (a hash of the name
            decides); None leaves them open.
        tokens_per_shard: a shard is closed once it has so many tokens.
        where: what to call the source in error sentences.

    Returns:
        the header of the finished trace.

    Raises:
        TraceError: if an id is not below ``experts``, arrays disagree in their tokens, or ``out`` is taken.
    """
    if phase not in PHASES:
        raise TraceError(f"Phase {phase!r} is unknown; choose one of {', '.join(PHASES)}.")
    flat = raw.flat(where)
    tokens, layers, top_k = flat.experts.shape
    if top_k > experts:
        raise TraceError(
            f"{where}: {top_k} experts per token but only {experts} per layer; K cannot exceed E."
        )
    check_experts(flat.experts, experts, stack)
    ids = flat.sequence_ids
    assert ids is not None
    assert flat.positions is not None
    weights = flat.weights
    if weights is not None:
        flat.experts, weights = by_weight(flat.experts, weights)
    token_ids = flat.token_ids if flat.token_ids is not None else np.zeros(tokens, np.int32)
    starts = np.concatenate([[0], np.nonzero(np.diff(ids))[0] + 1, [tokens]]).astype(np.int64)
    starts = np.unique(starts)
    count = len(starts) - 1
    if documents is None:
        documents = [Document(f"sequence-{ids[s]}", "unknown") for s in starts[:-1]]
    if len(documents) != count:
        raise TraceError(
            f"{where}: {len(documents)} documents for {count} sequences; describe each sequence once."
        )
    if splits is not None:
        documents = [replace(d, split=d.split or split_of(d.name, splits)) for d in documents]
    unique = list(dict.fromkeys(documents))
    number = {d: i for i, d in enumerate(unique)}
    hidden = flat.hidden
    info = StackInfo(
        layers=layers,
        experts=experts,
        top_k=top_k,
        hidden_size=hidden.shape[-1] if hidden is not None else None,
        layer_map=[f"layers.{i}" for i in (flat.layers if flat.layers is not None else range(layers))],
        hidden_layers=list(range(layers)) if hidden is not None else None,
        hidden_dtype="fp16" if hidden is not None else "none",
        has_dropped=flat.dropped is not None,
        has_weights=weights is not None,
        score_semantics=score_semantics or (DESCENDING if weights is not None else UNRANKED),
    )
    header = TraceHeader(
        model_id=model_id,
        revision=revision,
        family=family,
        stacks={stack: info},
        vocab_size=vocab_size or (int(token_ids.max()) + 1 if tokens else 1),
        phases=[phase],
        documents=unique,
        specgate_version=__version__,
        seed=seed,
        extra={
            "imported": True,
            "token_ids": "recorded" if flat.token_ids is not None else "absent",
            **(extra or {}),
        },
    )
    shards = _cut(starts, tokens_per_shard)
    plan = {"import": _digest(flat, weights), "header": hashlib.sha256(header.to_json().encode()).hexdigest()}
    writer = TraceWriter(out, header, plan, len(shards))
    if writer.complete:
        return TraceHeader.from_json((writer.path / HEADER).read_text(), str(writer.path / HEADER))
    which = np.array([number[d] for d in documents], dtype=np.int32)
    for i, (first, last) in enumerate(shards):
        if writer.done(i):
            continue
        rows = slice(int(starts[first]), int(starts[last]))
        arrays = StackArrays(
            experts=flat.experts[rows],
            weights=weights[rows] if weights is not None else None,
            token_ids=token_ids[rows],
            positions=flat.positions[rows],
            dropped=flat.dropped[rows].astype(bool) if flat.dropped is not None else None,
            hidden=hidden[rows] if hidden is not None else None,
            seq_offsets=starts[first : last + 1] - starts[first],
            seq_document=which[first:last],
            seq_phase=np.full(last - first, PHASES.index(phase), np.uint8),
        )
        writer.write_shard(i, {stack: arrays})
    return writer.finish()


def _cut(starts: Array, tokens_per_shard: int) -> list[tuple[int, int]]:
    """Sequences (first, last + 1) of each shard, each but the last with at least ``tokens_per_shard``."""
    out, first = [], 0
    for s in range(len(starts) - 1):
        if starts[s + 1] - starts[first] >= tokens_per_shard or s == len(starts) - 2:
            out.append((first, s + 1))
            first = s + 1
    return out or [(0, 0)]


def _digest(flat: RawRouting, weights: Array | None) -> str:
    digest = hashlib.sha256()
    for f in fields(flat):
        value = weights if f.name == "weights" else getattr(flat, f.name)
        if value is not None:
            data = np.ascontiguousarray(value)
            digest.update(f"{f.name} {data.dtype.str} {data.shape};".encode())
            digest.update(data.tobytes())
    return digest.hexdigest()
