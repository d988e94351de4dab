"""What a collection is going to do: which windows, which header, how many tokens and bytes, on which disk.

Letters: N flat tokens, L MoE layers, K experts per token, D hidden size.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console

import specgate
from specgate.errors import ConfigError, SpecgateError
from specgate.moe.batches import BatchRunner, Settings
from specgate.moe.families import router_tensors
from specgate.moe.hosts import Host
from specgate.moe.text import SPLITS, TextDocument
from specgate.moe.windows import Window, cut_prompts, cut_windows, select, tokenise
from specgate.traces.schema import Document, StackInfo, TraceHeader, expert_dtype
from specgate.traces.store import StackArrays

SHARD_BYTES = 256_000_000  # a shard is held in memory until it is written
SLACK = 1.05  # disk space asked for, over what the arrays take


@dataclass
class Job:
    """A planned collection.

    Attributes:
        windows: the chosen windows in the order in which they are traced.
        header: the trace's header, without shards.
        plan: what determines the trace, plain JSON.
        tokens: tokens per stack (an upper bound while decoding: a text may end early).
        bytes: size of the arrays on disk (likewise).
        batches_per_shard: batches that share a shard, as many as fit SHARD_BYTES.
    """

    runner: BatchRunner
    windows: list[Window]
    header: TraceHeader
    plan: dict[str, Any]
    tokens: dict[str, int]
    bytes: int
    batches_per_shard: int

    @property
    def num_shards(self) -> int:
        """How many shards the trace has."""
        return -(-self.num_batches // self.batches_per_shard)

    @property
    def num_batches(self) -> int:
        """How many batches there are to run."""
        return -(-len(self.windows) // self.runner.settings.batch_size)

    def batches_of(self, shard: int) -> range:
        """Numbers of the batches that make a shard."""
        per = self.batches_per_shard
        return range(shard * per, min((shard + 1) * per, self.num_batches))

    def batch(self, number: int) -> list[Window]:
        """The windows of a batch."""
        size = self.runner.settings.batch_size
        return self.windows[number * size : (number + 1) * size]


def prepare(host: Host, documents: list[TextDocument], settings: Settings) -> Job:
    """Tokenises, chooses the windows and writes down the plan.

    Raises:
        TextError: if no document is long enough.
        ConfigError: if the settings do not fit the model.
    """
    text = tokenise(host.tokenizer, documents)
    seq2seq = len(host.family.stacks) > 1
    decoding = settings.phase == "decode"
    config: Any = host.model.config
    longest = getattr(config, "max_position_embeddings", None)
    needed = settings.length + (settings.prompt_length if decoding and not seq2seq else 0)
    if longest is not None and needed > longest:
        raise ConfigError(f"{needed} tokens do not fit the model's {longest} positions; lower length.")
    if decoding:
        candidates = cut_prompts(text, settings.prompt_length)
    else:
        candidates = cut_windows(text, settings.length, seq2seq)
    windows = select(candidates, text.documents, settings.sequences, settings.seed)
    used = sorted({w.document for w in windows})
    runner = BatchRunner(host, text, settings, {number: place for place, number in enumerate(used)})
    listed = [_document(text.documents[number]) for number in used]
    stacks = {name: _stack_info(host, runner, name) for name in runner.layers}
    header = TraceHeader(
        model_id=host.model_id,
        revision=host.revision,
        family=host.family.name,
        stacks=stacks,
        vocab_size=int(config.vocab_size),
        transformers_version=transformers.__version__,
        specgate_version=specgate.__version__,
        seed=settings.seed,
        phases=[settings.phase],
        documents=listed,
        extra={
            "settings": asdict(settings),
            "routing_rules": {name: asdict(layers[0].rule) for name, layers in runner.layers.items()},
            "dtype": str(host.model.dtype).removeprefix("torch."),
        },
    )
    tokens = {name: _tokens(name, windows, text.prefix, settings, seq2seq) for name in stacks}
    size = sum(tokens[name] * _bytes_per_token(info) for name, info in stacks.items())
    plan = {
        "model": [host.model_id, host.revision, str(host.model.dtype), host.device.type],
        **asdict(settings),
        "text": hashlib.sha256("".join(d.name + d.sha256 for d in listed).encode()).hexdigest(),
        "windows": _fingerprint(windows, text.ids, text.prefix),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "specgate": specgate.__version__,
        },
    }
    per_batch = max(1, settings.batch_size * size // len(windows))
    per_shard = min(-(-settings.shard_sequences // settings.batch_size), max(1, SHARD_BYTES // per_batch))
    return Job(runner, windows, header, plan, tokens, size, per_shard)


def _fingerprint(windows: list[Window], ids: list[Any], prefix: list[int]) -> str:
    """A hash of every token id that the windows hold, so that another tokeniser is another plan."""
    digest = hashlib.sha256(np.array(prefix, dtype=np.int64).tobytes())
    for w in windows:
        digest.update(np.array(w, dtype=np.int64).tobytes() + ids[w.document][w.start : w.stop].tobytes())
    return digest.hexdigest()


def describe(job: Job, out: Path, console: Console) -> None:
    """Prints what is going to be collected: tokens, bytes, where."""
    s, header = job.runner.settings, job.header
    splits = dict.fromkeys(SPLITS, 0)
    for w in job.windows:
        splits[job.runner.text.documents[w.document].split] += 1
    console.print(
        f"[bold]{header.model_id}[/] ({job.runner.host.family.title}, {header.extra['dtype']}), {s.phase}: "
        f"{len(job.windows):,} sequences from {len(header.documents):,} documents, {len(header.domains)} "
        f"domains ({', '.join(f'{n:,} {split}' for split, n in splits.items())})"
    )
    if len(job.windows) < s.sequences:
        console.print(f"The text holds no more than that: {s.sequences:,} sequences were asked for.")
    if missing := [split for split, n in splits.items() if not n]:
        console.print(
            f"[yellow]No sequence falls into {' or '.join(missing)}: give more documents for that.[/]"
        )
    at_most = "at most " if s.phase == "decode" else ""
    for name, info in header.stacks.items():
        kept = "no hidden states"
        if info.hidden_layers is not None:
            kept = (
                f"{info.hidden_dtype} hidden states ({info.hidden_size}) of {len(info.hidden_layers)} layers"
            )
        console.print(
            f"  {name}: {info.layers} MoE layers, top-{info.top_k} of {info.experts} experts, {kept}, "
            f"{at_most}{job.tokens[name]:,} tokens"
        )
    console.print(f"  {at_most}{_size(job.bytes)} in {job.num_shards} shards at {out}")


def check_space(job: Job, out: Path) -> None:
    """Raises SpecgateError if the disk cannot hold what is still to be written."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    there = sum(f.stat().st_size for f in (out / "shards").glob("*.safetensors"))
    needed, free = int((job.bytes - there) * SLACK), shutil.disk_usage(place).free
    if needed > free:
        raise SpecgateError(
            f"The trace needs {_size(needed)} but the disk of {place} has {_size(free)} free; choose "
            "hidden=int8 or hidden=none, fewer sequences, or out= on another disk."
        )


