"""``python -m specgate.traces.convert``: routing arrays and Parquet to traces, and traces to Parquet and npz.

Letters: T tokens, S sequences, L MoE layers, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from specgate.errors import SpecgateError, TraceError
from specgate.traces.arrays import Array
from specgate.traces.importing import RawRouting, import_arrays
from specgate.traces.reader import TraceReader
from specgate.traces.schema import PHASES, SPLITS, Document, TraceHeader
from specgate.traces.tables import export_parquet, import_parquet, rows_as_arrays

#: Field of RawRouting -> keys it is looked for under, in this order.
ALIASES = {
    "experts": ("experts", "routed_experts", "expert_ids", "topk_ids"),
    "weights": ("weights", "scores", "topk_weights"),
    "token_ids": ("token_ids", "tokens"),
    "positions": ("positions", "pos"),
    "sequence_ids": ("seq_id", "sequence_ids", "seq_ids"),
    "offsets": ("seq_offsets", "offsets"),
    "dropped": ("dropped",),
    "hidden": ("hidden",),
    "layers": ("layers",),
}

EPILOG = """
examples:
  arrays of another program, one sequence per file (vLLM's routed experts [T, L, K]):
    python -m specgate.traces.convert request-*.npy data/traces/mine --experts 128 --model-id me/model
  an npz with other key names:
    python -m specgate.traces.convert in.npz data/traces/mine --experts 64 --phase prefill \\
        --map experts=enc_experts weights=enc_scores token_ids=enc_tokens sequence_ids=enc_seq_id
  a trace for polars, duckdb or datasets, and back:
    python -m specgate.traces.convert data/traces/mine mine.parquet
    python -m specgate.traces.convert mine.parquet data/traces/again
  a trace as numpy arrays:
    python -m specgate.traces.convert data/traces/mine mine.npz

npz keys looked for: """ + "; ".join(f"{k}: {', '.join(v)}" for k, v in ALIASES.items())


def load_arrays(path: Path, mapping: dict[str, str]) -> dict[str, Array]:
    """The arrays of an npz or npy file by field of :class:`RawRouting`.

    Args:
        path: the file; an npy is the experts alone.
        mapping: field -> key, for keys that are not among :data:`ALIASES`.

    Raises:
        TraceError: if the file is missing or unreadable, or a key is not in it (the sentence lists its keys).
    """
    if not path.exists():
        raise TraceError(f"There is no file {path}; correct the path.")
    try:
        loaded = np.load(path, allow_pickle=False)
        content = (
            {"experts": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
        )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(
            f"{path} is not a readable npy or npz file ({error}); save it again with numpy."
        ) from error
    keys = ", ".join(f"{k} {list(v.shape)}" for k, v in content.items())
    out: dict[str, Array] = {}
    for field, names in ALIASES.items():
        if field in mapping:
            if mapping[field] not in content:
                raise TraceError(f"{path} has no key {mapping[field]!r} (for {field}); its keys are: {keys}.")
            out[field] = content[mapping[field]]
        elif (name := next((n for n in names if n in content), None)) is not None:
            out[field] = content[name]
    if "experts" not in out:
        raise TraceError(
            f"{path} has no key named {' or '.join(ALIASES['experts'])}; its keys are: {keys}. Name one "
            "with --map experts=KEY."
        )
    return out


def join(parts: list[RawRouting]) -> RawRouting:
    """Several files as one: tokens concatenated, sequence ids renumbered 0, 1, ... in file order."""
    first = parts[0]
    shapes = {(p.experts.shape[1], p.experts.shape[2]) for p in parts}
    have = {tuple(f.name for f in fields(p) if getattr(p, f.name) is not None) for p in parts}
    if len(shapes) != 1 or len(have) != 1:
        raise TraceError(
            f"The input files differ in [L, K] ({sorted(shapes)}) or in their keys; convert them apart."
        )
    joined: dict[str, Any] = {}
    for name in next(iter(have)):
        if name == "sequence_ids":
            renumbered, base = [], 0
            for p in parts:
                unique, index = np.unique(np.asarray(p.sequence_ids), return_inverse=True)
                renumbered.append(index + base)
                base += len(unique)
            joined[name] = np.concatenate(renumbered)
        else:
            joined[name] = (
                first.layers if name == "layers" else np.concatenate([getattr(p, name) for p in parts])
            )
    return RawRouting(**joined)


def read_meta(path: Path, ids: list[int], document_key: list[str], domain_key: list[str]) -> list[Document]:
    """Documents of the sequences ``ids`` from a JSON list with one object per sequence.

    An object may hold ``seq`` (the sequence's id; else its place in the list), ``document`` or ``name``,
    ``domain`` and ``split``; ``document_key`` and ``domain_key`` make name and domain from other keys, joined
    by ``/``.

    Raises:
        TraceError: if the file is unreadable, or a sequence or a key is not in it.
    """
    try:
        entries = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise TraceError(f"There is no file {path} (--meta); correct the path.") from error
    except ValueError as error:
        raise TraceError(f"{path} (--meta) is not valid JSON ({error}); correct it.") from error
    if isinstance(entries, dict):
        entries = entries.get("sequences")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise TraceError(f"{path} (--meta) must hold a JSON list with one object per sequence.")
    by_id = {e.get("seq", i): e for i, e in enumerate(entries)}

    def value(entry: dict[str, Any], keys: list[str], names: tuple[str, ...], default: str) -> str:
        if not keys:
            return str(next((entry[n] for n in names if n in entry), default))
        missing = [k for k in keys if k not in entry]
        if missing:
            raise TraceError(f"{path} (--meta) has no key {missing[0]!r}; its keys are: {', '.join(entry)}.")
        return "/".join(str(entry[k]) for k in keys)

    documents = []
    for i in ids:
        if i not in by_id:
            raise TraceError(
                f"{path} (--meta) says nothing about sequence {i}; it describes {len(by_id)} sequences."
            )
        entry = by_id[i]
        name = value(entry, document_key, ("document", "name"), f"sequence-{i}")
        split = entry.get("split")
        if split is not None and split not in SPLITS:
            raise TraceError(f"{path} (--meta) has split {split!r}; choose one of {', '.join(SPLITS)}.")
        documents.append(Document(name, value(entry, domain_key, ("domain",), "unknown"), split))
    return documents


def export_npz(trace: str | Path, out: str | Path, stack: str | None = None, phase: str | None = None) -> int:
    """Write one stack and phase of a trace as npz arrays, and ``OUT.meta.json`` for ``--meta`` of an import.

    Returns:
        the number of tokens.

    Raises:
        TraceError: if the trace has several stacks or phases and none is chosen.
    """
    reader, out = TraceReader(trace), Path(out)
    header = reader.header
    stack = stack or _only(list(header.stacks), "stack", reader.path)
    phase = phase or _only(header.phases, "phase", reader.path)
    view = reader.stack(stack)
    s = view.sequences
    mine = np.nonzero(s.phase_S == PHASES.index(phase))[0]
    length = s.length_S[mine]
    within = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    token = np.repeat(s.start_S[mine], length) + within
    short = {"positions": "pos"}
    arrays: dict[str, Any] = {short.get(f, f): view.gather(f, token) for f in view.fields}
    arrays["seq_id"] = np.repeat(np.arange(len(mine), dtype=np.int32), length)
    arrays["num_experts"] = np.array(view.info.experts)
    documents = [header.documents[d] for d in s.document_S[mine]]
    meta = [
        {"seq": i, "document": d.name, "domain": d.domain, "split": d.split, "tokens": int(n), "phase": phase}
        for i, (d, n) in enumerate(zip(documents, length, strict=True))
    ]
    temporary = out.with_name(out.name + ".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    out.with_name(out.stem + ".meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(temporary, out)
    return len(token)


def _only(choices: list[str], what: str, path: Path) -> str:
    if len(choices) != 1:
        raise TraceError(f"{path} has {what}s {', '.join(choices)}; choose one with --{what}.")
    return choices[0]


def import_files(args: argparse.Namespace) -> TraceHeader:
    """npz and npy files, or the rows of a Parquet file, to a trace, as the command line says."""
    if args.experts is None:
        raise TraceError("Importing arrays needs --experts E, the number of experts per layer.")
    paths: list[Path] = args.inputs
    where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
    phase = args.phase or "decode"
    if paths[0].suffix == ".parquet":
        raw, documents, phase = rows_as_arrays(paths[0], args.stack or "decoder", args.phase)
    else:
        parts = [RawRouting(**load_arrays(p, args.map)).flat(str(p)) for p in paths]
        raw = join(parts) if len(parts) > 1 else parts[0]
        documents = []
        found = [np.unique(np.asarray(part.sequence_ids)).tolist() for part in parts]
        names = list(zip(paths, found, strict=True))
        ids = names[0][1] if len(parts) == 1 else list(range(sum(len(n) for _, n in names)))
        if args.meta is not None:
            documents = read_meta(args.meta, ids, args.document_key, args.domain_key)
        else:
            for path, mine in names:
                documents += [
                    Document(f"{path.stem}/{i}" if len(mine) > 1 else path.stem, "unknown") for i in mine
                ]
    options = {
        n: getattr(args, n) for n in ("model_id", "revision", "family", "vocab_size", "score_semantics")
    }
    return import_arrays(
        args.output,
        replace(raw),
        args.experts,
        documents=documents,
        phase=phase,
        stack=args.stack or "decoder",
        splits=args.splits,
        tokens_per_shard=args.tokens_per_shard,
        extra={"source": [p.name for p in paths]},
        where=where,
        **options,
    )


def convert(args: argparse.Namespace) -> str:
    """Do what the command line asks; returns the sentence to print."""
    source, out = args.inputs[0], args.output
    kinds = {".parquet": "parquet", ".npz": "npz"}
    if source.is_dir():
        if len(args.inputs) > 1 or out.suffix not in kinds:
            raise TraceError(
                f"{source} is a trace: give one trace and an output that ends in .parquet or .npz."
            )
        if out.suffix == ".parquet":
            return f"{out}: {export_parquet(source, out, args.with_hidden)} rows (one per token)"
        return f"{out}: {export_npz(source, out, args.stack, args.phase)} tokens"
    if out.suffix in kinds:
        raise TraceError(
            f"The output of an import is a trace directory, not {out}; import first, then convert that."
        )
    if source.suffix == ".parquet" and args.experts is None:
        header = import_parquet(source, out)
    else:
        header = import_files(args)
    stacks = "; ".join(
        f"{n}: {header.tokens(n)} tokens in {header.sequences(n)} sequences, {i.layers} layers x "
        f"{i.experts} experts, top-{i.top_k}"
        for n, i in header.stacks.items()
    )
    counts = {s: sum(d.split == s for d in header.documents) for s in SPLITS}
    split = ", ".join(f"{n} {s}" for s, n in counts.items())
    return f"{out}: {stacks}; {len(header.documents)} documents ({split})"


def _mapping(text: str) -> tuple[str, str]:
    field, _, key = text.partition("=")
    if field not in ALIASES or not key:
        raise argparse.ArgumentTypeError(f"{text!r}: write FIELD=KEY, FIELD one of {', '.join(ALIASES)}")
    return field, key


def _splits(text: str) -> tuple[float, ...] | None:
    return None if text == "none" else tuple(float(x) for x in text.split(","))


def _keys(text: str) -> list[str]:
    return [k for k in text.split(",") if k]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m specgate.traces.convert",
        description="A trace from routing arrays (npz, npy) or Parquet, and Parquet or npz from a trace.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="npz or npy files, a .parquet, or a trace"
    )
    p.add_argument(
        "output", type=Path, metavar="OUTPUT", help="a trace directory, or a file .parquet or .npz"
    )
    p.add_argument("--experts", type=int, metavar="E", help="experts per layer (required for arrays)")
    p.add_argument(
        "--map", type=_mapping, nargs="+", default=[], metavar="FIELD=KEY", help="where the arrays are"
    )
    p.add_argument("--meta", type=Path, metavar="JSON", help="a list with one object per sequence")
    p.add_argument(
        "--document-key", type=_keys, default=[], metavar="K,..", help="keys of --meta that name a document"
    )
    p.add_argument(
        "--domain-key", type=_keys, default=[], metavar="K,..", help="keys of --meta that name its domain"
    )
    p.add_argument(
        "--phase", choices=PHASES, help="phase of the arrays (default decode), or the one to export"
    )
    p.add_argument("--stack", help="name of the stack (default decoder), or the one to export")
    p.add_argument("--model-id", default="unknown", help="the host model, such as openai/gpt-oss-20b")
    p.add_argument("--revision", default="", help="its commit or version")
    p.add_argument("--family", default="unknown", help="its architecture, such as gpt_oss")
    p.add_argument("--vocab-size", type=int, help="default: the largest token id plus one")
    p.add_argument("--score-semantics", default="", help="what the weights mean, in words")
    p.add_argument(
        "--splits",
        type=_splits,
        default=(0.8, 0.1, 0.1),
        metavar="A,B,C",
        help="shares of train, validation and locked test documents (default 0.8,0.1,0.1), or none",
    )
    p.add_argument("--tokens-per-shard", type=int, default=262_144, metavar="N")
    p.add_argument(
        "--with-hidden", action="store_true", help="put hidden states into the Parquet file as well"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status (1 with one sentence on stderr at a user's error)."""
    args = parser().parse_args(argv)
    args.map = dict(args.map)
    try:
        print(convert(args))
    except SpecgateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
