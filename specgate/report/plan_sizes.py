"""A model's sizes as the planner needs them, from its configuration alone: no weights are read.

Letters: L MoE layers of the stack that decodes, E experts of a layer, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specgate.errors import ConfigError
from specgate.moe.families import MoELayer
from specgate.moe.offload_plan import activation_bytes, kv_bytes
from specgate.policy.roofline import Attention, ModelSizes
from specgate.report.replay_shape import ModelShape, block_name


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model that must lie somewhere.

    Attributes:
        dense: weights of everything but the experts.
        kv_cache: keys and values of all sequences.
        activations: an estimate of what a call over the whole context needs besides.
        slot: one expert on the device. block: one expert in host memory and in the file.
        blocks: experts of the model, over all layers and stacks.
        decoding: of them, those that decoding uses (an encoder's are not).
        least: that one call of one token needs at once.
    """

    dense: int
    kv_cache: int
    activations: int
    slot: int
    block: int
    blocks: int
    decoding: int
    least: int

    @property
    def fixed(self) -> int:
        """Bytes on the device whatever the number of slots."""
        return self.dense + self.kv_cache + self.activations


def footprint(
    shape: ModelShape, context: int, batch_size: int, codec: str, device: str = "cuda"
) -> Footprint:
    """The bytes of a shape; the same arithmetic as ``specgate.offload`` plans by.

    Args:
        context: tokens of each sequence.

    Raises:
        ConfigError: for an unknown codec.
    """
    layout, itemsize = shape.layout(codec), shape.torch_dtype.itemsize
    layers = shape.moe_layers
    config = shape.transformers_config
    blocks = len(layers) * shape.experts
    experts = blocks * shape.expert_parameters
    return Footprint(
        dense=(shape.parameters - experts) * itemsize,
        kv_cache=kv_bytes(config, batch_size, context, itemsize),
        activations=activation_bytes(
            config, layers, batch_size, context, itemsize, layout.slot_bytes, device
        ),
        slot=layout.slot_bytes,
        block=layout.block_bytes,
        blocks=blocks,
        decoding=len(decoding_layers(shape)) * shape.experts,
        least=1 if shape.top_k == 1 else min(max(shape.top_k, 2) * batch_size, shape.experts),
    )


def decoding_layers(shape: ModelShape) -> list[MoELayer]:
    """The MoE layers that run for every token that is generated."""
    return [layer for layer in shape.moe_layers if layer.stack == "decoder"]


def check_decoding(sizes: ModelSizes, trace: str, layers: int, experts: int, top_k: int) -> None:
    """Refuses a trace whose layers are not those of the model that decode.

    Raises:
        ConfigError: naming both.
    """
    have, want = (layers, experts, top_k), (sizes.layers, sizes.experts, sizes.top_k)
    if have != want:
        raise ConfigError(
            f"Trace {trace} routes {have[0]} layers, {have[2]} of {have[1]} experts, and shape {sizes.name} "
            f"decodes with {want[0]} layers, {want[2]} of {want[1]}; choose the shape= that fits, or another "
            "data=."
        )


def sizes_of(shape: ModelShape) -> ModelSizes:
    """A shape in plain numbers, as :mod:`specgate.policy.roofline` wants them."""
    layers, skeleton = decoding_layers(shape), shape.skeleton
    where = {int(block_name(layer.name).rpartition(".")[2]): i for i, layer in enumerate(layers)}
    stack: Any = skeleton.get_submodule(block_name(layers[0].name).rpartition(".")[0])
    stretches, stretch = [0] * (len(layers) + 1), 0
    attentions: list[Attention] = []
    windows = _windows(shape.transformers_config, len(stack))
    for number, block in enumerate(stack):
        weights = sum(p.numel() for p in block.parameters())
        attentions += _attentions(shape.transformers_config, stretch, windows[number])
        if number in where:
            weights -= shape.experts * shape.expert_parameters
        stretches[stretch] += weights
        if number in where:
            stretch = where[number] + 1
    return ModelSizes(
        name=shape.name,
        layers=len(layers),
        experts=shape.experts,
        top_k=shape.top_k,
        expert_parameters=shape.expert_parameters,
        slot_bytes=shape.layout().slot_bytes,
        itemsize=shape.torch_dtype.itemsize,
        stretch_parameters=tuple(stretches[:-1]),
        step_parameters=stretches[-1] + shape.vocabulary * shape.hidden,
        attentions=tuple(attentions),
    )


def _windows(config: Any, layers: int) -> list[int]:
    """Tokens that each layer's attention looks back at; 0: all."""
    if getattr(config, "is_encoder_decoder", False):
        return [0] * layers
    from transformers import DynamicCache

    found = [getattr(layer, "sliding_window", None) or 0 for layer in DynamicCache(config=config).layers]
    return found + [0] * (layers - len(found))


def _attentions(config: Any, stretch: int, window: int) -> list[Attention]:
    """Those of one transformer layer."""
    if getattr(config, "is_encoder_decoder", False):  # its own tokens, and the encoder's
        width = config.num_heads * config.d_kv
        return [Attention(stretch, 2 * width, 2 * width)] * 2
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        rank, turned = config.kv_lora_rank, config.qk_rope_head_dim
        keys, values = config.qk_nope_head_dim, config.v_head_dim
        scored, expanded = heads * (keys + turned + values), rank * heads * (keys + values)
        return [Attention(stretch, rank + turned, scored, window, expanded)]
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return [Attention(stretch, 2 * head * groups, 2 * head * heads, window)]
