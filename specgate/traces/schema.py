"""What a routing trace says about itself: the JSON header and its parts, with every check that JSON cannot
make.

Letters: L MoE layers of one stack, E experts per layer, K experts per token, D hidden size.

The header is written last, so a directory without ``trace.json`` is an unfinished collection. It carries the
size and SHA-256 of every other file and a digest of itself: no byte of a trace can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from specgate.errors import TraceError
from specgate.traces.batch import StackSpec

__all__ = [
    "FORMAT_VERSION",
    "HIDDEN_DTYPES",
    "PHASES",
    "SPLITS",
    "Document",
    "FileInfo",
    "ShardInfo",
    "StackInfo",
    "StackSpec",
    "TraceHeader",
    "canonical_json",
    "expert_dtype",
    "sha256_hex",
    "split_of",
]

FORMAT_VERSION = 1
PHASES = ("prefill", "decode")  # index = the number stored in a shard's seq_phase
SPLITS = ("train", "validation", "test")
HIDDEN_DTYPES = ("none", "fp16", "int8")
MAX_EXPERTS = 65535
DIGEST_KEY = "header_sha256"


def canonical_json(value: Any) -> str:
    """JSON text that is the same for the same value: sorted keys, ASCII, no NaN.

    Raises:
        TraceError: if the value is not plain JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TraceError(f"A trace header or plan holds a value that is not plain JSON ({error}).") from error


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def expert_dtype(experts: int) -> np.dtype[Any]:
    """The integer type that expert ids below ``experts`` (E) are stored in: uint8 up to 256, uint16 above."""
    return np.dtype(np.uint8) if experts <= 256 else np.dtype(np.uint16)


def split_of(name: str, ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> str:
    """The split that a document belongs to when nobody has chosen one: a hash of its name decides, nothing
    else.

    The same name falls in the same split in every trace, on every machine, whatever other documents there
    are. ``ratios`` are the shares of train, validation and test.
    """
    check_ratios(ratios)
    unit = (
        int.from_bytes(
            hashlib.sha256(b"specgate split " + name.encode("utf-8", "surrogatepass")).digest()[:8], "big"
        )
        / 2**64
    )
    if unit < ratios[0]:
        return "train"
    return "validation" if unit < ratios[0] + ratios[1] else "test"


def check_ratios(ratios: tuple[float, ...]) -> None:
    """Raise TraceError unless ``ratios`` are three shares that add up to 1."""
    if len(ratios) != 3 or min(ratios) < 0 or not math.isclose(sum(ratios), 1.0, abs_tol=1e-6):
        raise TraceError(
            f"Split ratios {list(ratios)} must be three shares (train, validation, test) that add up to 1."
        )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise TraceError(sentence)


def _is_int(value: Any, low: int, high: int = 2**62) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _build(cls: type[Any], value: Any, what: str) -> Any:
    """``cls(**value)`` with a sentence instead of a TypeError."""
    _require(isinstance(value, dict), f"{what} must be a JSON object, not {type(value).__name__}.")
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(value) - names)
    _require(
        not unknown, f"{what} has unknown keys {unknown}; it was written by another version of specgate."
    )
    try:
        return cls(**value)
    except TypeError as error:
        raise TraceError(f"{what} is incomplete ({error}).") from error


