"""The one table of Mixture-of-Experts architectures: where each keeps its routers, and how each decides.

Written for transformers 5.19 up to (not including) 6, read from its ``modeling_<family>.py`` files.
Everything that the rest of specgate must know of a host's insides is here: :func:`moe_layers` finds the
modules, :func:`router_input` and :func:`decide` repeat a routing decision by hand from the residual stream.

Letters: B sequences, T tokens, E experts of a layer, K experts per token, D hidden size. ``...`` in a shape
stands for ``N`` flat tokens or ``B, T``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from torch import Tensor, nn

from specgate.errors import UnknownArchitectureError
from specgate.moe import decision as by_hand
from specgate.moe.decision import Decision, RoutingRule, agrees

__all__ = [
    "FAMILIES",
    "Decision",
    "Family",
    "MoELayer",
    "RoutingRule",
    "agrees",
    "check_transformers",
    "decide",
    "find_family",
    "moe_layers",
    "router_input",
    "router_tensors",
    "supported",
]

TRANSFORMERS_RANGE = ((5, 19), (6, 0))

#: Architectures whose transformers implementation does not do what it says; model type -> why.
BROKEN = {"nllb-moe": "NLLB-MoE runs only experts 0 and 1 in transformers 5.x, whatever its router says"}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: transformers' ``model_type``.
        title: what people call it.
        experts: class of the module whose call executes the experts.
        num_experts: configuration field with the number of experts.
        rule: configuration -> routing rule (the norm's epsilon is read from the module).
        semantics: what a recorded weight means, in words.
        router: attribute of the MoE block that holds the router.
        norm: attribute of the block's parent with the norm before the block; its input is the residual
            stream.
        stacks: names of the stacks.
    """

    name: str
    title: str
    experts: str
    num_experts: str
    rule: Callable[[Any], RoutingRule]
    semantics: str
    router: str = "gate"
    norm: str = "post_attention_layernorm"
    stacks: tuple[str, ...] = ("decoder",)


def _softmax_rule(config: Any) -> RoutingRule:
    return RoutingRule("softmax", config.num_experts_per_tok, renormalise=bool(config.norm_topk_prob))


def _mixtral_rule(config: Any) -> RoutingRule:
    return RoutingRule("softmax", config.num_experts_per_tok, renormalise=True)


def _gpt_oss_rule(config: Any) -> RoutingRule:
    return RoutingRule("softmax_of_top_k", config.num_experts_per_tok, norm="rms_float32")


def _deepseek_v2_rule(config: Any) -> RoutingRule:
    grouped = config.topk_method == "group_limited_greedy"
    return RoutingRule(
        "softmax",
        config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
        groups=config.n_group if grouped else None,
        groups_kept=config.topk_group if grouped else None,
        float32_logits=True,
    )


def _deepseek_v3_rule(config: Any) -> RoutingRule:
    return RoutingRule(
        "sigmoid",
        config.num_experts_per_tok,
        renormalise=bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
        groups=config.n_group,
        groups_kept=config.topk_group,
        group_score="top2",
        float32_logits=True,
    )


def _switch_rule(config: Any) -> RoutingRule:
    in_float32 = config.router_dtype == "float32"
    return RoutingRule(
        "switch", 1, norm="t5", float32_logits=in_float32, capacity=int(config.expert_capacity)
    )


_OVER_ALL = "softmax probability over all experts; divided by the sum of the chosen if norm_topk_prob"

