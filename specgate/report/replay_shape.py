"""The shape of a model: how large its experts are and what else a token costs, without any weights.

Letters: L MoE layers, E experts of a layer, K experts per token, D hidden size, V token ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from specgate.errors import ConfigError
from specgate.moe.expert_tensors import piece_shapes
from specgate.moe.families import FAMILIES, MoELayer, moe_layers
from specgate.moe.hosts import quiet_imports
from specgate.runtime.layout import CODECS, DTYPES, BlockLayout

#: Families whose experts run by the indexed kernels.
INDEXED = tuple(name for name in FAMILIES if name != "switch_transformers")
NO_TOKENS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # defaults beyond the vocabulary


@dataclass(frozen=True)
class ModelShape:
    """How large a model is, in the words of its configuration in transformers.

    Attributes:
        name: in tables.
        config: ``model_type`` and whatever differs from that type's defaults.
        dtype: of the weights: ``bfloat16``, ``float32`` or ``float16``.

    Raises:
        ConfigError: an architecture that is not supported, or sizes that contradict each other.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"shape.dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}.")
        kind = self.config.get("model_type")
        if kind not in FAMILIES:
            raise ConfigError(
                f"shape.config.model_type={kind} is no Mixture-of-Experts architecture that is known here; "
                f"choose one of {', '.join(FAMILIES)}."
            )
        for key, value in self.config.items():
            counts = isinstance(value, int) and not isinstance(value, bool) and not key.endswith("_id")
            if counts and value < 1:
                raise ConfigError(f"shape.config.{key}={value} leaves nothing to run; write 1 or more.")
        if self.top_k > self.experts:
            raise ConfigError(
                f"Shape {self.name} has {self.experts} experts in a layer and uses {self.top_k} per token; "
                "more than there are cannot be used."
            )

    @cached_property
    def transformers_config(self) -> Any:
        """As transformers reads it."""
        quiet_imports()
        import transformers

        try:
            return transformers.AutoConfig.for_model(**(NO_TOKENS | dict(self.config)))
        except Exception as error:  # whatever a configuration's own checks raise
            raise ConfigError(self._refusal(error)) from None

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        import transformers

        config = self.transformers_config
        several = len(FAMILIES[self.config["model_type"]].stacks) > 1
        auto = transformers.AutoModelForSeq2SeqLM if several else transformers.AutoModelForCausalLM
        try:
            with torch.device("meta"):
                model: nn.Module = auto.from_config(config)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise ConfigError(self._refusal(error)) from None
        return model

    def _refusal(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200]
        return f"Shape {self.name} is none that transformers can build ({reason}); correct shape.config."

    @cached_property
    def moe_layers(self) -> list[MoELayer]:
        """In running order, an encoder's first, on the meta device."""
        return moe_layers(self.skeleton)

    def require_indexed(self) -> None:
        """Refuses experts that cannot run from slots by index.

        Raises:
            ConfigError: naming the families that can.
        """
        if self.config["model_type"] not in INDEXED:
            raise ConfigError(
                f"shape.config.model_type={self.config['model_type']} has no experts that run from slots by "
                f"index; choose one of {', '.join(INDEXED)}."
            )

    @property
    def layers(self) -> int:
        """L."""
        return len(self.moe_layers)

    @property
    def experts(self) -> int:
        """E."""
        return int(getattr(self.transformers_config, FAMILIES[self.config["model_type"]].num_experts))

    @property
    def top_k(self) -> int:
        """K."""
        if self.config["model_type"] == "switch_transformers":
            return 1
        return int(self.transformers_config.num_experts_per_tok)

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.transformers_config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.transformers_config.vocab_size)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.dtype]

    @property
    def experts_module(self) -> Any:
        """The module that executes the experts of a layer, on the meta device."""
        self.require_indexed()
        return self.moe_layers[0].experts

    @cached_property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of one expert's tensors."""
        return piece_shapes(self.moe_layers[0])

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert."""
        return sum(math.prod(shape) for shape in self.pieces.values())

    @cached_property
    def dense_parameters(self) -> int:
        """Weights of a layer that every token uses: attention, router, norms, shared experts."""
        layer = self.moe_layers[0]
        whole = self.skeleton.get_submodule(block_name(layer.name))
        return _count(whole) - _count(layer.experts)

    @cached_property
    def parameters(self) -> int:
        """Weights of the whole model, tied ones once."""
        return _count(self.skeleton)

    def layout(self, codec: str = "none") -> BlockLayout:
        """How one expert lies in a slot and in a block.

        Raises:
            ConfigError: for an unknown codec.
        """
        if codec not in CODECS:
            raise ConfigError(f"codec={codec} is unknown; choose one of {', '.join(CODECS)}.")
        return BlockLayout.make([(n, s, self.dtype) for n, s in self.pieces.items()], codec)

    def describe(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        return {
            "name": self.name,
            "model_type": self.config["model_type"],
            "dtype": self.dtype,
            "layers": self.layers,
            "experts": self.experts,
            "top_k": self.top_k,
            "hidden": self.hidden,
            "vocabulary": self.vocabulary,
            "pieces": {name: list(shape) for name, shape in self.pieces.items()},
            "expert_parameters": self.expert_parameters,
            "dense_parameters": self.dense_parameters,
        }


def check_trace(shape: ModelShape, trace: str, layers: int, experts: int, top_k: int) -> None:
    """Refuses a trace of another shape.

    Raises:
        ConfigError: naming both.
    """
    shape.require_indexed()
    have, want = (layers, experts, top_k), (shape.layers, shape.experts, shape.top_k)
    if have != want:
        raise ConfigError(
            f"Trace {trace} routes {have[0]} layers, {have[2]} of {have[1]} experts, and shape {shape.name} "
            f"has {want[0]} layers, {want[2]} of {want[1]}; choose the shape= that fits, or another data=."
        )


def block_name(name: str) -> str:
    """The transformer layer that a module is in: ``model.layers.3.mlp`` is in ``model.layers.3``.

    Raises:
        ConfigError: if it is in none.
    """
    found = re.match(r".*?\.\d+(?=\.|$)", name)
    if found is None:
        raise ConfigError(f"The module {name} lies in no numbered layer; this architecture is unknown.")
    return found.group()


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
