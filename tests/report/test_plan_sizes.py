"""Sizes of models: against what their makers publish, and against what an offloaded model takes."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

import specgate
from specgate.moe.hosts import REFERENCE
from specgate.report.plan_sizes import decoding_layers, footprint, sizes_of
from specgate.report.replay_shape import ModelShape
from tests.test_configs import CONF

#: Billions of parameters: all, and those that a token uses (of decoding, for an encoder-decoder: unknown).
#: From each model's card or paper; of Switch Transformers (arXiv:2101.03961) those that are stated anywhere.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "switch_base_8": (0.62, None),
    "switch_base_128": (7.4, None),
    "switch_base_256": (14.7, None),
    "mixtral_8x7b": (46.7, 12.9),
    "qwen3_30b_a3b": (30.5, 3.3),
    "olmoe_1b_7b": (6.92, 1.28),
    "deepseek_v2_lite": (15.7, 2.4),
    "gpt_oss_20b": (20.91, 3.61),
    "gpt_oss_120b": (116.83, 5.13),
}
#: MoE layers that decode, experts, experts per token, layers in all; from each model's config.json.
ROUTED = {
    "switch_base_64": (6, 64, 1, 12),
    "mixtral_8x7b": (32, 8, 2, 32),
    "qwen3_30b_a3b": (48, 128, 8, 48),
    "olmoe_1b_7b": (16, 64, 8, 16),
    "deepseek_v2_lite": (26, 64, 6, 27),
    "gpt_oss_120b": (36, 128, 4, 36),
}


def shape_of(name: str) -> ModelShape:
    values: Any = OmegaConf.to_container(OmegaConf.load(CONF / "shape" / f"{name}.yaml"))
    return ModelShape(values["name"], values["config"], values["dtype"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    shape, (whole, active) = shape_of(name), PUBLISHED[name]
    assert shape.parameters == pytest.approx(whole * 1e9, rel=0.01)
    sizes = sizes_of(shape)
    if active is not None:
        used = sum(sizes.stretch_parameters) + sizes.step_parameters
        used += sizes.layers * sizes.top_k * sizes.expert_parameters
        embedding = 0 if shape.transformers_config.tie_word_embeddings else shape.vocabulary * shape.hidden
        # Some publish with, some without the embedding, of which a token reads one row.
        assert min(abs(used / 1e9 - active), abs((used + embedding) / 1e9 - active)) < 0.04 * active


@pytest.mark.parametrize("experts", [16, 32, 64])
def test_a_switch_grows_by_its_experts_alone(experts: int) -> None:
    """12 MoE layers; an expert is two matrices and a row of the router."""
    more = 12 * (experts - 8) * (2 * 768 * 3072 + 768)
    assert shape_of(f"switch_base_{experts}").parameters - shape_of("switch_base_8").parameters == more


@pytest.mark.parametrize("name", ROUTED)
def test_layers_are_those_that_decode(name: str) -> None:
    sizes = sizes_of(shape_of(name))
    L, E, K, layers = ROUTED[name]
    assert (sizes.layers, sizes.experts, sizes.top_k) == (L, E, K)
    assert len(sizes.attentions) == layers * (2 if name.startswith("switch") else 1)


def test_a_dense_layer_runs_before_the_first_router() -> None:
    sizes = sizes_of(shape_of("deepseek_v2_lite"))
    dense_layer = 3 * 2048 * 10944
    assert sizes.stretch_parameters[0] - sizes.stretch_parameters[1] == pytest.approx(
        dense_layer + (sizes.stretch_parameters[1] - 2 * 3 * 2048 * 1408 - 64 * 2048), rel=1e-3
    )
    assert [a.stretch for a in sizes.attentions] == [0, 0, *range(1, 26)]
    first = sizes.attentions[0]
    assert (first.cached, first.scored) == (512 + 64, 16 * (128 + 64 + 128))
    assert first.expanded == 512 * 16 * (128 + 128)


def test_windows_and_groups_of_attention() -> None:
    sizes = sizes_of(shape_of("gpt_oss_20b"))
    assert [a.window for a in sizes.attentions[:4]] == [128, 0, 128, 0]
    assert {(a.cached, a.scored) for a in sizes.attentions} == {(2 * 64 * 8, 2 * 64 * 64)}


def test_an_encoder_is_kept_but_does_not_decode() -> None:
    shape = shape_of("switch_base_8")
    assert len(decoding_layers(shape)) == 6
    need = footprint(shape, 128, 1, "none")
    assert (need.blocks, need.decoding, need.least) == (96, 48, 1)


@pytest.mark.parametrize("context", [64, 2048])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_offloaded_model_takes_as_much(context: int, batch_size: int) -> None:
    plan = specgate.offload(
        REFERENCE / "olmoe_ref", 0.5, device="cpu", dtype="bfloat16", context=context, batch_size=batch_size
    ).plan
    need = footprint(shape_of("olmoe_ref"), context, batch_size, "none", "cpu")
    assert need.dense == pytest.approx(plan.dense, rel=0.001), "but for tables that are no weights"
    assert (need.kv_cache, need.activations) == (plan.kv_cache, plan.activations)
    assert (need.slot, need.block, need.blocks) == (plan.slot, plan.block, plan.blocks)


def test_codecs_change_the_block_and_not_the_slot() -> None:
    shape = shape_of("gpt_oss_20b")
    sizes = {codec: footprint(shape, 64, 1, codec) for codec in ("none", "int8", "int4")}
    assert len({need.slot for need in sizes.values()}) == 1
    assert sizes["int8"].block / sizes["none"].block == pytest.approx(0.5, abs=0.01)
    assert sizes["int4"].block / sizes["none"].block == pytest.approx(0.28, abs=0.01)


def test_a_batch_can_need_more_experts_at_once() -> None:
    shape = shape_of("gpt_oss_20b")
    assert [footprint(shape, 64, b, "none").least for b in (1, 2, 100)] == [4, 8, 32]