@dataclass(frozen=True)
class StackInfo:
    """One stack (``encoder`` or ``decoder``) of the host model.

    Attributes:
        layers: MoE layers (L); dense layers are not counted.
        experts: experts per layer (E), at most 65535.
        top_k: experts per token (K).
        hidden_size: width of the residual stream (D), or None if unknown.
        layer_map: name of each MoE layer's module in the host, L strings.
        hidden_layers: MoE layers whose hidden states are stored (Lh of them), or None.
        hidden_dtype: ``none``, ``fp16`` or ``int8`` (one fp16 scale per token and layer).
        has_dropped: whether Switch's capacity drops are recorded.
        has_weights: whether router weights are recorded (an imported trace may lack them).
        score_semantics: what the weights mean, in words; ``unranked`` says that the order of experts means
            nothing.
        expert_capacity: Switch's capacity, or None.
    """

    layers: int
    experts: int
    top_k: int
    hidden_size: int | None = None
    layer_map: list[str] = field(default_factory=list)
    hidden_layers: list[int] | None = None
    hidden_dtype: str = "none"
    has_dropped: bool = False
    has_weights: bool = True
    score_semantics: str = ""
    expert_capacity: int | None = None

    def check(self, name: str) -> None:
        """Raise TraceError if the numbers contradict each other. ``name`` is the stack's name, for the
        sentence.
        """
        s = f"Stack {name!r}"
        _require(_is_int(self.layers, 1), f"{s} has {self.layers!r} layers; a stack needs at least 1.")
        _require(
            _is_int(self.experts, 1, MAX_EXPERTS),
            f"{s} has {self.experts!r} experts; a trace holds 1 to {MAX_EXPERTS} experts per layer.",
        )
        _require(_is_int(self.top_k, 1), f"{s} has top_k {self.top_k!r}; a token needs at least 1 expert.")
        _require(
            self.top_k <= self.experts,
            f"{s} has top_k {self.top_k} but only {self.experts} experts; K cannot exceed E.",
        )
        _require(
            self.hidden_size is None or _is_int(self.hidden_size, 1),
            f"{s} has hidden_size {self.hidden_size!r}; give a positive number or none.",
        )
        _require(
            len(self.layer_map) == self.layers and all(isinstance(m, str) for m in self.layer_map),
            f"{s} names {len(self.layer_map)} modules in layer_map but has {self.layers} MoE layers.",
        )
        _require(
            self.hidden_dtype in HIDDEN_DTYPES,
            f"{s} has hidden_dtype {self.hidden_dtype!r}; choose one of {', '.join(HIDDEN_DTYPES)}.",
        )
        if self.hidden_dtype == "none":
            _require(self.hidden_layers is None, f"{s} lists hidden_layers but its hidden_dtype is none.")
            return
        _require(self.hidden_size is not None, f"{s} stores hidden states but has no hidden_size.")
        kept = self.hidden_layers or []
        _require(
            bool(kept) and all(_is_int(i, 0, self.layers - 1) for i in kept) and kept == sorted(set(kept)),
            f"{s} has hidden_layers {self.hidden_layers}; list ascending MoE layers from 0 to "
            f"{self.layers - 1}.",
        )


