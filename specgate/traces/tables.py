"""Traces as Parquet: one row per token, for polars, duckdb, pandas and ``datasets``; and back, exactly.

Letters: N rows (tokens), L MoE layers, K experts per token, D hidden size.

Columns: ``stack``, ``document``, ``domain``, ``split``, ``phase``, ``sequence``, ``position``, ``token_id``,
and per MoE layer l (two digits or more) ``experts_l`` (list of K ids), ``weights_l`` (list of K float32),
``dropped_l`` (bool) and, on request, ``hidden_l`` (list of D) with ``hidden_scale_l``. fp16 numbers are
widened to float32, which loses nothing. The trace's header and plan travel in the file's metadata, and the
routers in a file beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch

from specgate.errors import TraceError
from specgate.traces.arrays import Array, StackArrays
from specgate.traces.importing import RawRouting
from specgate.traces.reader import PLAN, ROUTERS, TraceReader
from specgate.traces.schema import PHASES, SPLITS, Document, TraceHeader
from specgate.traces.store import TraceWriter

KEY = b"specgate"


def routers_beside(path: Path) -> Path:
    """Where the routers of a Parquet file lie."""
    return path.with_name(path.name + ".routers.safetensors")


def export_parquet(trace: str | Path, out: str | Path, with_hidden: bool = False, verify: bool = True) -> int:
    """Write a trace as one Parquet file (zstd), shard by shard. Returns the number of rows.

    Raises:
        TraceError: if the trace cannot be read.
    """
    reader, out = TraceReader(trace, verify=verify), Path(out)
    header, plan = reader.header, json.loads((reader.path / PLAN).read_text())
    if not with_hidden and any(i.hidden_dtype != "none" for i in header.stacks.values()):
        bare = {n: replace(i, hidden_dtype="none", hidden_layers=None) for n, i in header.stacks.items()}
        header = header.with_(stacks=bare)
        plan["plan"] = {"without_hidden": True, **plan["plan"]}
    metas = [reader.shard_meta(i) for i in range(len(header.shards))]
    note = {"header": json.loads(header.to_json()), "plan": plan, "shard_meta": metas}
    temporary, rows = out.with_name(out.name + ".tmp"), 0
    schema = _schema(header).with_metadata({KEY: json.dumps(note).encode()})
    out.parent.mkdir(parents=True, exist_ok=True)
    sequence = dict.fromkeys(header.stacks, 0)
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for shard in range(len(header.shards)):
            for stack in sorted(header.stacks):
                arrays = reader.stack(stack).shard_arrays(shard)
                n = len(arrays["token_ids"])
                if n:
                    table = _table(header, stack, arrays, sequence[stack], schema)
                    writer.write_table(table, row_group_size=n)
                rows += n
                sequence[stack] += len(arrays["seq_document"])
    os.replace(temporary, out)
    if ROUTERS in header.files:
        shutil.copyfile(reader.path / ROUTERS, routers_beside(out))
    return rows


def _layer_columns(header: TraceHeader) -> dict[str, tuple[str, int, pa.DataType]]:
    """Column name -> (field, index on the layer axis, type), over the union of the stacks."""
    infos = header.stacks.values()
    deepest = max(i.layers for i in infos)
    width = max(2, len(str(deepest - 1)))
    expert = pa.uint8() if all(i.experts <= 256 for i in infos) else pa.uint16()
    columns: dict[str, tuple[str, int, pa.DataType]] = {}
    for layer in range(deepest):
        columns[f"experts_{layer:0{width}d}"] = ("experts", layer, pa.list_(expert))
        if any(i.has_weights for i in infos):
            columns[f"weights_{layer:0{width}d}"] = ("weights", layer, pa.list_(pa.float32()))
        if any(i.has_dropped for i in infos):
            columns[f"dropped_{layer:0{width}d}"] = ("dropped", layer, pa.bool_())
    kinds = {i.hidden_dtype for i in infos} - {"none"}
    for layer in range(max((len(i.hidden_layers or []) for i in infos), default=0)):
        name = f"hidden_{layer:0{width}d}"
        columns[name] = ("hidden", layer, pa.list_(pa.int8() if kinds == {"int8"} else pa.float32()))
        if "int8" in kinds:
            columns[f"hidden_scale_{layer:0{width}d}"] = ("hidden_scale", layer, pa.float32())
    return columns


def _schema(header: TraceHeader) -> pa.Schema:
    texts = [(name, pa.string()) for name in ("stack", "document", "domain", "split", "phase")]
    numbers = [("sequence", pa.int64()), ("position", pa.int32()), ("token_id", pa.int32())]
    return pa.schema([*texts, *numbers, *((n, c[2]) for n, c in _layer_columns(header).items())])


def _table(
    header: TraceHeader, stack: str, a: dict[str, Array], sequence: int, schema: pa.Schema
) -> pa.Table:
    """The rows of one stack of one shard; ``sequence`` counts the sequences of the stack before it."""
    lengths = np.diff(a["seq_offsets"])
    documents = header.documents
    n = len(a["token_ids"])

    def text(values: list[str | None], index_S: Array) -> pa.Array:
        return pa.array(values, pa.string()).take(pa.array(np.repeat(index_S, lengths)))

    of_document = a["seq_document"]
    data: dict[str, pa.Array] = {
        "stack": pa.array([stack] * n, pa.string()),
        "document": text([d.name for d in documents], of_document),
        "domain": text([d.domain for d in documents], of_document),
        "split": text([d.split for d in documents], of_document),
        "phase": text(list(PHASES), a["seq_phase"]),
        "sequence": pa.array(np.repeat(np.arange(len(lengths)) + sequence, lengths)),
        "position": pa.array(a["positions"]),
        "token_id": pa.array(a["token_ids"]),
    }
    for name, (field, layer, kind) in _layer_columns(header).items():
        values = a.get(field)
        if values is None or layer >= values.shape[1]:
            data[name] = pa.nulls(n, kind)
            continue
        part = values[:, layer]
        if not pa.types.is_list(kind):
            data[name] = pa.array(part.astype(bool) if pa.types.is_boolean(kind) else part.astype(np.float32))
            continue
        ends = np.arange(n + 1, dtype=np.int32) * part.shape[1]
        if ends.size and n * part.shape[1] >= 2**31:
            raise TraceError("A shard is too large for Parquet lists; collect with smaller shards.")
        flat = part.reshape(-1).astype(kind.value_type.to_pandas_dtype())
        data[name] = pa.ListArray.from_arrays(pa.array(ends), pa.array(flat)).cast(kind)
    return pa.table([data[name] for name in schema.names], schema=schema)


def import_parquet(source: str | Path, out: str | Path) -> TraceHeader:
    """Rebuild the trace that :func:`export_parquet` wrote: same arrays, same header, same bytes.

    Raises:
        TraceError: if the file is no such export (then ``--experts`` imports its rows as they are).
    """
    source = Path(source)
    file = open_parquet(source)
    note = json.loads((file.schema_arrow.metadata or {}).get(KEY, b"null"))
    if note is None:
        raise TraceError(
            f"{source} was not exported by specgate (or another tool rewrote it and dropped its header); "
            "give --experts E to import its rows."
        )
    text = json.dumps(note["header"], sort_keys=True, indent=1) + "\n"
    header = TraceHeader.from_json(text, f"the header in {source}")
    parts = [
        (i, s) for i, shard in enumerate(header.shards) for s in sorted(header.stacks) if shard.tokens[s]
    ]
    counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    if counts != [header.shards[i].tokens[s] for i, s in parts]:
        raise TraceError(
            f"The rows of {source} were changed since specgate exported it; give --experts E to import them."
        )
    group_of = {part: g for g, part in enumerate(parts)}
    writer = TraceWriter(out, header, note["plan"]["plan"], note["plan"]["num_shards"])
    for i in range(len(header.shards)):
        if writer.done(i):
            continue
        stacks = {
            s: _arrays(header, s, file.read_row_group(group_of[i, s]) if (i, s) in group_of else None)
            for s in header.stacks
        }
        writer.write_shard(i, stacks, note["shard_meta"][i])
    routers = None
    if ROUTERS in header.files:
        beside = routers_beside(source)
        if not beside.exists():
            raise TraceError(
                f"{beside} is missing; copy it beside {source.name}, it holds the host's routers."
            )
        routers = safetensors.torch.load_file(beside)
    return writer.finish(routers=routers)


def _arrays(header: TraceHeader, stack: str, table: pa.Table | None) -> StackArrays:
    """The inverse of :func:`_table`."""
    info = header.stacks[stack]
    columns = _layer_columns(header)
    table = table if table is not None else _schema(header).empty_table()
    n = table.num_rows

    def layers(field: str, count: int, row: tuple[int, ...], dtype: Any) -> Array:
        names = [name for name, (f, layer, _) in columns.items() if f == field and layer < count]
        out = np.empty((n, count, *row), dtype)
        for layer, name in enumerate(names):
            column = table[name].combine_chunks()
            values = column.flatten() if row else column
            out[:, layer] = np.asarray(values.to_numpy(zero_copy_only=False)).reshape(n, *row)
        return out

    first = np.nonzero(np.diff(table["sequence"].to_numpy(), prepend=-1))[0] if n else np.zeros(0, np.int64)
    number = {d.name: i for i, d in enumerate(header.documents)}
    names = table["document"].take(pa.array(first)).to_pylist()
    phases = table["phase"].take(pa.array(first)).to_pylist()
    kept, k = len(info.hidden_layers or []), (info.top_k,)
    quantised = info.hidden_dtype == "int8"
    width = (info.hidden_size or 0,)
    return StackArrays(
        experts=layers("experts", info.layers, k, np.uint16),
        weights=layers("weights", info.layers, k, np.float16) if info.has_weights else None,
        token_ids=table["token_id"].to_numpy(),
        positions=table["position"].to_numpy(),
        seq_offsets=np.concatenate([first, [n]]),
        seq_document=np.array([number[d] for d in names], np.int32),
        seq_phase=np.array([PHASES.index(p) for p in phases], np.uint8),
        dropped=layers("dropped", info.layers, (), np.uint8) if info.has_dropped else None,
        hidden=layers("hidden", kept, width, np.int8 if quantised else np.float16) if kept else None,
        hidden_scale=layers("hidden_scale", kept, (), np.float16) if quantised else None,
    )


def rows_as_arrays(
    source: str | Path, stack: str, phase: str | None
) -> tuple[RawRouting, list[Document], str]:
    """Rows of any Parquet file with these columns (``experts_l`` at least) as arrays to import.

    Returns:
        the arrays, one document per sequence, and the phase of the rows.

    Raises:
        TraceError: if a needed column is missing or rows of both phases remain.
    """
    table = open_parquet(Path(source)).read()
    for name, value in (("stack", stack), ("phase", phase)):
        if value is not None and name in table.column_names:
            table = table.filter(pa.compute.field(name) == value)
    found = sorted(
        (c for c in table.column_names if re.fullmatch(r"experts_\d+", c)), key=lambda c: int(c[8:])
    )
    if not found or "sequence" not in table.column_names or not table.num_rows:
        raise TraceError(
            f"{source} has no rows of stack {stack!r} with columns 'sequence' and 'experts_00', ...; it has "
            f"{', '.join(table.column_names[:12])}."
        )
    phases = set(table["phase"].to_pylist()) if "phase" in table.column_names else {phase or "decode"}
    if len(phases) > 1:
        raise TraceError(
            f"{source} holds rows of both phases; choose one with --phase prefill or --phase decode."
        )

    def layers(names: list[str]) -> Array:
        per_layer = [table[c].combine_chunks() for c in names]
        lists = {len(c.flatten()) for c in per_layer}
        if len(lists) != 1 or lists.pop() % table.num_rows or any(c.null_count for c in per_layer):
            raise TraceError(
                f"{source}: the lists in {names[0]} ... {names[-1]} must all have the same length K."
            )
        return np.stack([c.flatten().to_numpy().reshape(table.num_rows, -1) for c in per_layer], 1)

    weights = [c.replace("experts", "weights") for c in found]
    ids = table["sequence"].to_numpy()
    raw = RawRouting(
        experts=layers(found),
        weights=layers(weights) if set(weights) <= set(table.column_names) else None,
        token_ids=table["token_id"].to_numpy() if "token_id" in table.column_names else None,
        positions=table["position"].to_numpy() if "position" in table.column_names else None,
        sequence_ids=ids,
    )
    _, at = np.unique(ids, return_index=True)

    def text(name: str, default: str | None) -> list[str | None]:
        return (
            table[name].take(pa.array(at)).to_pylist() if name in table.column_names else [default] * len(at)
        )

    names = text("document", None)
    documents = [
        Document(name or f"sequence-{ids[i]}", domain or "unknown", split if split in SPLITS else None)
        for i, name, domain, split in zip(at, names, text("domain", None), text("split", None), strict=True)
    ]
    return raw, documents, str(phases.pop())


def open_parquet(path: Path) -> pq.ParquetFile:
    """The Parquet file, or TraceError if there is none."""
    if not path.exists():
        raise TraceError(f"There is no file {path}; correct the path.")
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise TraceError(f"{path} is not a readable Parquet file ({error}); export it again.") from error