_TABLE = (
    Family(
        name="switch_transformers",
        title="Switch Transformers",
        experts="SwitchTransformersExperts",
        num_experts="num_experts",
        rule=_switch_rule,
        semantics="softmax probability over all experts of the one intended; over capacity it is dropped",
        router="router",
        norm="layer_norm",
        stacks=("encoder", "decoder"),
    ),
    Family(
        name="mixtral",
        title="Mixtral",
        experts="MixtralExperts",
        num_experts="num_local_experts",
        rule=_mixtral_rule,
        semantics="softmax probability over all experts, divided by the sum of the chosen",
    ),
    Family("olmoe", "OLMoE", "OlmoeExperts", "num_experts", _softmax_rule, _OVER_ALL),
    Family("qwen2_moe", "Qwen2-MoE", "Qwen2MoeExperts", "num_experts", _softmax_rule, _OVER_ALL),
    Family("qwen3_moe", "Qwen3-MoE", "Qwen3MoeExperts", "num_experts", _softmax_rule, _OVER_ALL),
    Family(
        name="deepseek_v2",
        title="DeepSeek-V2",
        experts="DeepseekV2Experts",
        num_experts="n_routed_experts",
        rule=_deepseek_v2_rule,
        semantics="softmax probability over all experts times routed_scaling_factor",
    ),
    Family(
        name="deepseek_v3",
        title="DeepSeek-V3",
        experts="DeepseekV3Experts",
        num_experts="n_routed_experts",
        rule=_deepseek_v3_rule,
        semantics="sigmoid score without the correction bias that the choice is made with; "
        "divided by the sum of the chosen if norm_topk_prob, times routed_scaling_factor",
    ),
    Family(
        name="gpt_oss",
        title="GPT-OSS",
        experts="GptOssExperts",
        num_experts="num_local_experts",
        rule=_gpt_oss_rule,
        semantics="softmax over the logits of the chosen experts",
        router="router",
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}


@dataclass(frozen=True, eq=False)
class MoELayer:
    """Handles on one MoE layer of a loaded model.

    Attributes:
        family: its row of the table.
        stack: ``encoder`` or ``decoder``.
        index: the layer's number, counted over the MoE layers of its stack.
        name: module path of the MoE block.
        block: the MoE block.
        norm: the norm before the block; its input is the residual stream.
        router: the block's router.
        experts: the block's experts; the arguments of a call are what executes.
        num_experts: experts (E).
        rule: how the layer decides.
    """

    family: Family
    stack: str
    index: int
    name: str
    block: nn.Module = field(repr=False)
    norm: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    experts: nn.Module = field(repr=False)
    num_experts: int
    rule: RoutingRule

    @property
    def top_k(self) -> int:
        """Experts per token (K)."""
        return self.rule.top_k


def supported() -> str:
    """The supported families in words."""
    return ", ".join(family.title for family in _TABLE)


def check_transformers(version: str = transformers.__version__) -> None:
    """Refuses a transformers version that the table was not written for.

    Raises:
        UnknownArchitectureError: if ``version`` is outside the range.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    low, high = TRANSFORMERS_RANGE
    if not low <= found < high:
        raise UnknownArchitectureError(
            f"transformers {version} routes in another way than specgate reads; "
            f"install 'transformers>={low[0]}.{low[1]},<{high[0]}'."
        )


def find_family(config_or_model: Any) -> Family:
    """The table's row for a model or a configuration.

    Raises:
        UnknownArchitectureError: unknown, dense or broken architecture, or a transformers version out of
            range.
    """
    check_transformers()
    config = getattr(config_or_model, "config", config_or_model)
    kind = getattr(config, "model_type", None) or type(config).__name__
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in BROKEN:
        raise UnknownArchitectureError(
            f"{BROKEN[kind]}, so there is no real routing to trace; supported: {supported()}."
        )
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(config, name, None) for name in counts):
        raise UnknownArchitectureError(
            f"The Mixture-of-Experts architecture {kind!r} has no adapter (docs/adding-a-model.md says how "
            f"to write one); supported: {supported()}."
        )
    raise UnknownArchitectureError(f"The architecture {kind!r} has no experts; supported: {supported()}.")


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in the order in which they run, numbered within each stack.

    Raises:
        UnknownArchitectureError: no adapter, no MoE layer in this model, or a quantised variant that goes
            past its own modules.
    """
    family = find_family(model)
    config: Any = model.config
    layers: list[MoELayer] = []
    for name, experts in model.named_modules():
        kind = type(experts).__name__
        if kind.startswith("Mxfp4") and kind.endswith("Experts"):
            raise UnknownArchitectureError(
                f"{name} is MXFP4-quantised ({kind}), calling neither router nor experts as modules; "
                "load the model with quantization_config=Mxfp4Config(dequantize=True)."
            )
        if kind not in (family.experts, "FP8Experts"):
            continue
        block_name = name.rpartition(".")[0]
        block = model.get_submodule(block_name)
        norm = getattr(model.get_submodule(block_name.rpartition(".")[0]), family.norm)
        stack = "encoder" if re.search(r"(^|\.)encoder\.", name) else "decoder"
        layers.append(
            MoELayer(
                family=family,
                stack=stack,
                index=sum(layer.stack == stack for layer in layers),
                name=block_name,
                block=block,
                norm=norm,
                router=getattr(block, family.router),
                experts=experts,
                num_experts=int(getattr(config, family.num_experts)),
                rule=replace(family.rule(config), norm_eps=float(norm.variance_epsilon)),
            )
        )
    if not layers:
        raise UnknownArchitectureError(
            f"This {family.title} model has no MoE layer, its configuration makes every layer dense; "
            "choose one with sparse layers."
        )
    return layers


def router_tensors(layer: MoELayer) -> dict[str, Tensor]:
    """What is needed to compute the layer's decision from the residual stream (detached, not copied).

    Returns:
        ``norm_weight [D]``, ``router_weight [E, D]`` and, where the family has them, ``router_bias [E]`` and
        ``correction_bias [E]`` (added to the scores for the choice only).

    Raises:
        UnknownArchitectureError: if the weights are not in memory (offloaded).
    """
    linear = getattr(layer.router, "classifier", layer.router)
    tensors = {
        "norm_weight": layer.norm.weight,
        "router_weight": linear.weight,
        "router_bias": getattr(linear, "bias", None),
        "correction_bias": getattr(layer.router, "e_score_correction_bias", None),
    }
    found = {name: t.detach() for name, t in tensors.items() if isinstance(t, Tensor)}
    if any(t.is_meta for t in found.values()):
        raise UnknownArchitectureError(
            f"The router of {layer.name} is offloaded, its weights are on no device; keep routers in memory."
        )
    return found


def router_input(layer: MoELayer, hidden: Tensor) -> Tensor:
    """The router's input from the residual stream, in the host's own arithmetic.

    Shapes:
        hidden: ``[..., D]`` -> ``[..., D]``.
    """
    return by_hand.normalise(layer.rule, router_tensors(layer)["norm_weight"], hidden)


def decide(layer: MoELayer, normed: Tensor) -> Decision:
    """The routing decision for a router input, by hand: no code of the host's router runs.

    Shapes:
        normed: ``[..., D]``; for Switch ``[B, T, D]``, since capacity counts along T.
    """
    return by_hand.decide(layer.rule, router_tensors(layer), normed)
