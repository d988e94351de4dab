"""Offloaded = resident on the GPU, where transformers decodes and reads prompts with different kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import specgate
from specgate.moe.families import FAMILIES, moe_layers
from specgate.small_tensors import to_device
from tests.moe.offload_support import (
    CONTEXT,
    IMPLEMENTATIONS,
    SWITCH,
    assert_same,
    load_resident,
    prompt,
    run,
    saved,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TOKENS = 16


def resident(folder: Path, dtype: torch.dtype, implementation: str | None = None) -> Any:
    return load_resident(folder, implementation, dtype=dtype).to(DEVICE)


def inputs() -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in prompt().items()}


def opened(folder: Path, slots: int | None, dtype: torch.dtype, **more: Any) -> Any:
    settings = {"context": CONTEXT, "dtype": dtype, "device": DEVICE, "poison": True, **more}
    plan = specgate.offload(folder, **settings).plan
    slots = plan.least_slots if slots is None else min(slots, plan.blocks)
    made = specgate.offload(folder, plan.budget_for(slots), **settings)
    assert made.plan.slots == slots
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_any_kernel_any_budget(
    family: str, implementation: str | None, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = run(resident(folder, dtype, implementation), TOKENS, inputs())
    for slots in (None, 9, 10**6):
        with opened(folder, slots, dtype, experts_implementation=implementation, verify=True) as model:
            assert_same(run(model, TOKENS, inputs()), wanted)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_256_tokens_from_the_fewest_slots(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = run(resident(folder, torch.bfloat16), 256, inputs())
    with opened(folder, None, torch.bfloat16) as model:
        assert_same(run(model, 256, inputs()), wanted)


@pytest.mark.parametrize("name", ["olmoe_ref", "switch_ref"])
def test_the_reference_models_at_a_quarter(name: str) -> None:
    from specgate.moe.hosts import REFERENCE

    whole = run(resident(REFERENCE / name, torch.bfloat16), 64, inputs())
    plan = specgate.offload(name, context=256, batch_size=2, device=DEVICE).plan
    budget = plan.budget_for(plan.blocks // 4)
    with specgate.offload(name, budget, context=256, batch_size=2, device=DEVICE, poison=True) as model:
        assert_same(run(model, 64, inputs()), whole)
        assert model.specgate.stats()["evictions"] > 0


def test_where_all_fit_the_host_waits_for_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("olmoe", tmp_path_factory)
    with opened(folder, 10**6, torch.bfloat16) as model, torch.no_grad():
        block = moe_layers(model)[0].block
        hidden = torch.randn(2, 5, 32, dtype=torch.bfloat16, device=DEVICE)
        block(hidden)
        torch.cuda.set_sync_debug_mode("error")
        try:
            block(hidden)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["olmoe", SWITCH])
def test_forecasts_change_no_value(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from specgate.predictors.mlp import MLP

    folder = saved(family, tmp_path_factory)
    host = resident(folder, torch.bfloat16)
    wanted = run(host, TOKENS, inputs())
    layers = [layer for layer in moe_layers(host) if layer.stack == "decoder"]
    mlp = MLP(
        layers=len(layers), experts=8, top_k=layers[0].top_k, vocab_size=host.config.vocab_size,
        phase="decode", hidden_size=32, lookahead=2, width=16, heads=0,
    )  # fmt: skip
    with opened(folder, 11, torch.bfloat16, predictor=mlp, threshold=0.0, eviction="forecast") as model:
        assert_same(run(model, TOKENS, inputs()), wanted)
        assert model.specgate.stats()["forecasts"] > 0


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("forecasts", ["kernel", "torch"])
def test_the_models_own_routers_foresee(
    family: str, forecasts: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = run(resident(folder, torch.bfloat16), TOKENS, inputs())
    more = {"predictor": "router_lookahead", "forecasts": forecasts}
    with opened(folder, 11, torch.bfloat16, **more) as model:
        assert_same(run(model, TOKENS, inputs()), wanted)
        stats = model.specgate.stats()
        assert stats["copied_bytes_prefetch"] > 0
        assert model.specgate.store.settings.eviction == "priced"


@pytest.mark.parametrize("count", [1, 4, 33, 480, 481, 2000])
def test_numbers_reach_the_device(count: int) -> None:
    """Those that kernels carry as their arguments, in as many launches as it takes."""
    values = [(7 * i) ** 3 - 5 for i in range(count)]
    there = to_device(values, torch.device("cuda"))
    assert there.dtype == torch.int64
    assert there.tolist() == values
