"""What decides on fetching and evicting: the default, the model's own routers, reuse; and full residency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specgate
from specgate.errors import ConfigError
from specgate.moe.families import moe_layers, router_tensors
from specgate.policy.reuse import Reuse
from specgate.runtime import native
from tests.moe.offload_support import (
    CONTEXT,
    IMPLEMENTATIONS,
    SWITCH,
    assert_same,
    load_resident,
    prompt,
    resident_run,
    run,
    saved,
)

TOKENS = 40
needs_native = pytest.mark.skipif(not native.available(), reason="the native core was not compiled")
pytestmark = needs_native
ROUTERS = "router_lookahead"


def opened(folder: Path, slots: int, predictor: Any = None, **more: Any) -> Any:
    plan = specgate.offload(folder, predictor=predictor, context=CONTEXT, **more).plan
    budget = plan.budget_for(min(slots, plan.blocks))
    return specgate.offload(folder, budget, predictor, context=CONTEXT, poison=True, **more)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("olmoe", tmp_path_factory)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3", SWITCH])
@pytest.mark.parametrize("forecasts", ["kernel", "torch"])
def test_the_price_decides_where_there_is_a_predictor(
    family: str, forecasts: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = resident_run(family, folder, None, 16)
    with opened(folder, 9, ROUTERS, forecasts=forecasts) as model:
        settings = model.specgate.store.settings
        assert (settings.eviction, settings.price_scale) == ("priced", 0.6)
        assert_same(run(model, 16), wanted)
        assert model.specgate.stats()["forecasts"] > 0
    with opened(folder, 9) as model:
        settings = model.specgate.store.settings
        assert (settings.eviction, settings.price_scale) == ("lru", None)


def test_the_next_layers_routers_are_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The K most probable ones are those that the next layer's norm and router would choose now."""
    asked: list[tuple[int, set[int]]] = []
    with opened(folder, 20, ROUTERS, forecasts="torch") as model, torch.no_grad():
        layers = moe_layers(model)
        states: dict[int, torch.Tensor] = {}
        for layer in layers:
            layer.norm.register_forward_pre_hook(
                lambda _, args, at=layer.index: states.__setitem__(at, args[0][:, -1].float())
            )
        model.generate(**prompt(1), max_new_tokens=2, min_new_tokens=2, pad_token_id=0)

        def note(blocks_N: np.ndarray, p_N: np.ndarray, _: np.ndarray) -> None:
            every = model.specgate.store.experts
            (layer,) = set((blocks_N // every).tolist())
            best = blocks_N[np.argsort(-p_N, kind="stable")][: layers[layer].top_k]
            asked.append((layer, set((best % every).tolist())))
            assert ((p_N >= 2.0**-6) & (p_N <= 1)).all()
            source = max(states)  # the newest state that is known
            if layer - source in (1, 2):
                parts = router_tensors(layers[layer])
                x = states[source]
                unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + layers[layer].rule.norm_eps)
                scores = (unit * parts["norm_weight"].float()) @ parts["router_weight"].float().T
                top = set(scores[0].topk(layers[layer].top_k).indices.tolist())
                assert asked[-1][1] == top

        monkeypatch.setattr(model.specgate.store, "foresee", note)
        states.clear()
        ids = torch.tensor([[5]])
        cache = model(**prompt(1), use_cache=True).past_key_values
        states.clear()
        model(input_ids=ids, past_key_values=cache)
    found = [layer for layer, _ in asked]
    assert sorted(found) == [1, 2, 2], "one and two layers ahead, and nothing of the next token"


def test_reuse_is_fitted_as_the_model_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specgate.runtime.store import ExpertStore

    told: list[tuple[float, ...]] = []
    plain = ExpertStore.set_reuse

    def noted(self: ExpertStore, *numbers: float) -> None:
        told.append(numbers)
        plain(self, *numbers)

    monkeypatch.setattr(ExpertStore, "set_reuse", noted)
    with opened(folder, 12, eviction="priced") as model:
        found = run(model, TOKENS)
    assert_same(found, resident_run("olmoe", folder, None, TOKENS))
    assert told[0] == (11.0, pytest.approx(0.3 ** (1 / 3)), -0.04, 0.93), "three layers: 0.3 per step"
    assert len(told) == 2, "after 32 of the 39 steps"
    assert told[1] != told[0]
    told.clear()
    known = Reuse(half_life=7.0, intercept=-0.5, slope=0.6, discount=0.9, nll=0.0)
    with opened(folder, 12, eviction="priced", reuse=known) as model:
        run(model, TOKENS)
    assert told == [(7.0, pytest.approx(0.3 ** (1 / 3)), -0.5, 0.6)]


@pytest.mark.parametrize("host_gb", [None, 1.0, 0.0001])
@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_where_all_fit_the_modules_have_their_tensors(
    family: str, implementation: str | None, host_gb: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    wanted = resident_run(family, folder, implementation, 16)
    more: Any = {"host_gb": host_gb, "experts_implementation": implementation, "verify": True}
    with opened(folder, 10**6, **more) as model:
        assert model.specgate.verified == [0.0] * len(moe_layers(model))
        layers = moe_layers(model)
        assert_same(run(model, 16), wanted)
        if family != SWITCH:
            assert all(layer.experts.settled for layer in layers), "each layer's experts lie side by side"
            resident = load_resident(folder)
            for mine, theirs in zip(layers, moe_layers(resident), strict=True):
                experts: Any = mine.experts
                for name in experts.shapes:
                    assert torch.equal(getattr(experts, name), getattr(theirs.experts, name))
                assert not list(experts.parameters()), "they are the store's, not the model's"
            out = model(**prompt())
            with pytest.raises(ConfigError, match="for inference"):
                out.logits.sum().backward()
        store = model.specgate.store
        assert store.stats()["acquires"] == sum(layer.num_experts for layer in layers) or (
            store.stats()["acquires"] == len(layers)
        ), "nothing is asked of it any more"
    for layer in layers:
        left: Any = layer.experts
        assert not left.settled
        assert not set(left.shapes) & set(vars(left))


def test_values_that_make_no_sense(folder: Path) -> None:
    with pytest.raises(ConfigError, match="eviction='clever' is not known"):
        specgate.offload(folder, eviction="clever")
    with pytest.raises(ConfigError, match="threshold=-1 is no probability"):
        specgate.offload(folder, threshold=-1)


@pytest.mark.parametrize("forecasts", ["kernel", "torch"])
def test_what_was_foreseen_is_judged_by_what_came(forecasts: str) -> None:
    """Deadlines and uses are told by different threads: out of step they would agree by chance, 4 of 32."""
    ids = torch.tensor([[11, 350, 27, 1200, 5, 90, 333, 17, 42, 7]])
    with opened(Path("olmoe_ref"), 64, ROUTERS, forecasts=forecasts, threshold=0.5) as model:
        model.generate(input_ids=ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)
        stats = model.specgate.stats()
    assert stats["forecasts_judged"] > 500
    assert stats["forecasts_true"] > 0.4 * stats["forecasts_judged"]