def _document(document: TextDocument) -> Document:
    return Document(
        document.name, document.domain, document.split, hashlib.sha256(document.text.encode()).hexdigest()
    )


def _stack_info(host: Host, runner: BatchRunner, name: str) -> StackInfo:
    layers = runner.layers[name]
    hidden = runner.settings.hidden
    switch = layers[0].rule.score == "switch"
    return StackInfo(
        layers=len(layers),
        experts=layers[0].num_experts,
        top_k=layers[0].top_k,
        hidden_size=int(router_tensors(layers[0])["router_weight"].shape[1]),
        layer_map=[layer.name for layer in layers],
        hidden_layers=runner.recorder.hidden_layers[name] if hidden != "none" else None,
        hidden_dtype=hidden,
        has_dropped=switch,
        score_semantics=host.family.semantics,
        expert_capacity=layers[0].rule.capacity,
    )


def _tokens(stack: str, windows: list[Window], prefix: list[int], settings: Settings, seq2seq: bool) -> int:
    """Tokens that a stack will leave in the trace (an upper bound while decoding)."""
    if settings.phase == "decode":
        return len(windows) * settings.length
    if seq2seq and stack == "decoder":
        return sum(w.stop - w.cut for w in windows)
    return sum(w.cut - w.start + len(prefix) for w in windows)


def _bytes_per_token(info: StackInfo) -> int:
    per_choice = expert_dtype(info.experts).itemsize + 2
    per_token = 8 + info.layers * info.top_k * per_choice + info.layers * info.has_dropped
    kept = len(info.hidden_layers or [])
    width = {"none": 0, "fp16": 2 * (info.hidden_size or 0), "int8": (info.hidden_size or 0) + 2}
    return per_token + kept * width[info.hidden_dtype]


def no_arrays(info: StackInfo) -> StackArrays:
    """Arrays of a shard in which every text ended before a single step."""
    kept, width = len(info.hidden_layers or []), info.hidden_size or 0
    kind = np.int8 if info.hidden_dtype == "int8" else np.float16
    return StackArrays(
        experts=np.zeros((0, info.layers, info.top_k), expert_dtype(info.experts)),
        weights=np.zeros((0, info.layers, info.top_k), np.float16),
        token_ids=np.zeros(0, np.int32),
        positions=np.zeros(0, np.int32),
        seq_offsets=np.zeros(1, np.int64),
        seq_document=np.zeros(0, np.int32),
        seq_phase=np.zeros(0, np.uint8),
        dropped=np.zeros((0, info.layers), np.uint8) if info.has_dropped else None,
        hidden=np.zeros((0, kept, width), kind) if info.hidden_dtype != "none" else None,
        hidden_scale=np.zeros((0, kept), np.float16) if info.hidden_dtype == "int8" else None,
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
