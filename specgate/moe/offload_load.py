"""Loads a Mixture-of-Experts model without its experts.

The model's class is subclassed for the time of loading: its ``__init__`` (which transformers runs on the meta
device) turns every experts module into one without tensors, so that ``from_pretrained`` knows of no expert
tensor and reads none. Afterwards the model is of its own class again. Nothing of transformers is patched.
"""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import cached_file

from specgate.errors import CheckpointError, ConfigError, UnknownArchitectureError
from specgate.moe.expert_tensors import quantised
from specgate.moe.families import Family, MoELayer, find_family, moe_layers
from specgate.moe.hosts import DTYPES, readable_errors, resolve_model
from specgate.moe.offload_experts import empty_experts
from specgate.moe.offload_kernels import IMPLEMENTATIONS

#: Held while transformers builds a model: it patches itself meanwhile, for all threads.
BUILDING = threading.RLock()


@dataclass(frozen=True)
class Blueprint:
    """A model that is known but not loaded.

    Attributes:
        path: its directory, or its name on the hub.
        revision: branch, tag or commit on the hub, or None.
        config: as transformers reads it.
        family: its row of the table of architectures.
        dtype: of its weights.
        model: the model on the meta device, without its experts' tensors.
        layers: its MoE layers in running order.
        shapes: shapes of one expert's tensors, by name.
    """

    path: Path | str
    revision: str | None
    config: Any
    family: Family
    dtype: torch.dtype
    model: nn.Module
    layers: list[MoELayer]
    shapes: dict[str, tuple[int, ...]]

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.name if isinstance(self.path, Path) else self.path


def draw(
    name_or_path: str, revision: str | None, dtype: str | torch.dtype, experts_implementation: str | None
) -> Blueprint:
    """Reads the configuration and builds the model's skeleton; no weights are read or downloaded.

    Args:
        name_or_path: a bundled name, a directory, or a name on the hub.
        dtype: ``auto`` is the one that the configuration names (float32 if it names none).
        experts_implementation: ``eager``, ``batched_mm``, ``grouped_mm``, or None for transformers' choice.

    Raises:
        UnknownArchitectureError: no adapter, a broken implementation, no MoE layer, or quantised weights.
        CheckpointError: if it cannot be found or read.
        ConfigError: for an unknown dtype or implementation.
    """
    path = resolve_model(name_or_path)
    where: dict[str, Any] = {"revision": revision} if revision else {}
    with readable_errors(name_or_path):
        config: Any = transformers.AutoConfig.from_pretrained(path, **where)
    family = find_family(config)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method:
        raise UnknownArchitectureError(quantised(str(method)))
    if experts_implementation not in (None, *IMPLEMENTATIONS):
        raise ConfigError(
            f"experts_implementation={experts_implementation!r} cannot run from slots; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    if family.name == "switch_transformers" and experts_implementation not in (None, "eager"):
        raise ConfigError(
            f"experts_implementation={experts_implementation!r} is not for {family.title}, which has but "
            "its own loop over the experts; leave it out."
        )
    if experts_implementation is not None:
        config._experts_implementation = experts_implementation
    chosen = _dtype(dtype, config)
    bare = _without_experts(_class_of(config, family), family)
    with BUILDING, torch.device("meta"), readable_errors(name_or_path):
        model: nn.Module = bare._from_config(copy.deepcopy(config), dtype=chosen)
    layers = moe_layers(model)
    experts: Any = layers[0].experts
    return Blueprint(path, revision, config, family, chosen, model, layers, experts.shapes)


def load_dense(blueprint: Blueprint, device: torch.device) -> nn.Module:
    """Everything but the experts, on ``device``, in evaluation mode.

    Parameters keep ``requires_grad`` as transformers sets it, since torch may choose another product for
    those that have it. transformers prints its usual report of missing and unexpected tensors, without the
    experts'.

    Raises:
        CheckpointError: if the weights cannot be read, or some would be random.
    """
    base = _class_of(blueprint.config, blueprint.family)
    bare = _without_experts(base, blueprint.family)
    kwargs: dict[str, Any] = {"dtype": blueprint.dtype, "use_safetensors": True}
    if blueprint.revision:
        kwargs["revision"] = blueprint.revision
    if device.type != "cpu":
        kwargs["device_map"] = {"": device}
    with BUILDING, readable_errors(blueprint.name):
        model, info = bare.from_pretrained(
            blueprint.path, config=copy.deepcopy(blueprint.config), output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"The weights of {blueprint.name!r} lack {len(missing)} tensors ({missing[0]}, ...) and would be "
            "random; copy or download the model again."
        )
    model.__class__ = base
    loaded: nn.Module = model.eval()
    if device.type == "cpu":
        _unmap(loaded)
    return loaded


def checkpoint_folder(blueprint: Blueprint) -> Path:
    """The local directory with the model's safetensors files (for a hub name: after it was loaded)."""
    if isinstance(blueprint.path, Path):
        return blueprint.path
    found = cached_file(blueprint.path, "config.json", revision=blueprint.revision)
    return Path(found).parent


def _unmap(model: nn.Module) -> None:
    """Copies weights that transformers left in the mapped file: were it truncated, reading them would end the
    process.

    A copy begins at the same place of a cache line, on which the last bit of a matrix-vector product depends.
    """
    line = 64
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        room = torch.empty(size + 2 * line, dtype=torch.uint8)
        start = (parameter.data_ptr() - room.data_ptr()) % line
        copy_of = room[start : start + size].view(parameter.dtype).view(parameter.shape)
        parameter.data = copy_of.copy_(parameter.data)


def _class_of(config: Any, family: Family) -> Any:
    """transformers' class of the whole model, language-model head included."""
    if len(family.stacks) > 1:
        return transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING[type(config)]
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _without_experts(base: Any, family: Family) -> Any:
    """A subclass of a model's class whose experts have no tensors; it goes by the same name."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        ignored = set(self._keys_to_ignore_on_load_unexpected or ())
        for name, module in list(self.named_modules()):
            if type(module).__name__ == family.experts:
                empty_experts(module)
                # transformers would initialise what it does not load; Switch's block does it for its experts.
                for owner in (module, self.get_submodule(name.rpartition(".")[0])):
                    owner._is_hf_initialized = True
                # A checkpoint may lack or have the base model's prefix; transformers adds or removes it.
                plain = re.escape(name.removeprefix(f"{self.base_model_prefix}."))
                tensors = "|".join(re.escape(key) for key in module.tensor_names)
                ignored.add(rf"(^|\.){plain}\.({tensors})$")
        self._keys_to_ignore_on_load_unexpected = ignored

    same = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"__init__": __init__, **same})


def _dtype(dtype: str | torch.dtype, config: Any) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; choose one of {', '.join(DTYPES)}.")
    if name == "auto":
        own = getattr(config, "dtype", None) or torch.float32
        name = str(own).removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(f"The model's dtype is {name}, which no slot has; choose one of {DTYPES[1:]}.")
    found: torch.dtype = getattr(torch, name)
    return found
