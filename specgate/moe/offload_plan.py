"""Where a memory budget goes: dense weights, KV cache, activations, and expert slots out of what remains.

Letters: N tokens of one call, K experts per token, D hidden size, I width of an expert.

One GB is 10^9 bytes, as everywhere in specgate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from specgate.errors import BudgetError, ConfigError
from specgate.moe.families import MoELayer

GB = 10**9
LONGEST = 2048  # tokens of context that are planned for, unless the user says otherwise


@dataclass(frozen=True)
class OffloadPlan:
    """What lies where, in bytes.

    Attributes:
        model: its name.
        device: where it runs.
        dtype: of its weights.
        layers, experts, top_k: MoE layers over all stacks, experts of a layer, experts per token.
        batch_size, context: sequences and tokens of each that the cache and the activations are planned for.
        dense: weights and buffers of everything but the experts.
        kv_cache: keys and values of ``batch_size`` sequences of ``context`` tokens.
        activations: an estimate of what a call over all those tokens needs besides.
        predictor: the forecasters' weights and histories.
        slot: one expert in its slot. block: one expert as it lies in the file.
        slots: experts that the device holds at once. least_slots: that one call needs at least.
        budget: all device memory, None: as much as everything takes.
        codec: of the blocks.
        host: experts' bytes that may lie in host memory; None: the store decides.
    """

    model: str
    device: str
    dtype: str
    layers: int
    experts: int
    top_k: int
    batch_size: int
    context: int
    dense: int
    kv_cache: int
    activations: int
    predictor: int
    slot: int
    block: int
    slots: int
    least_slots: int
    budget: int | None = None
    codec: str = "none"
    host: int | None = None

    @property
    def blocks(self) -> int:
        """Experts of the model, over all layers."""
        return self.layers * self.experts

    @property
    def resident(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.slots >= self.blocks

    @property
    def fixed(self) -> int:
        """Bytes that are needed whatever the number of slots."""
        return self.dense + self.kv_cache + self.activations + self.predictor

    @property
    def used(self) -> int:
        """Device bytes in all."""
        return self.fixed + self.slots * self.slot

    def budget_for(self, slots: int) -> float:
        """The budget in GB that gives ``slots`` slots, rounded up so that it can be typed."""
        return typed_gb(self.fixed + slots * self.slot)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        more = {"blocks": self.blocks, "resident": self.resident, "used": self.used}
        return asdict(self) | more

    def table(self) -> Table:
        """The plan as a table for the terminal."""
        title = f"{self.model} on {self.device}, {self.dtype}"
        table = Table(title=title, title_justify="left")
        table.add_column("what")
        table.add_column("where")
        table.add_column("bytes", justify="right")
        table.add_column("for")
        tokens = f"{self.batch_size} x {self.context} tokens"
        rows = [
            ("dense weights", "device", self.dense, "everything but the experts"),
            ("KV cache", "device", self.kv_cache, tokens),
            ("activations (estimate)", "device", self.activations, tokens),
            ("predictor", "device", self.predictor, "weights and history"),
            ("expert slots", "device", self.slots * self.slot, self._share()),
        ]
        if self.budget is not None:
            rows.append(("free", "device", self.budget - self.used, f"of {size(self.budget)}"))
        if self.host is not None:
            held = min(self.blocks, self.host // self.block)
            rows.append(("experts", "host", held * self.block, f"{held} of {self.blocks}"))
        kept = f"{self.blocks} of {size(self.block)}, codec {self.codec}"
        rows.append(("experts", "file", self.blocks * self.block, kept))
        for what, where, count, reason in rows:
            if count or what != "predictor":
                table.add_row(what, where, size(count), reason)
        return table

    def _share(self) -> str:
        return (
            f"{self.slots} of {self.blocks} experts ({self.slots / self.blocks:.0%}), {size(self.slot)} each"
        )

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def size(count: float) -> str:
    """Bytes in words, three figures."""
    for unit in ("bytes", "KB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def typed_gb(count: int) -> float:
    """Bytes as GB with four significant figures, rounded up."""
    if count <= 0:
        return 0.0
    digits = 3 - math.floor(math.log10(count / GB))
    return round(math.ceil(count / GB * 10**digits - 1e-9) / 10**digits, max(digits, 0))


def make_plan(
    model: nn.Module,
    layers: Sequence[MoELayer],
    *,
    name: str,
    device: str,
    slot: int,
    block: int,
    codec: str,
    budget_gb: float | None,
    host_gb: float | None,
    batch_size: int,
    context: int | None,
    predictor: int,
    itemsize: int,
    dtype: str,
) -> OffloadPlan:
    """Shares a budget out.

    Args:
        model: on the meta device, without its experts' tensors.
        layers: its MoE layers.
        slot, block: bytes of an expert on the device and in the file.
        predictor: bytes of the forecasters.
        itemsize: bytes of a value of the model's dtype.
        context: None: :data:`LONGEST`, or as much as the model can if that is less.

    Raises:
        BudgetError: if not even one call's experts fit; names the least budget that works.
        ConfigError: for a number that makes no sense.
    """
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", None) or LONGEST
    context = min(LONGEST, most) if context is None else context
    for what, value in (("batch_size", batch_size), ("context", context)):
        if value < 1:
            raise ConfigError(f"{what}={value} leaves nothing to run; write 1 or more.")
    for what, gb in (("budget_gb", budget_gb), ("host_gb", host_gb)):
        if gb is not None and not (math.isfinite(gb) and gb >= 0):
            raise ConfigError(f"{what}={gb} is no amount of memory; write a number of GB.")
    top_k, experts = layers[0].top_k, layers[0].num_experts
    blocks = len(layers) * experts
    # The grouped kernels count tokens per slot with a histogram, which takes one bin for "find the range".
    least = 1 if layers[0].rule.score == "switch" else min(max(top_k, 2), blocks)
    plan = OffloadPlan(
        model=name,
        device=device,
        dtype=dtype,
        layers=len(layers),
        experts=experts,
        top_k=top_k,
        batch_size=batch_size,
        context=context,
        dense=dense_bytes(model),
        kv_cache=kv_bytes(config, batch_size, context, itemsize),
        activations=activation_bytes(config, layers, batch_size, context, itemsize, slot, device),
        predictor=predictor,
        slot=slot,
        block=block,
        slots=blocks,
        least_slots=least,
        budget=None if budget_gb is None else int(budget_gb * GB),
        codec=codec,
        host=None if host_gb is None else int(host_gb * GB),
    )
    if plan.budget is None:
        return plan
    slots = min(blocks, (plan.budget - plan.fixed) // slot)
    if slots < least:
        forecasts = f", predictor {size(predictor)}" if predictor else ""
        raise BudgetError(
            f"budget_gb={budget_gb} is too small for {name}: dense weights {size(plan.dense)}, KV cache "
            f"{size(plan.kv_cache)} and activations {size(plan.activations)} for {batch_size} x {context} "
            f"tokens{forecasts}, and {least} experts of {size(slot)} need budget_gb="
            f"{plan.budget_for(least)}; write at least that, or plan for less with context= or batch_size=."
        )
    return OffloadPlan(**asdict(plan) | {"slots": slots})


def dense_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def kv_bytes(config: Any, batch_size: int, context: int, itemsize: int) -> int:
    """Bytes of the keys and values that transformers keeps while it generates.

    Multi-head latent attention keeps the compressed form; sliding layers keep their window. An
    encoder-decoder keeps keys and values of the decoder's tokens and of the encoder's, ``context`` each.
    """
    if getattr(config, "is_encoder_decoder", False):
        per_token = 2 * config.num_heads * config.d_kv
        return batch_size * context * per_token * config.num_decoder_layers * 2 * itemsize
    from transformers import DynamicCache

    if getattr(config, "kv_lora_rank", None):
        per_token = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    layers = DynamicCache(config=config).layers
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    windows += [None] * (config.num_hidden_layers - len(windows))
    tokens = sum(context if w is None else min(context, w) for w in windows)
    return batch_size * tokens * per_token * itemsize


def activation_bytes(
    config: Any,
    layers: Sequence[MoELayer],
    batch_size: int,
    context: int,
    itemsize: int,
    slot: int,
    device: str,
) -> int:
    """An estimate of the transient memory of one call over ``batch_size * context`` tokens.

    Counted are the experts' inputs, intermediate and output rows (the largest part), some copies of the
    hidden states, and the last token's logits in float32 as ``generate`` keeps them. Not counted: attention
    scores (attention that does not write them out is assumed) and logits of all tokens. On a GPU transformers
    decodes with ``batched_mm``, which copies the experts that are used.
    """
    layer = layers[0]
    hidden = int(config.hidden_size)
    width = int(getattr(config, "moe_intermediate_size", None) or _width(config))
    tokens = batch_size * context
    rows = tokens * layer.top_k
    prefill = (rows * (5 * hidden + 4 * width) + tokens * 6 * hidden) * itemsize
    decode = batch_size * layer.top_k * slot if device.startswith("cuda") else 0
    return max(prefill, decode) + 3 * 4 * batch_size * int(config.vocab_size)


def _width(config: Any) -> int:
    return int(getattr(config, "intermediate_size", None) or config.d_ff)
