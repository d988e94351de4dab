"""A host's own layers as plain tensors: attention, norms, router, experts and embedding of one stack.

Letters: L layers, E experts, D hidden size, I width of an expert, A width of all query heads together, C
width of all key heads together, V token ids, R buckets of relative positions, H heads.

For running a host's layers without transformers. Two families, those of the bundled reference models: OLMoE
(rotary positions, gated experts) and Switch Transformers (relative position bias, plain experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from specgate.errors import UnknownArchitectureError
from specgate.moe.families import MoELayer, moe_layers, router_tensors

SUPPORTED = ("olmoe", "switch_transformers")


def anatomy(model: nn.Module, stack: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What it takes to run a stack's layers.

    Returns:
        Plain values (``family``, ``stack``, ``heads``, ``key_heads``, ``eps``, ``rule`` and what else the
        family has: ``theta``, ``clip``, ``buckets``, ``max_distance``), and float32 tensors: ``embedding [V,
        D]``, ``attention_norm [L, D]``, ``query [L, A, D]``, ``key, value [L, C, D]``, ``output [L, D, A]``,
        ``norm [L, D]``, ``router [L, E, D]``, ``up [L, E, I, D]`` (OLMoE: ``[L, E, 2 I, D]``, gate first),
        ``down [L, E, D, I]``; OLMoE ``query_norm [L, A]``, ``key_norm [L, C]``; Switch ``bias [R, H]``.

    Raises:
        UnknownArchitectureError: for another family, or a stack with dense layers between the MoE layers.
    """
    layers = [layer for layer in moe_layers(model) if layer.stack == stack]
    family = layers[0].family.name if layers else ""
    if family not in SUPPORTED:
        raise UnknownArchitectureError(
            f"the layers of {family or 'a model without ' + stack!r} cannot be run here: choose a host of"
            f" {' or '.join(SUPPORTED)}"
        )
    config: Any = model.config
    plain: dict[str, Any] = {"family": family, "stack": stack, "rule": asdict(layers[0].rule)}
    if family == "olmoe":
        blocks: Any = model.get_submodule("model.layers")
        parts = [_olmoe_layer(block) for block in blocks]
        plain |= {
            "heads": config.num_attention_heads,
            "key_heads": config.num_key_value_heads,
            "eps": config.rms_norm_eps,
            "theta": float(config.rope_parameters["rope_theta"]),
            "clip": config.clip_qkv,
        }
        embedding: Any = model.get_submodule("model.embed_tokens")
        shared = {"embedding": embedding.weight}
    else:
        blocks = model.get_submodule(f"{stack}.block")
        parts = [_switch_layer(block) for block in blocks]
        attention = blocks[0].layer[0].SelfAttention
        plain |= {
            "heads": config.num_heads,
            "key_heads": config.num_heads,
            "eps": config.layer_norm_epsilon,
            "buckets": config.relative_attention_num_buckets,
            "max_distance": config.relative_attention_max_distance,
        }
        table: Any = model.get_submodule(stack)
        shared = {"embedding": table.embed_tokens.weight, "bias": attention.relative_attention_bias.weight}
    if len(parts) != len(layers):
        raise UnknownArchitectureError(
            f"{len(parts) - len(layers)} of {len(parts)} layers of the {stack} are dense: choose a host whose"
            " layers are all MoE layers"
        )
    tensors = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    tensors |= _routers(layers) | shared
    return plain, {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}


def _routers(layers: Sequence[MoELayer]) -> dict[str, Tensor]:
    found = [router_tensors(layer) for layer in layers]
    return {
        "norm": torch.stack([f["norm_weight"] for f in found]),
        "router": torch.stack([f["router_weight"] for f in found]),
    }


def _olmoe_layer(block: Any) -> dict[str, Tensor]:
    attention, experts = block.self_attn, block.mlp.experts
    return {
        "attention_norm": block.input_layernorm.weight,
        "query": attention.q_proj.weight,
        "key": attention.k_proj.weight,
        "value": attention.v_proj.weight,
        "output": attention.o_proj.weight,
        "query_norm": attention.q_norm.weight,
        "key_norm": attention.k_norm.weight,
        "up": experts.gate_up_proj,
        "down": experts.down_proj,
    }


def _switch_layer(block: Any) -> dict[str, Tensor]:
    attention, feed = block.layer[0], block.layer[-1].mlp
    found = {
        "attention_norm": attention.layer_norm.weight,
        "query": attention.SelfAttention.q.weight,
        "key": attention.SelfAttention.k.weight,
        "value": attention.SelfAttention.v.weight,
        "output": attention.SelfAttention.o.weight,
    }
    experts = getattr(feed, "experts", None)
    if experts is not None:
        each = [experts[f"expert_{e}"] for e in range(len(experts))]
        found |= {
            "up": torch.stack([expert.wi.weight for expert in each]),
            "down": torch.stack([expert.wo.weight for expert in each]),
        }
    return found
