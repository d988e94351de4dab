"""The speculation kernel on a CUDA device: the same as torch ops there, in a fraction of their time, in a
graph too.

Letters: B sequences, T tokens, L MoE layers, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from specgate.metrics.timing import time_interleaved
from specgate.predictors.base import Predictor
from specgate.predictors.speculation import speculate_in_torch, speculation_parts
from specgate.runtime import native
from specgate.runtime.speculate import Foreseen, Speculator
from specgate.traces.batch import RoutingBatch
from tests.runtime.speculation import (
    CASES,
    LOOKAHEAD,
    RESIDUAL,
    compare,
    decoded,
    executed,
    launch,
    make_predictor,
    rarer,
    read,
    routing,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.backend() != "native+cuda", reason="the native core has no CUDA"),
]


def on_cuda(
    name: str, threshold: float = 0.0, batch: int = 1, **options: int
) -> tuple[Predictor, Speculator]:
    """A predictor of :data:`CASES` on the device, and its kernel."""
    predictor = rarer(make_predictor(**CASES[name])).cuda()
    speculator = Speculator(
        speculation_parts(predictor), threshold=threshold, batch=batch, device="cuda", **options
    )
    return predictor, speculator


@pytest.mark.parametrize("B", [1, 4, 33])
@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_torch_on_the_device(case: str, B: int) -> None:
    predictor, speculator = on_cuda(case, batch=B)
    assert compare(predictor, speculator, routing(predictor, B, 4), atol=2e-5) > 0


def test_long_decoding_with_a_prompt() -> None:
    """More tokens than one work item of the attention holds, and the first of them read."""
    predictor, speculator = on_cuda("residual, wide", context=256)
    batch = routing(predictor, 1, 150)
    read(speculator, batch, 140)
    assert compare(predictor, speculator, batch, start=140, atol=5e-5) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_and_weights_of_half_size(dtype: torch.dtype) -> None:
    predictor = make_predictor(**RESIDUAL)
    parts = speculation_parts(predictor, dtype=torch.bfloat16)
    batch = routing(predictor, 5, 3)
    here = Speculator(parts, threshold=0.0, batch=5)
    there = Speculator(parts, threshold=0.0, batch=5, device="cuda")
    for t, layer in decoded(batch, 3):
        launch(here, batch, t, layer, dtype)
        launch(there, batch, t, layer, dtype)
        torch.cuda.synchronize()
        p_N, other_N = (torch.tensor([p for *_, p in x.poll()]) for x in (here, there))
        torch.testing.assert_close(p_N, other_N, rtol=0, atol=1e-5)


def all_forecasts(speculator: Speculator, batch: RoutingBatch, layers: int) -> list[Foreseen | None]:
    """Every forecast of a batch, decoded from its first token."""
    found = []
    for t, layer in decoded(batch, layers):
        launch(speculator, batch, t, layer)
        torch.cuda.synchronize()
        found.append(speculator.poll_forecast())
    return found


@pytest.mark.parametrize("case", ["lookahead, wide", "residual, wide", "residual, past the next token"])
def test_the_number_of_blocks_changes_not_one_bit(case: str) -> None:
    batch = routing(make_predictor(**CASES[case]), 6, 3)
    found = [all_forecasts(on_cuda(case, batch=6, option=blocks)[1], batch, 3) for blocks in (0, 0, 1, 7)]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_hidden_state_that_is_not_finite_is_left_out() -> None:
    predictor, speculator = on_cuda("residual", batch=2)
    batch = routing(predictor, 2, 3)
    assert batch.hidden_BTLD is not None
    batch.hidden_BTLD[1, 1, 1, 3] = torch.nan
    ignored = [f.ignored for f in all_forecasts(speculator, batch, 3) if f is not None]
    assert ignored == [0] * 6 + [1] + [0] * 5
    assert all(bool(tensor.isfinite().all()) for tensor in speculator.state.values())


def captured(speculator: Speculator, batch: RoutingBatch, layers: int) -> tuple[torch.cuda.CUDAGraph, object]:
    """One token's launches as a graph, and its inputs, which must live as long; decodes three tokens."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    inputs = [
        (
            batch.hidden_BTLD[:, 0, layer].cuda().contiguous(),  # type: ignore[index]
            batch.experts_BTLK[:, 0, layer].cuda().contiguous(),
            executed(batch)[:, 0, layer].cuda().contiguous(),
        )
        for layer in range(layers)
    ]
    ids = batch.token_ids_BT[:, 0].cuda().contiguous()

    def token() -> None:
        speculator.launch(-1, token_ids=ids)
        for layer in range(layers):
            speculator.launch(layer, *inputs[layer])

    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            token()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        token()
    return graph, (inputs, ids)


