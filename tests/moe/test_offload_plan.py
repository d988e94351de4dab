"""The plan of an offloaded model: what it counts, the least budget, what is refused before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

import specgate
from specgate.errors import BudgetError, CheckpointError, ConfigError, UnknownArchitectureError
from specgate.moe.families import FAMILIES
from specgate.moe.hosts import REFERENCE
from specgate.moe.offload_plan import GB, kv_bytes, typed_gb
from tests.moe.offload_support import SWITCH, load_resident, run, saved
from tests.moe.tiny_hosts import make_host


def cache_bytes(model: Any, batch: int, tokens: int) -> int:
    """What transformers really keeps after so many tokens."""
    ids = torch.randint(2, 300, (batch, tokens))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        cache = model(input_ids=ids, **more).past_key_values
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if more else [cache]
    kept = [t for part in parts for layer in part.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kv_cache_is_what_transformers_keeps(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load_resident(saved(family, tmp_path_factory))
    for batch, tokens in ((1, 9), (3, 40)):
        assert kv_bytes(model.config, batch, tokens, 4) == cache_bytes(model, batch, tokens)


def test_sliding_windows_keep_no_more_than_their_window() -> None:
    model = make_host("gpt_oss", sliding_window=16)
    kept, planned = cache_bytes(model, 1, 100), kv_bytes(model.config, 1, 100, 4)
    assert kept <= planned < kv_bytes(make_host("gpt_oss", sliding_window=200).config, 1, 100, 4)
    assert planned - kept == 2 * 2 * 8 * 4  # one layer slides, and its last token is the next one's


@pytest.mark.parametrize("family", list(FAMILIES))
def test_dense_and_experts_are_all_there_is(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(family, tmp_path_factory)
    resident = load_resident(folder)
    plan = specgate.offload(folder, context=32).plan
    total = sum(t.numel() * t.element_size() for t in [*resident.parameters(), *resident.buffers()])
    experts = sum(p.numel() * p.element_size() for n, p in resident.named_parameters() if ".experts." in n)
    assert plan.dense == total - experts
    assert plan.blocks * plan.slot >= experts
    assert plan.resident
    with specgate.offload(folder, plan.budget_for(plan.least_slots), context=32) as model:
        held = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        assert sum(t.numel() * t.element_size() for t in held.values()) == plan.dense


def test_the_least_budget_is_named_and_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    for family in ("olmoe", "gpt_oss", SWITCH):
        folder = saved(family, tmp_path_factory)
        with pytest.raises(
            BudgetError, match=r"budget_gb=1e-07 is too small for .*; write at least"
        ) as caught:
            specgate.offload(folder, 1e-7, context=32)
        assert str(caught.value).count("\n") == 0
        least = float(str(caught.value).partition("need budget_gb=")[2].partition(";")[0])
        made = specgate.offload(folder, least, context=32)
        assert made.plan.slots == made.plan.least_slots
        with made as model:
            run(model, 2)
        with pytest.raises(BudgetError, match="too small"):
            specgate.offload(folder, least - made.plan.slot / GB, context=32)


def test_a_budget_below_k_experts_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("gpt_oss", tmp_path_factory)
    plan = specgate.offload(folder, context=32).plan
    assert plan.least_slots == plan.top_k == 4
    with pytest.raises(BudgetError, match="4 experts of"):
        specgate.offload(folder, (plan.fixed + 3 * plan.slot) / GB, context=32)


def test_more_context_leaves_fewer_slots() -> None:
    few = specgate.offload("olmoe_ref", 0.033, context=2048).plan
    many = specgate.offload("olmoe_ref", 0.033, context=1792).plan
    assert few.slots < many.slots < many.blocks == 256
    assert few.used <= few.budget == 33_000_000
    assert few.used > few.budget - few.slot
    assert few.kv_cache * 7 == many.kv_cache * 8
    assert specgate.offload("olmoe_ref", context=512, batch_size=4).plan.kv_cache == few.kv_cache
    assert specgate.offload("olmoe_ref", 1.0).plan.context == 2048
    text = str(many)
    for part in (
        "olmoe_ref on",
        "dense weights",
        "KV cache",
        "expert slots",
        "256 experts",
        "free",
        "1 x 1792 tokens",
    ):
        assert part in text
    assert json.loads(json.dumps(many.as_dict()))["slots"] == many.slots
    assert "of 256" in str(specgate.offload("olmoe_ref", 0.033, host_gb=0.001).plan)


@given(st.integers(1, 10**15))
def test_typed_budgets_are_short_and_enough(count: int) -> None:
    typed = typed_gb(count)
    assert count <= typed * GB + 1e-6
    assert typed * GB <= count * 1.0011 + 1e-3
    assert len(f"{typed:.3e}") <= 10


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"budget_gb": float("nan")}, "budget_gb=nan is no amount"),
        ({"budget_gb": -1.0}, "budget_gb=-1.0 is no amount"),
        ({"host_gb": float("inf")}, "host_gb=inf is no amount"),
        ({"batch_size": 0}, "batch_size=0 leaves nothing"),
        ({"context": 0}, "context=0 leaves nothing"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"device": "tpu9"}, "device='tpu9' is not a device"),
        ({"store": "fast"}, "store='fast' is not known"),
        ({"eviction": "fifo"}, "eviction='fifo' is not known; choose one of lru"),
        ({"experts_implementation": "sonicmoe"}, "'sonicmoe' cannot run from slots"),
    ],
)
def test_values_that_make_no_sense(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        specgate.offload("olmoe_ref", **values)


def test_switch_has_only_its_own_loop() -> None:
    with pytest.raises(ConfigError, match="'grouped_mm' is not for Switch"):
        specgate.offload("switch_ref", experts_implementation="grouped_mm")
    assert specgate.offload("switch_ref", experts_implementation="eager").plan.layers == 12


def written(folder: Path, config: Any) -> Path:
    config.save_pretrained(folder)
    return folder


def test_models_without_an_adapter_are_refused(tmp_path: Path) -> None:
    nllb = tf.NllbMoeConfig(vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, num_experts=8)
    for name, config, sentence in (
        ("phi", tf.PhimoeConfig(), "'phimoe' has no adapter"),
        ("llama", tf.LlamaConfig(), "'llama' has no experts"),
        ("nllb", nllb, "NLLB-MoE runs only experts 0 and 1"),
        ("dense", make_host("qwen3_moe", mlp_only_layers=[0, 1, 2, 3]).config, "has no MoE layer"),
    ):
        with pytest.raises(UnknownArchitectureError, match=sentence):
            specgate.offload(written(tmp_path / name, config))


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "bitsandbytes"])
def test_quantised_checkpoints_are_refused(method: str, tmp_path: Path) -> None:
    folder = written(tmp_path / method, make_host("gpt_oss").config)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(values | {"quantization_config": {"quant_method": method}})
    )
    with pytest.raises(UnknownArchitectureError, match=rf"quantised \({method}\), which no codec reads"):
        specgate.offload(folder)


def test_missing_models_are_named(tmp_path: Path) -> None:
    for name, sentence in (
        (str(tmp_path / "nowhere"), "does not exist"),
        (str(tmp_path), "holds no config.json"),
        ("olmo_ref", "No model is called 'olmo_ref'; bundled: olmoe_ref"),
        ("", "empty"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            specgate.offload(name)
    with (
        pytest.raises(CheckpointError, match="safetensors"),
        specgate.offload(written(tmp_path / "bare", make_host("olmoe").config), context=32),
    ):
        pass


def test_the_dtype_is_the_models_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert specgate.offload("olmoe_ref").plan.dtype == "bfloat16"
    assert specgate.offload("olmoe_ref", dtype="float32").plan.dtype == "float32"
    assert specgate.offload("olmoe_ref", dtype=torch.float16).plan.dtype == "float16"
    assert specgate.offload(REFERENCE / "switch_ref").plan.model == "switch_ref"
    assert specgate.offload(saved("olmoe", tmp_path_factory)).plan.dtype == "float32"
