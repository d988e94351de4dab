"""Offloaded = resident, bit for bit: every family, kernel and store, any number of slots, free ones NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specgate
from specgate.errors import StoreError
from specgate.moe import offload_kernels
from specgate.moe.families import FAMILIES, moe_layers
from specgate.moe.hosts import REFERENCE
from specgate.moe.text import bundled_documents
from tests.moe.offload_support import (
    IMPLEMENTATIONS,
    STORES,
    SWITCH,
    assert_same,
    load_resident,
    opened,
    prompt,
    resident_run,
    run,
    saved,
)

LONG, SHORT = 256, 8  # generated tokens


@pytest.mark.parametrize("family", list(FAMILIES))
def test_256_tokens_from_the_fewest_slots(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(family, tmp_path_factory)
    with opened(folder, None) as model:
        found = run(model, LONG, prompt(sequences=1))
        stats = model.specgate.stats()
    assert_same(found, resident_run(family, folder, None, LONG, sequences=1))
    assert found.tokens.shape[1] >= LONG
    assert stats["evictions"] > 100  # the experts really came and went


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_any_kernel_any_budget(
    family: str, implementation: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = resident_run(family, folder, implementation, SHORT)
    blocks = opened(folder, 10**6).plan.blocks
    for slots in (None, blocks // 2 + 1, blocks):
        with opened(folder, slots, experts_implementation=implementation) as model:
            assert_same(run(model, SHORT), wanted)
            if slots == blocks:  # loaded once, and never asked for again
                stats = model.specgate.stats()
                assert (stats["hit"] + stats["host_hit"], stats["miss"]) == (0, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_every_budget(
    family: str, implementation: str | None, store: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = resident_run(family, folder, implementation, SHORT)
    plan = opened(folder, 10**6).plan
    for slots in range(plan.least_slots, plan.blocks + 1):
        with opened(folder, slots, experts_implementation=implementation, store=store) as model:
            assert_same(run(model, SHORT), wanted)


@pytest.mark.parametrize("family", ["olmoe", SWITCH, "gpt_oss"])
def test_the_store_in_plain_torch(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(family, tmp_path_factory)
    for eviction in ("lru", "lfu"):
        with opened(folder, 7, store="simple", eviction=eviction) as model:
            assert_same(run(model, SHORT), resident_run(family, folder, None, SHORT))
            assert model.specgate.stats()["evictions"] > 0
            assert model.specgate.timeline()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_more_slots_than_a_grouped_product_takes(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    pages: list[int] = []
    real = offload_kernels.pages_of

    def counted(*args: Any) -> Any:
        found = list(real(*args))
        pages.append(len(found))
        return iter(found)

    monkeypatch.setattr(offload_kernels, "MAX_GROUPS", 3)
    monkeypatch.setattr("specgate.moe.offload_experts.pages_of", counted)
    with opened(folder, 13) as model:
        assert_same(run(model, SHORT), resident_run(family, folder, None, SHORT))
    assert max(pages) > 1


@pytest.mark.parametrize("few", [0, 10**6])
def test_long_and_short_calls_find_their_slots(
    few: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Indices are mapped on the host or on the device, and listed by either."""
    folder = saved("mixtral", tmp_path_factory)
    monkeypatch.setattr(offload_kernels, "FEW", few)
    monkeypatch.setattr(offload_kernels, "MANY", few)
    for slots in (3, 12):
        with opened(folder, slots) as model:
            assert_same(run(model, SHORT), resident_run("mixtral", folder, "grouped_mm", SHORT))


def test_pages_hold_every_expert_once_and_are_not_too_wide() -> None:
    slots = [5000, 1, 1022, 1023, 1024, 3, 4999, 6143]
    experts = list(range(8))
    pages = list(offload_kernels.pages_of(experts, slots, 6144, "grouped_mm"))
    assert sorted(e for page in pages for e in page[0]) == experts
    for page_experts, page_slots, base, width in pages:
        assert [slots[e] for e in page_experts] == page_slots
        assert 2 <= width <= offload_kernels.MAX_GROUPS
        assert all(0 <= slot - base < width for slot in page_slots)
        assert base >= 0
        assert base + width <= 6144
    assert len(pages) == 4
    assert list(offload_kernels.pages_of([9], [6143], 6144, "grouped_mm")) == [([9], [6143], 6142, 2)]
    assert list(offload_kernels.pages_of([9], [7], 6144, "batched_mm")) == [([9], [7], 0, 6144)]


def test_tokens_that_capacity_drops(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tiny Switch drops some of the prompt's tokens, so the cases above cover it."""
    model = load_resident(saved(SWITCH, tmp_path_factory))
    masks: list[torch.Tensor] = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda module, args, out: masks.append(out[0]))
    run(model, 1)
    assert any((mask.sum(-1) == 0).any() for mask in masks)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["olmoe_ref", "switch_ref"])
def test_the_reference_models_on_real_text(name: str, dtype: str) -> None:
    import transformers as tf

    auto = tf.AutoModelForSeq2SeqLM if name == "switch_ref" else tf.AutoModelForCausalLM
    resident = auto.from_pretrained(REFERENCE / name, dtype=dtype).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(REFERENCE / name)
    texts = [d.text[:300] for d in bundled_documents() if d.split == "test"][:2]
    inputs = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=60))
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    wanted = run(resident, 32, inputs)
    full = specgate.offload(name, dtype=dtype, context=128, batch_size=2).plan
    budget = full.budget_for(full.blocks // 4)
    with specgate.offload(name, budget, dtype=dtype, context=128, batch_size=2, poison=True) as model:
        assert_same(run(model, 32, inputs), wanted)
        stats = model.specgate.stats()
    assert stats["hit"] > 0
    assert stats["evictions"] > 0


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", SWITCH])
def test_verify_repeats_every_layer(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with opened(saved(family, tmp_path_factory), None, verify=True) as model:
        assert model.specgate.verified == [0.0] * model.specgate.plan.layers


def test_verify_finds_a_wrong_expert(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from specgate.moe.offload_kernels import Rows

    real = Rows._slot_of

    def wrong(self: Any, experts: list[int], slots: list[int], base: int, other: int) -> Any:
        return real(self, experts, slots[::-1], base, other)

    monkeypatch.setattr(Rows, "_slot_of", wrong)
    with (
        pytest.raises(StoreError, match=r"verify: model\.layers\.0\.mlp gives other values"),
        opened(saved("olmoe", tmp_path_factory), None, verify=True),
    ):
        pass