@pytest.mark.parametrize("B", [1, 6])
@pytest.mark.parametrize("case", ["lookahead, wide", "residual, wide"])
def test_a_graph_replays_the_launches(case: str, B: int) -> None:
    predictor, speculator = on_cuda(case, batch=B)
    plain = on_cuda(case, batch=B)[1]
    batch = routing(predictor, B, 1)
    graph, inputs = captured(speculator, batch, 3)
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    del inputs
    for _ in range(7):  # three before the capture, four replays
        for layer in range(-1, 3):
            launch(plain, batch, 0, layer)
    torch.cuda.synchronize()
    for number in range(28):
        found, expected = speculator.poll_forecast(), plain.poll_forecast()
        assert found is not None
        assert found.sequence == number + 1
        assert found == expected


def test_a_launch_does_not_wait_for_the_device_and_the_ring_is_polled_meanwhile() -> None:
    """The scheduler's thread gets the forecast while nobody synchronises."""
    predictor, speculator = on_cuda("lookahead, wide")
    batch = routing(predictor, 1, 1)
    launch(speculator, batch, 0, -1)
    torch.cuda.synchronize()
    assert speculator.poll_forecast() is not None
    hidden = batch.hidden_BTLD[:, 0, 0].cuda().contiguous()  # type: ignore[index]
    found: list[Foreseen] = []

    def scheduler() -> None:
        until = time.monotonic() + 20
        while not found and time.monotonic() < until:
            forecast = speculator.poll_forecast()
            if forecast is not None:
                found.append(forecast)

    thread = threading.Thread(target=scheduler)
    torch.cuda._sleep(1_000_000_000)  # half a second
    start = time.perf_counter()
    speculator.launch(0, hidden)
    launched = time.perf_counter() - start
    thread.start()
    assert not torch.cuda.current_stream().query()  # the device is still asleep
    assert launched < 0.1
    thread.join()
    assert [f.source_layer for f in found] == [0]


def test_a_reader_that_is_overtaken_sees_whole_forecasts() -> None:
    predictor, speculator = on_cuda("lookahead, wide", slots=2)
    batch = routing(predictor, 1, 1)
    launches = [lambda layer=layer: launch(speculator, batch, 0, layer) for layer in (-1, 0)]
    expected = {}
    for number in range(4):
        launches[number % 2]()
        torch.cuda.synchronize()
        found = speculator.poll_forecast()
        assert found is not None
        expected[number % 2] = found.entries
    hidden = batch.hidden_BTLD[:, 0, 0].cuda().contiguous()  # type: ignore[index]
    ids = batch.token_ids_BT[:, 0].cuda()
    seen, last = 0, 4
    for _ in range(3000):
        speculator.launch(-1, token_ids=ids)
        speculator.launch(0, hidden)
        while (found := speculator.poll_forecast()) is not None:
            assert found.sequence > last
            assert found.entries == expected[(found.sequence - 1) % 2]
            seen, last = seen + 1, found.sequence
    torch.cuda.synchronize()
    while (found := speculator.poll_forecast()) is not None:
        seen, last = seen + 1, found.sequence
    assert last == 6004
    assert seen + speculator.lost == 6000


@pytest.mark.parametrize("name", ["router_lookahead", "router_residual", "mlp"])
def test_at_least_five_times_faster_than_torch_ops(name: str) -> None:
    """At batch 1 and the shape of Qwen3-30B-A3B's layers, both up to the list on the host, medians
    interleaved."""
    case = {"name": name, "L": 6, "E": 128, "K": 8, "D": 2048, "calibration": "temperature"}
    predictor = make_predictor(**case).cuda()
    speculator = Speculator(speculation_parts(predictor, dtype=torch.bfloat16), threshold=0.5, device="cuda")
    batch = routing(predictor, 1, 64)
    read(speculator, batch, 63)
    device_batch = batch.to("cuda")
    launch(speculator, batch, 63, -1)
    inputs = (
        device_batch.hidden_BTLD[:, -1, 0].contiguous(),  # type: ignore[index]
        device_batch.experts_BTLK[:, -1, 0].contiguous(),
        device_batch.weights_BTLK[:, -1, 0].contiguous(),
    )

    def kernel() -> None:
        speculator.poll_forecast(newest=True)
        speculator.launch(0, *inputs)
        while speculator.poll_forecast() is None:
            pass

    def ops() -> None:
        speculate_in_torch(predictor, device_batch, 0, 0.5)

    calls: dict[str, Callable[[], object]] = {"kernel": kernel, "torch": ops}
    timings = time_interleaved(calls, "cuda", repeats=31)
    print({key: timing.median for key, timing in timings.items()})
    assert timings["torch"].median >= 5 * timings["kernel"].median


def test_lookahead_of_many_sequences() -> None:
    case = LOOKAHEAD | {"L": 4, "E": 64, "K": 8, "D": 512, "calibration": "temperature"}
    predictor = rarer(make_predictor(**case)).cuda()
    speculator = Speculator(speculation_parts(predictor), threshold=0.0, batch=200, device="cuda")
    compare(predictor, speculator, routing(predictor, 200, 1), atol=2e-5)
