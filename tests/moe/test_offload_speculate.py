"""Forecasts by the speculation kernel: what torch would foresee, followed by the store, and no value changed.

Letters: H horizons, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import specgate
from specgate.errors import ConfigError
from specgate.forecast import Forecast
from specgate.moe.families import moe_layers
from specgate.moe.offload_forecast import Forecaster
from specgate.moe.offload_speculate import KernelForecaster
from specgate.predictors.mlp import MLP
from specgate.runtime import native
from tests.moe.offload_support import (
    CONTEXT,
    SWITCH,
    assert_same,
    load_resident,
    prompt,
    resident_run,
    run,
    saved,
)
from tests.moe.test_offload_use import _together

TOKENS = 6
needs_native = pytest.mark.skipif(not native.available(), reason="the native core was not compiled")


def mlp_for(folder: Path, **more: Any) -> MLP:
    """An MLP with random weights that fits the decoder of a tiny model."""
    model = load_resident(folder)
    layers = [layer for layer in moe_layers(model) if layer.stack == "decoder"]
    torch.manual_seed(0)
    sizes = {"layers": len(layers), "experts": 8, "top_k": layers[0].top_k, "hidden_size": 32}
    made = MLP(
        **{"phase": "decode", "lookahead": 2, "width": 16, "heads": 2, "vocab_size": model.config.vocab_size}
        | sizes
        | more
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def opened(folder: Path, predictor: Any, share: float = 0.4, **more: Any) -> Any:
    settings = {"context": CONTEXT, "poison": True, "threshold": 0.0, **more}
    plan = specgate.offload(folder, predictor=predictor, **settings).plan
    slots = max(plan.least_slots, int(plan.blocks * share))
    return specgate.offload(folder, plan.budget_for(slots), predictor, **settings)


def said(forecast: Forecast) -> dict[tuple[int, int], float]:
    """(layer, expert) -> p."""
    return {
        (layer, expert): float(forecast.p_HE[h, expert])
        for h, layer in enumerate(forecast.target_layer_H.tolist())
        for expert in range(forecast.p_HE.shape[1])
    }


@needs_native
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", SWITCH])
def test_it_foresees_what_torch_foresees(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    predictor = mlp_for(folder)
    wanted: list[tuple[int, dict[tuple[int, int], float]]] = []
    real = MLP.predict_next_experts

    def noted(self: MLP, state: Any, layer: int | None = None) -> Forecast:
        forecast = real(self, state, layer)
        wanted.append((forecast.source_layer, said(forecast)))
        return forecast

    monkeypatch.setattr(MLP, "predict_next_experts", noted)
    more = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    with opened(folder, predictor, forecasts="torch") as model:
        assert type(model.specgate.forecaster) is Forecaster
        model.generate(**prompt(), **more)
    with opened(folder, predictor) as model:
        forecaster = model.specgate.forecaster
        assert type(forecaster) is KernelForecaster
        model.generate(**prompt(), **more)
        assert forecaster.asked == len(wanted) > 10
        for source, expected in wanted:
            found = forecaster.speculator.poll_forecast()
            assert (found.source_layer, found.ignored) == (source, 0)
            assert len(found.entries) == len(expected)
            for layer, expert, p, ahead in found.entries:
                assert abs(p - expected[layer, expert]) < 2e-3
                assert (layer - source - ahead) % predictor.layers == 0
        assert forecaster.speculator.poll_forecast() is None


@needs_native
@pytest.mark.parametrize("family", ["olmoe", SWITCH])
def test_the_store_follows_and_no_value_changes(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved(family, tmp_path_factory)
    with opened(folder, mlp_for(folder), eviction="forecast", forecasts="kernel") as model:
        for _ in range(2):
            assert_same(run(model, TOKENS), resident_run(family, folder, None, TOKENS))
        one = prompt(sequences=1)
        assert_same(run(model, TOKENS, one), resident_run(family, folder, None, TOKENS, sequences=1))
        model.specgate.store.drain()
        stats = model.specgate.stats()
        assert stats["followed"] > 10
        assert stats["copied_bytes_prefetch"] > 0
        assert stats["forecasts"] > 10
    assert model.specgate.forecaster.speculator is None
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


@needs_native
def test_more_sequences_than_before_and_threads(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("olmoe", tmp_path_factory)
    wanted = {n: resident_run("olmoe", folder, None, TOKENS, sequences=n) for n in (1, 2)}
    with opened(folder, mlp_for(folder)) as model:
        for n in (1, 2, 1):
            assert_same(run(model, TOKENS, prompt(sequences=n)), wanted[n])
        jobs = [lambda n=n: (n, run(model, TOKENS, prompt(sequences=n))) for n in (1, 2, 2)]
        for n, found in _together(jobs):
            assert_same(found, wanted[n])
        assert model.specgate.forecaster.speculator.batch == 2


@needs_native
def test_an_error_in_the_middle_of_a_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("olmoe", tmp_path_factory)
    with opened(folder, mlp_for(folder)) as model:
        layer: Any = moe_layers(model)[1].router
        calls = 0

        def fail(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt

        handle = layer.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, TOKENS)
        handle.remove()
        asked = model.specgate.forecaster.asked
        assert_same(run(model, TOKENS), resident_run("olmoe", folder, None, TOKENS))
        assert model.specgate.forecaster.asked > asked


def test_where_the_kernel_does_not_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = saved("olmoe", tmp_path_factory)
    decode, prefill = mlp_for(folder), mlp_for(folder, phase="prefill")
    for predictor, more, sentence in (
        (decode, {"store": "simple"}, "needs the native store"),
        (
            [decode, prefill],
            {},
            "runs one predictor, trained for decoding" if native.available() else "native",
        ),
        (prefill, {}, "runs one predictor, trained for decoding" if native.available() else "native"),
    ):
        with (
            pytest.raises(ConfigError, match=sentence),
            opened(folder, predictor, forecasts="kernel", **more),
        ):
            pass
        with opened(folder, predictor, **more) as model:
            assert type(model.specgate.forecaster) is Forecaster
            assert_same(run(model, TOKENS), resident_run("olmoe", folder, None, TOKENS))
    with pytest.raises(ConfigError, match="forecasts='fast' is not known"):
        specgate.offload(folder, forecasts="fast")
