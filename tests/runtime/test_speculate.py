"""The speculation kernel gives what the predictor, its calibrator and the merge over the batch give in torch.

``emulated`` is the kernel's own source, run on the CPU block after block; tests marked ``gpu`` run it on a
device.

Letters: B sequences, T tokens, L MoE layers, H horizons, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specgate.errors import StoreError
from specgate.predictors.mlp import MLP
from specgate.predictors.quantize import pack
from specgate.predictors.speculation import speculate_in_torch, speculation_parts
from specgate.runtime import native
from specgate.runtime.speculate import Speculator
from specgate.traces.batch import RoutingBatch
from tests.predictors import support
from tests.runtime.speculation import (
    CASES,
    LOOKAHEAD,
    MLP_,
    RESIDUAL,
    VOCAB,
    compare,
    decoded,
    launch,
    make_predictor,
    make_routing,
    rarer,
    read,
    routing,
    until,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core was not compiled")
BACKENDS = ("cpu", "emulated")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_the_predictor(case: str, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, backend=backend)
    assert compare(predictor, speculator, routing(predictor, 1, 6)) > 0
    assert speculator.poll_forecast() is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [4, 33])
@pytest.mark.parametrize(
    "case", ["lookahead, wide", "mlp, ids only", "residual, wide", "mlp, one expert, deep"]
)
def test_it_merges_a_batch(case: str, B: int, backend: str) -> None:
    predictor = rarer(make_predictor(**CASES[case]))
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=B, backend=backend)
    compare(predictor, speculator, routing(predictor, B, 3))
    launch(speculator, routing(predictor, B, 3), 2, 0)
    p_N = torch.tensor([p for _, _, p in speculator.poll()])
    assert int(((p_N > 0.02) & (p_N < 0.99)).sum()) >= 3  # neither nothing nor everything is certain


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["router_lookahead", "router_residual", "mlp"])
def test_a_trained_predictor(name: str, backend: str, tmp_path: Path) -> None:
    predictor = support.make_predictor(name, **support.SMALL.get(name, {}))
    batches = [support.make_batch(seed=seed) for seed in range(4)]
    support.trainer(tmp_path, max_epochs=2).fit(predictor, support.loader(batches))
    predictor.eval()
    batch = support.make_batch(padded=False, seed=9)
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=3, backend=backend)
    assert compare(predictor, speculator, batch) > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["lookahead, wide", "residual, wide", "mlp, one expert, deep"])
def test_only_what_reaches_the_threshold_is_listed(case: str, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    batch = routing(predictor, 2, 3)
    found = 0
    for threshold in (0.1, 0.5, 0.9):
        speculator = Speculator(speculation_parts(predictor), threshold=threshold, batch=2, backend=backend)
        for t, layer in decoded(batch, predictor.layers):
            launch(speculator, batch, t, layer)
            forecast = speculator.poll_forecast()
            assert forecast is not None
            listed = {(layer, e, ahead): p for layer, e, p, ahead in forecast.entries}
            for target, expert, p, ahead in speculate_in_torch(predictor, until(batch, t + 1), layer, 0.0):
                if abs(p - threshold) > 1e-5:
                    assert ((target, expert, ahead) in listed) == (p > threshold)
            assert all(p >= threshold for p in listed.values())
            found += len(listed)
    assert found > 0


def test_thresholds_differ_by_point_and_horizon() -> None:
    predictor = make_predictor(**LOOKAHEAD)
    threshold_PH = torch.full((4, 3), 1.0)
    threshold_PH[1, 1] = 0.0
    speculator = Speculator(speculation_parts(predictor), threshold=threshold_PH)
    batch = routing(predictor, 1, 1)
    for layer in (-1, 0):
        launch(speculator, batch, 0, layer)
    assert speculator.poll() == []
    assert [(layer, e) for layer, e, _ in speculator.poll()] == [(2, e) for e in range(6)]
    speculator.set_threshold(0.0)
    launch(speculator, batch, 0, -1)
    assert len(speculator.poll()) == 18


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["lookahead", "mlp", "residual"])
def test_horizons_run_on_into_the_next_token(case: str, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, backend=backend)
    batch, targets = routing(predictor, 1, 1), {}
    for layer in range(-1, 3):
        launch(speculator, batch, 0, layer)
        found = speculator.poll_forecast()
        assert found is not None
        targets[layer] = sorted({(ahead, target) for target, _, _, ahead in found.entries})
    assert targets == {
        -1: [(1, 0), (2, 1), (3, 2)],
        0: [(1, 1), (2, 2), (3, 0)],
        1: [(1, 2), (2, 0), (3, 1)],
        2: [(1, 0), (2, 1), (3, 2)],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["lookahead, wide", "residual"])
def test_hidden_states_of_any_type(case: str, dtype: torch.dtype, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    batch = routing(predictor, 2, 2)
    assert batch.hidden_BTLD is not None
    batch = replace(batch, hidden_BTLD=batch.hidden_BTLD.to(dtype).float())
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=2, backend=backend)
    compare(predictor, speculator, batch, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["lookahead, wide", "residual, wide", "mlp, one expert, deep"])
def test_weights_in_bfloat16(case: str, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    with torch.no_grad():  # then the predictor's own matrices lose nothing by it
        for name, tensor in predictor.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() > 1 and "counts" not in name:
                tensor.copy_(tensor.bfloat16())
    if isinstance(predictor, MLP):
        predictor.entry_VF.weight.data.zero_()
    speculator = Speculator(
        speculation_parts(predictor, dtype=torch.bfloat16), threshold=0.0, batch=2, backend=backend
    )
    # The id table of router_lookahead holds rounded logits.
    compare(
        predictor, speculator, routing(predictor, 2, 3), atol=1e-5 if isinstance(predictor, MLP) else 0.02
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_are_unpacked(bits: int) -> None:
    predictor = make_predictor(**RESIDUAL | {"D": 64, "width": 32})
    pack(predictor, bits)
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=2)
    assert compare(predictor, speculator, routing(predictor, 2, 2)) > 0


# ------------------------------------------------------------------ prompts and state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", ["lookahead", "mlp", "mlp, ids only", "residual, wide", "mlp, one expert, deep"]
)
def test_a_prompt_that_was_read_counts_as_decoded(case: str, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    batch = routing(predictor, 2, 8)
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=2, backend=backend)
    read(speculator, batch, 5)
    assert compare(predictor, speculator, batch, start=5) > 0


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("case", ["mlp", "mlp, ids only"])
def test_padding_of_a_prompt_counts_for_nothing(case: str, left: bool) -> None:
    predictor = make_predictor(**CASES[case])
    batch = routing(predictor, 2, 6)
    speculator = Speculator(speculation_parts(predictor), batch=2, context=4)
    padded = make_routing(B=2, T=9, L=3, E=6, K=2, D=predictor.hidden_size, seed=3)
    valid = torch.zeros(2, 9, dtype=torch.bool)
    place = slice(3, 9) if left else slice(0, 6)
    valid[:, place] = True
    for name in ("experts_BTLK", "weights_BTLK", "token_ids_BT", "hidden_BTLD"):
        if getattr(padded, name) is not None:
            getattr(padded, name)[:, place] = getattr(batch, name)
    read(speculator, padded, 9, valid)
    state = {name: tensor.clone() for name, tensor in speculator.state.items()}
    read(speculator, batch, 6)
    for name, tensor in speculator.state.items():
        torch.testing.assert_close(state[name], tensor)
    assert float(state["memory"].abs().sum()) > 0


def test_a_sequence_that_has_ended_needs_nothing() -> None:
    predictor = make_predictor(**RESIDUAL)
    batch = routing(predictor, 2, 2)
    both = Speculator(speculation_parts(predictor), threshold=0.0, batch=2)
    both.state["live"][1] = 0
    one = Speculator(speculation_parts(predictor), threshold=0.0)
    single = RoutingBatch(**{k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
    for t, layer in decoded(batch, 3):
        launch(both, batch, t, layer)
        launch(one, single, t, layer)
        assert both.poll() == one.poll()


def test_reset_forgets() -> None:
    predictor = make_predictor(**MLP_)
    batch = routing(predictor, 2, 3)
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=2)
    compare(predictor, speculator, batch)
    speculator.reset()
    compare(predictor, speculator, batch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("case", ["lookahead", "residual"])
def test_a_hidden_state_that_is_not_finite_is_left_out(case: str, bad: float, backend: str) -> None:
    predictor = make_predictor(**CASES[case])
    parts = speculation_parts(predictor)
    batch = routing(predictor, 2, 4)
    assert batch.hidden_BTLD is not None
    one = Speculator(parts, threshold=0.0, backend=backend)
    both = Speculator(parts, threshold=0.0, batch=2, backend=backend)
    single = RoutingBatch(**{k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()})
    assert single.hidden_BTLD is not None
    single = replace(single, hidden_BTLD=single.hidden_BTLD.clone())
    batch.hidden_BTLD[1, 1, 1, 3] = bad
    for t, layer in decoded(batch, 3):
        launch(both, batch, t, layer)
        launch(one, single, t, layer)
        found, alone = both.poll_forecast(), one.poll_forecast()
        assert found is not None
        assert alone is not None
        assert found.ignored == int((t, layer) == (1, 1))
        if found.ignored:  # (what shares a pass with other rows is summed in another order)
            p_N, alone_N = (torch.tensor([e[2] for e in x.entries]) for x in (found, alone))
            torch.testing.assert_close(p_N, alone_N, rtol=0, atol=1e-6)
        assert all(0 <= p <= 1 for _, _, p, _ in found.entries)
    assert all(bool(tensor.isfinite().all()) for tensor in both.state.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_and_experts_that_do_not_exist_are_none(backend: str) -> None:
    predictor = make_predictor(**RESIDUAL)
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, backend=backend)
    for bad in (-1, VOCAB, 2**40):
        speculator.launch(-1, token_ids=torch.tensor([bad]))
        speculator.launch(0, torch.randn(1, 8), torch.tensor([[bad, 1]]), torch.tensor([[float("nan"), 0.5]]))
    while (found := speculator.poll_forecast()) is not None:
        assert all(0 <= p <= 1 for _, _, p, _ in found.entries)
    assert all(bool(tensor.isfinite().all()) for tensor in speculator.state.values())


# ------------------------------------------------------------------ the ring


def test_polling() -> None:
    predictor = make_predictor(**LOOKAHEAD)
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, slots=4)
    batch = routing(predictor, 1, 1)
    assert speculator.poll_forecast() is None
    assert speculator.poll() == []
    for layer in range(-1, 2):
        launch(speculator, batch, 0, layer)
    assert [speculator.poll_forecast().sequence for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    assert speculator.lost == 0
    for _ in range(9):
        launch(speculator, batch, 0, 0)
    found = speculator.poll_forecast()
    assert found is not None
    assert (found.sequence, speculator.lost) == (11, 8)  # the slot of 3 holds 11 by now
    newest = speculator.poll_forecast(newest=True)
    assert newest is not None
    assert newest.sequence == 12
    assert speculator.poll_forecast(newest=True) is None
    other = native.require().ForecastReader(speculator.ring)
    assert other.poll_newest()[0] == 12
    speculator.close()
    assert other.poll() is None
    with pytest.raises(StoreError, match="was closed"):
        launch(speculator, batch, 0, 0)
