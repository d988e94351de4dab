"""A model whose experts are padded with zeros: its own routing and text, with experts of a real model's size.

The rows and columns that are added to an expert's inner width are zero, and so is what they give:
silu(0) * 0, relu(0), (0 + 1) * 0 in GPT-OSS. The model generates what it generated before; only the bytes
that an expert takes, and its products, grow.

Letters: E experts of a layer, I width of an expert, J the padded one, D hidden size.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from specgate.errors import ConfigError
from specgate.moe.families import find_family
from specgate.moe.hosts import quiet_imports, resolve_model

#: Family -> the field of its configuration that holds I.
WIDTHS = {
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "gpt_oss": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
    "switch_transformers": "d_ff",  # of its dense layers too, which are padded with the experts
}
MULTIPLE = 64  # of J
SHARD = 1 << 30  # bytes
_ONE = re.compile(r"\.experts\.(?:expert_)?\d+\.(\w+)\.weight$")
_DENSE_SWITCH = re.compile(r"\.mlp\.(wi|wo)\.weight$")
_STACKED = re.compile(r"\.experts\.(gate_up_proj|gate_up_proj_bias|down_proj)$")
_WIDE_ROWS, _WIDE_COLUMNS = {"gate_proj", "up_proj", "w1", "w3", "wi"}, {"down_proj", "w2", "wo"}


def padded_width(shape: tuple[int, int, int], mib: float, itemsize: int) -> int:
    """The least J, a multiple of 64, with which an expert takes ``mib`` MiB.

    Args:
        shape: matrices of an expert, D, I. itemsize: bytes of a weight.

    Raises:
        ConfigError: experts that are larger already, or no number of MiB.
    """
    matrices, D, width = shape
    if not (math.isfinite(mib) and mib > 0):
        raise ConfigError(f"live.expert_mib={mib} is no size; write a number of MiB above 0.")
    padded = MULTIPLE * math.ceil(mib * 2**20 / (matrices * D * itemsize * MULTIPLE))
    if padded < width:
        own = matrices * D * width * itemsize / 2**20
        raise ConfigError(
            f"live.expert_mib={mib:g} is less than the {own:.3g} MiB that an expert has; write more."
        )
    return padded


def save_padded(model: str, mib: float, folder: Path, dtype: torch.dtype) -> Path:
    """Writes a model with padded experts, and its tokenizer; a tensor at a time, a shard of 1 GiB in memory.

    Args:
        model: a bundled name or a directory.
        mib: of an expert once it is loaded as ``dtype``, at least.

    Raises:
        ConfigError: a model that cannot be padded so, or a size that makes no sense.
    """
    quiet_imports()
    import transformers

    source = resolve_model(model)
    if not isinstance(source, Path):
        raise ConfigError(
            f"live.expert_mib pads models of this machine; download {model} and give its directory."
        )
    config: Any = transformers.AutoConfig.from_pretrained(source)
    family = find_family(config).name
    if family not in WIDTHS:
        raise ConfigError(
            f"Experts of {family} cannot be padded alone, since its shared experts are as wide; give a model "
            f"of {', '.join(WIDTHS)}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{model} is quantised and cannot be padded; give a checkpoint of plain weights.")
    width, D = int(getattr(config, WIDTHS[family])), int(config.hidden_size)
    matrices = 2 if family == "switch_transformers" else 3
    padded = padded_width((matrices, D, width), mib, dtype.itemsize)
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    number = size = total = 0

    def flush() -> None:
        nonlocal number, size
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()
        number, size = number + 1, 0

    for name, tensor in _tensors(source):
        shard[name] = padded_tensor(name, tensor, family, width, padded).contiguous()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size > SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja") and "safetensors" not in file.name:
            shutil.copy(file, folder)
    fields = json.loads((source / "config.json").read_text())
    fields |= {WIDTHS[family]: padded}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def padded_tensor(name: str, tensor: Tensor, family: str, width: int, padded: int) -> Tensor:
    """A tensor of a checkpoint with J in the place of I, or as it is if it has no I."""
    more = padded - width
    one, stacked = _ONE.search(name), _STACKED.search(name)
    if family == "switch_transformers":
        one = one or _DENSE_SWITCH.search(name)
    if one and one[1] in _WIDE_ROWS:
        return pad(tensor, (0, 0, 0, more))
    if one and one[1] in _WIDE_COLUMNS:
        return pad(tensor, (0, more))
    if not stacked:
        return tensor
    if family == "gpt_oss":  # gate and up side by side: [E, D, 2I], [E, 2I], [E, I, D]
        return pad(tensor, (0, 0, 0, more) if stacked[1] == "down_proj" else (0, 2 * more))
    if stacked[1] == "down_proj":  # [E, D, I]
        return pad(tensor, (0, more))
    gate, up = tensor.chunk(2, dim=1)  # of [E, 2I, D]
    return torch.cat([pad(gate, (0, 0, 0, more)), pad(up, (0, 0, 0, more))], dim=1)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no safetensors weights; convert the model with save_pretrained.")
    for file in files:
        with safe_open(file, "pt") as found:
            for name in found.keys():  # noqa: SIM118
                yield name, found.get_tensor(name)
