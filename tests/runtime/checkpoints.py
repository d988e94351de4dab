"""Checkpoints of tiny random models, whole and damaged, for the tests of packing and reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from specgate.moe.families import moe_layers
from tests.moe.tiny_hosts import CONFIGS, make_host

FAMILIES = tuple(CONFIGS)


def save(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """A tiny random model of a family as ``save_pretrained`` writes it.

    Args:
        more: of ``save_pretrained``, or sizes of the model.
    """
    written = {name: more.pop(name) for name in ("max_shard_size", "save_original_format") if name in more}
    model = make_host(family, **more)
    for (
        name,
        tensor,
    ) in model.named_parameters():  # biases are zero at first, and would not tell expert from expert
        if name.endswith("_bias"):
            torch.nn.init.normal_(tensor)
    model.to(dtype).save_pretrained(folder, **written)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    """The model as transformers loads it."""
    config = tf.AutoConfig.from_pretrained(folder)
    auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


def experts_of(model: Any) -> list[dict[str, Tensor]]:
    """Every expert's tensors out of ``model.state_dict()``, in running order."""
    state = model.state_dict()
    out = []
    for layer in moe_layers(model):
        names = [name for name in state if name.startswith(f"{layer.name}.experts.")]
        for expert in range(layer.num_experts):
            if model.config.model_type == "switch_transformers":
                prefix = f"{layer.name}.experts.expert_{expert}."
                mine = [name for name in names if name.startswith(prefix)]
                out.append({name[len(prefix) :].removesuffix(".weight"): state[name] for name in mine})
            else:
                out.append({name.rpartition(".")[2]: state[name][expert] for name in names})
    return out


def rewrite_header(path: Path, change: Any) -> None:
    """Rewrites the JSON header of a safetensors file: ``change`` edits its dictionary; the tensors stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
