"""The table of expert weights: which tensors of a checkpoint make one expert, as its class holds them.

Beside the table of architectures (``families.py``), and written for the same versions of transformers: their
``conversion_mapping.py`` merges the same tensors when it loads a model.

Letters: E experts of a layer, I width of an expert, D hidden size.

=====================================  ==============================  =======================================
family                                 in memory, one expert           in a checkpoint
=====================================  ==============================  =======================================
mixtral                                gate_up_proj [2I, D]            w1 [I, D] above w3 [I, D]
                                       down_proj [D, I]                w2 [D, I]
olmoe, qwen2_moe, qwen3_moe,           gate_up_proj [2I, D]            gate_proj [I, D] above up_proj [I, D]
deepseek_v2, deepseek_v3               down_proj [D, I]                down_proj [D, I]
gpt_oss                                gate_up_proj [D, 2I], its bias  stacked: the same with E before it
                                       down_proj [I, D], its bias
switch_transformers                    wi [I, D], wo [D, I]            the same
=====================================  ==============================  =======================================

Families with per-expert tensors are also read stacked (``gate_up_proj [E, 2I, D]``), as they are when saved
with ``save_original_format=False``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from specgate.errors import CheckpointError, UnknownArchitectureError
from specgate.moe.families import MoELayer, find_family, moe_layers


@dataclass(frozen=True)
class Form:
    """One way in which a checkpoint keeps the experts of a layer.

    Attributes:
        pieces: name of a piece -> its tensors under the experts' prefix, one above the other along the rows;
            ``{e}`` is the expert's number.
        stacked: whether a tensor holds all experts, one behind the other along its first axis.
    """

    pieces: dict[str, tuple[str, ...]]
    stacked: bool = False


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, or one expert's slice of it.

    Attributes:
        tensor: its name.
        index: along the first axis; None is the whole tensor.
    """

    tensor: str
    index: int | None = None


_STACKED = Form({"gate_up_proj": ("gate_up_proj",), "down_proj": ("down_proj",)}, stacked=True)
_BY_NAME = Form(
    {
        "gate_up_proj": ("{e}.gate_proj.weight", "{e}.up_proj.weight"),
        "down_proj": ("{e}.down_proj.weight",),
    }
)
_BY_NUMBER = Form({"gate_up_proj": ("{e}.w1.weight", "{e}.w3.weight"), "down_proj": ("{e}.w2.weight",)})
_WITH_BIAS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

#: Family -> the forms that its checkpoints come in; the first one whose names are there is read.
FORMS: dict[str, tuple[Form, ...]] = {
    "switch_transformers": (Form({"wi": ("expert_{e}.wi.weight",), "wo": ("expert_{e}.wo.weight",)}),),
    "mixtral": (_BY_NUMBER, _STACKED),
    "olmoe": (_BY_NAME, _STACKED),
    "qwen2_moe": (_BY_NAME, _STACKED),
    "qwen3_moe": (_BY_NAME, _STACKED),
    "deepseek_v2": (_BY_NAME, _STACKED),
    "deepseek_v3": (_BY_NAME, _STACKED),
    "gpt_oss": (Form({name: (name,) for name in _WITH_BIAS}, stacked=True),),
}
#: Family -> what the MoE block is called in a checkpoint, where it is not called as in memory.
_RENAMED = {"mixtral": (".mlp.", ".block_sparse_moe.")}


def skeleton(config: Any) -> list[MoELayer]:
    """The MoE layers of a configuration, in running order, on the meta device: shapes and names, no weights.

    Raises:
        UnknownArchitectureError: no adapter, a broken implementation, or no MoE layer.
    """
    family = find_family(config)
    auto = transformers.AutoModelForSeq2SeqLM if len(family.stacks) > 1 else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    return moe_layers(model)


def piece_shapes(layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """Name and shape of one expert's tensors, as the class that executes them holds them."""
    if isinstance(layer.experts, nn.ModuleDict):
        return {
            name.removesuffix(".weight"): tuple(tensor.shape)
            for name, tensor in layer.experts["expert_0"].named_parameters()
        }
    found: dict[str, tuple[int, ...]] = {}
    for name in FORMS[layer.family.name][0].pieces:
        tensor: Tensor = getattr(layer.experts, name)
        found[name] = tuple(tensor.shape[1:])
    return found


def expert_parts(layer: MoELayer, names: Collection[str]) -> list[dict[str, tuple[Part, ...]]]:
    """For each expert of a layer: piece -> the tensors that make it, one above the other along the rows.

    Args:
        layer: of :func:`skeleton`, or of a model.
        names: of all tensors in the checkpoint.

    Raises:
        CheckpointError: if a tensor is missing; it is named.
        UnknownArchitectureError: for experts in MXFP4, whose tensors are none of this table's.
    """
    best: list[dict[str, tuple[Part, ...]]] = []
    least = -1
    for prefix in _prefixes(layer):
        if f"{prefix}.gate_up_proj_blocks" in names:
            raise UnknownArchitectureError(quantised("mxfp4"))
        for form in FORMS[layer.family.name]:
            found = [_parts(form, prefix, expert) for expert in range(layer.num_experts)]
            there = sum(part.tensor in names for part in _flat(found))
            if there > least:
                best, least = found, there
    missing = [part.tensor for part in _flat(best) if part.tensor not in names]
    if missing:
        more = f" and {len(set(missing)) - 1} more of that layer" if len(set(missing)) > 1 else ""
        raise CheckpointError(
            f"The checkpoint lacks the expert tensor {missing[0]}{more}; copy or download it again."
        )
    return best


def quantised(method: str) -> str:
    """Why a quantised checkpoint is refused, and how to turn it into one that is not."""
    remedies = {
        "mxfp4": "load it with quantization_config=Mxfp4Config(dequantize=True), save_pretrained it and give "
        "that directory",
        "fp8": "load it with quantization_config=FineGrainedFP8Config(dequantize=True), save_pretrained it "
        "and give that directory",
    }
    remedy = remedies.get(method, "give the checkpoint that it was made from")
    return f"The experts of this checkpoint are quantised ({method}), which no codec reads; {remedy}."


def _prefixes(layer: MoELayer) -> list[str]:
    """What the experts' module may be called in a checkpoint, the usual name first."""
    plain = f"{layer.name}.experts"
    usual = plain.replace(*_RENAMED.get(layer.family.name, ("", "")))
    return [name for whole in (usual, plain) for name in (whole, whole.removeprefix("model."))]


def _parts(form: Form, prefix: str, expert: int) -> dict[str, tuple[Part, ...]]:
    index = expert if form.stacked else None
    return {
        piece: tuple(Part(f"{prefix}.{name.format(e=expert)}", index) for name in tensors)
        for piece, tensors in form.pieces.items()
    }


def _flat(experts: list[dict[str, tuple[Part, ...]]]) -> Iterator[Part]:
    for pieces in experts:
        for parts in pieces.values():
            yield from parts
