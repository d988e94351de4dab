"""What one layer of a host costs per token, counted from its configuration.

Letters: D hidden size, I width of an expert, E experts, K experts per token.

A multiply-add counts as two operations; norms, activations, softmax and rotations are left out, as usual
(Kaplan et al., 2020, arXiv:2001.08361, table 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specgate.moe.families import find_family


@dataclass(frozen=True)
class LayerFlops:
    """Operations per token of one MoE layer with its attention.

    Attributes:
        projections: queries, keys, values, output (and the queries and output of a cross-attention).
        mixing: scores and weighted values over the keys attended to.
        router: logits of all experts.
        expert: one expert.
        shared: experts that every token uses besides.
        top_k: experts per token.
    """

    projections: float
    mixing: float
    router: float
    expert: float
    shared: float
    top_k: int

    @property
    def attention(self) -> float:
        """Projections and mixing."""
        return self.projections + self.mixing

    @property
    def active(self) -> float:
        """What a token costs: attention, router, K experts, shared experts."""
        return self.attention + self.router + self.top_k * self.expert + self.shared


def layer_flops(config: Any, keys: float, stack: str = "decoder") -> LayerFlops:
    """The cost of a MoE layer of a supported architecture.

    Args:
        config: transformers' configuration of the host.
        keys: positions that a token attends to, on average: the context while decoding, half of it for a
            causal stack that reads it whole, all of it for an encoder. A sliding window bounds it.
        stack: a Switch decoder has a cross-attention besides, to ``keys`` positions too (the encoder's keys
            and values are computed once per text and not counted).

    Raises:
        UnknownArchitectureError: for an architecture that is not in the table of families.
    """
    family = find_family(config)
    switch = family.name == "switch_transformers"
    D = config.d_model if switch else config.hidden_size
    projections, per_key = _latent(config) if family.name.startswith("deepseek") else _grouped(config, switch)
    if switch and stack == "decoder":
        inner = config.num_heads * config.d_kv
        projections += 2 * 2 * D * inner
        per_key *= 2
    width = (
        config.d_ff if switch else getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    )
    matrices = 2 if switch else 3
    shared = float(getattr(config, "shared_expert_intermediate_size", 0) or 0)
    shared_flops = 2 * 3 * D * shared + (2 * D if shared else 0)
    shared_flops += 2 * 3 * D * width * int(getattr(config, "n_shared_experts", 0) or 0)
    return LayerFlops(
        projections=float(projections),
        mixing=float(per_key * _keys(config, keys)),
        router=float(2 * D * getattr(config, family.num_experts)),
        expert=float(2 * matrices * D * width),
        shared=float(shared_flops),
        top_k=family.rule(config).top_k,
    )


def _grouped(config: Any, switch: bool) -> tuple[float, float]:
    """Attention with heads that may share keys: operations of its projections, and per key."""
    D = config.d_model if switch else config.hidden_size
    heads = config.num_heads if switch else config.num_attention_heads
    key_heads = heads if switch else getattr(config, "num_key_value_heads", None) or heads
    width = config.d_kv if switch else getattr(config, "head_dim", None) or D // heads
    return 2 * D * width * (2 * heads + 2 * key_heads), 2 * 2 * heads * width


def _latent(config: Any) -> tuple[float, float]:
    """Multi-head latent attention (DeepSeek): operations of its projections, and per key."""
    D, heads = config.hidden_size, config.num_attention_heads
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    low = config.q_lora_rank
    query = D * low + low * heads * key if low else D * heads * key
    rank = config.kv_lora_rank
    key_value = D * (rank + config.qk_rope_head_dim) + rank * heads * (config.qk_nope_head_dim + value)
    return 2 * (query + key_value + heads * value * D), 2 * heads * (key + value)


def _keys(config: Any, keys: float) -> float:
    """Keys per layer where some layers see a sliding window only, averaged over layers."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds or not window:
        return keys
    near = sum(kind == "sliding_attention" for kind in kinds) / len(kinds)
    return near * min(keys, float(window)) + (1 - near) * keys