@dataclass(frozen=True)
class Document:
    """A traced text. ``split`` is None where nobody chose one (then :func:`split_of` its name decides)."""

    name: str
    domain: str
    split: str | None = None
    sha256: str = ""


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 of a file of the trace that is not a shard."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard file (path relative to the trace) and how many tokens and sequences of each stack it
    holds.
    """

    file: str
    sha256: str
    bytes: int
    tokens: dict[str, int]
    sequences: dict[str, int]


@dataclass(frozen=True)
class TraceHeader:
    """Everything about a trace but its arrays; ``trace.json`` is :meth:`to_json` of it.

    Attributes:
        model_id, revision, family: the host model, its commit or version, and its architecture's family.
        stacks: the host's stacks by name.
        vocab_size: number of token ids.
        seed: seed of the collection.
        phases: which of ``prefill`` and ``decode`` occur.
        documents: the traced texts, in the order that ``seq_document`` counts them.
        shards, files: filled in by the writer.
        routing_control: share of recorded decisions that were recomputed from router and hidden state, and
            agreed.
        extra: free-form JSON.
    """

    model_id: str
    family: str
    stacks: dict[str, StackInfo]
    vocab_size: int
    phases: list[str]
    documents: list[Document]
    revision: str = ""
    transformers_version: str = ""
    specgate_version: str = ""
    seed: int = 0
    shards: list[ShardInfo] = field(default_factory=list)
    files: dict[str, FileInfo] = field(default_factory=dict)
    routing_control: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def domains(self) -> list[str]:
        """Names of the domains in the order in which the documents first mention them."""
        return list(dict.fromkeys(d.domain for d in self.documents))

    def tokens(self, stack: str) -> int:
        """Tokens of ``stack`` over all shards."""
        return sum(s.tokens.get(stack, 0) for s in self.shards)

    def sequences(self, stack: str) -> int:
        """Sequences of ``stack`` over all shards."""
        return sum(s.sequences.get(stack, 0) for s in self.shards)

    def check(self) -> None:
        """Raise TraceError (one sentence, with the value) at the first field that makes no sense."""
        _require(
            self.format_version == FORMAT_VERSION,
            f"The trace has format version {self.format_version!r} but this specgate reads {FORMAT_VERSION}; "
            "install the version that wrote it or convert it again.",
        )
        _require(bool(self.stacks), "A trace header needs at least one stack.")
        for name, info in self.stacks.items():
            _require(
                bool(name) and "/" not in name and "." not in name,
                f"Stack name {name!r} must be non-empty and hold neither '/' nor '.'.",
            )
            info.check(name)
        _require(
            _is_int(self.vocab_size, 1, 2**31 - 1),
            f"vocab_size {self.vocab_size!r} must be a positive number.",
        )
        _require(
            bool(self.phases)
            and set(self.phases) <= set(PHASES)
            and len(set(self.phases)) == len(self.phases),
            f"phases {self.phases} must list one or both of {', '.join(PHASES)}.",
        )
        for document in self.documents:
            _require(
                document.split is None or document.split in SPLITS,
                f"Document {document.name!r} has split {document.split!r}; choose one of "
                f"{', '.join(SPLITS)}.",
            )
        seen: set[str] = set()
        for document in self.documents:
            _require(
                document.name not in seen,
                f"Document {document.name!r} is listed twice; give every document a name of its own.",
            )
            seen.add(document.name)
        for shard in self.shards:
            _require(
                set(shard.tokens) == set(self.stacks) == set(shard.sequences),
                f"Shard {shard.file} counts stacks {sorted(shard.tokens)} but the trace has "
                f"{sorted(self.stacks)}.",
            )
        canonical_json([self.routing_control, self.extra])

    def with_(self, **changes: Any) -> TraceHeader:
        """A checked copy with some fields replaced."""
        changed = replace(self, **changes)
        changed.check()
        return changed

    def to_json(self) -> str:
        """The text of ``trace.json``, with a digest of itself under ``header_sha256``."""
        self.check()
        body = asdict(self)
        body[DIGEST_KEY] = sha256_hex(canonical_json(asdict(self)).encode())
        return canonical_json(body)

    @staticmethod
    def from_json(text: str, where: str = "trace.json") -> TraceHeader:
        """Parse and check the text of a header; ``where`` names the file in error sentences.

        Raises:
            TraceError: if it is not JSON, is incomplete, contradicts itself or was changed after it was
                written.
        """
        try:
            body = json.loads(text)
        except ValueError as error:
            raise TraceError(
                f"{where} is not valid JSON ({error}); delete it and run the collection again."
            ) from error
        _require(
            isinstance(body, dict),
            f"{where} must hold a JSON object; delete it and run the collection again.",
        )
        version = body.get("format_version")
        _require(
            version == FORMAT_VERSION,
            f"{where} has format version {version!r} but this specgate reads {FORMAT_VERSION}; install the "
            "version that wrote it or convert it again.",
        )
        plain = {key: value for key, value in body.items() if key != DIGEST_KEY}
        _require(
            body.get(DIGEST_KEY) == sha256_hex(canonical_json(plain).encode())
            and canonical_json(body) == text,
            f"{where} was changed after it was written (its digest does not match); restore it, or delete it "
            "and run the collection again to resume.",
        )
        for key, kind in (
            ("stacks", dict),
            ("files", dict),
            ("documents", list),
            ("shards", list),
            ("phases", list),
        ):
            _require(
                isinstance(plain.get(key), kind), f"{where} has no valid {key!r}; run the collection again."
            )
        plain["stacks"] = {n: _build(StackInfo, v, f"Stack {n!r}") for n, v in plain["stacks"].items()}
        plain["files"] = {n: _build(FileInfo, v, f"File {n!r}") for n, v in plain["files"].items()}
        plain["documents"] = [_build(Document, v, f"Document {i}") for i, v in enumerate(plain["documents"])]
        plain["shards"] = [_build(ShardInfo, v, f"Shard {i}") for i, v in enumerate(plain["shards"])]
        header: TraceHeader = _build(TraceHeader, plain, where)
        header.check()
        return header
