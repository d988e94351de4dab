"""Times of a model's parts: against numbers worked out by hand, and how they move with their inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.errors import ConfigError
from specgate.policy.roofline import RUNTIMES, Attention, Runtime, costs_of, roofline, step_tokens, tokens_of
from specgate.policy.workload import Workload, decoding, merge
from tests.policy.machines import machine, sizes

PLAIN = Runtime("plain", 0, 0, 0, False, 0.0)
GATHERS = replace(PLAIN, gathers=True)


def one_token() -> Workload:
    """One token: experts 0 and 3, then 1 and 2."""
    return decoding([np.array([[[0, 3], [1, 2]]])], 4)


def test_one_token_by_hand() -> None:
    """Everything is bound by memory: 100 bytes a nanosecond."""
    found = roofline(sizes(), one_token(), machine(), context=100, runtime=PLAIN)
    # Layer 0: 500 weights, 100 tokens of 16 cached values, the head's 3000 weights; 2 bytes each.
    # Layer 1: 700 weights, a window of 10 tokens.
    assert found.pre_ns_N.tolist() == pytest.approx(
        [(500 * 2 + 100 * 16 * 2) / 100 + 3000 * 2 / 100, (700 * 2 + 10 * 16 * 2) / 100]
    )
    assert found.exec_ns_N.tolist() == pytest.approx([2 * 2000 / 100] * 2)
    assert found.binds == "memory"
    assert found.shares == pytest.approx({"memory": 1.0, "compute": 0, "launches": 0, "host": 0})


def test_many_tokens_are_bound_by_arithmetic() -> None:
    """1000 tokens of one prompt: 1000 operations a nanosecond."""
    work = decoding([np.tile(np.array([[[0, 1], [2, 3]]]), (1000, 1, 1))], 4, chunk=1000)
    found = roofline(sizes(), work, machine(), context=100, sequences=1, runtime=PLAIN)
    # 2 operations for each weight and pair of token and context; the head runs for the last token alone.
    first = 1000 * (2 * 500 + 2 * 100 * 32) / 1000 + 3000 * 2 / 100
    assert found.pre_ns_N.tolist() == pytest.approx([first, 1000 * (2 * 700 + 2 * 10 * 32) / 1000])
    assert found.exec_ns_N.tolist() == pytest.approx([2 * 1000 * 2 * 1000 / 1000] * 2)
    assert found.binds == "compute"


def test_gathering_costs_three_passes_per_token_served() -> None:
    work = decoding([np.array([[[0, 3], [1, 2]], [[0, 1], [1, 2]]])], 4, chunk=2)
    once = roofline(sizes(), work, machine(tflops=100), runtime=PLAIN)
    gathered = roofline(sizes(), work, machine(tflops=100), runtime=GATHERS)
    assert once.exec_ns_N.tolist() == pytest.approx([3 * 20, 2 * 20]), "distinct experts"
    assert gathered.exec_ns_N.tolist() == pytest.approx([4 * 60, 4 * 60]), "assignments"


def test_launches_run_ahead_of_the_device_but_not_past_a_router() -> None:
    """10 dense and 4 expert kernels of 1 us: the host takes the time, less what the experts ran meanwhile."""
    slow = Runtime("slow", 10, 4, 5, False, 3.0)
    found = roofline(sizes(), one_token(), machine(kernel_us=1), runtime=slow)
    assert found.exec_ns_N.tolist() == [4_000, 4_000]
    assert found.pre_ns_N.tolist() == [15_000, 14_000 - 4_000], "first: 10 dense and 5 of the step"
    assert found.binds == "launches"
    assert found.shares["host"] == pytest.approx(6_000 / (8_000 + 25_000 + 6_000))


def test_a_batch_reads_a_cache_per_sequence() -> None:
    documents = [decoding([np.array([[[0, 1], [2, 3]]])], 4) for _ in range(3)]
    found = roofline(sizes(), merge(documents), machine(), context=100, runtime=PLAIN)
    assert found.pre_ns_N[1] == pytest.approx((700 * 2 + 3 * 10 * 16 * 2) / 100)


def test_a_compressed_cache_is_expanded_once_per_sequence() -> None:
    latent = sizes(attentions=(Attention(1, 0, 0, expanded=5000),))
    work = decoding([np.tile(np.array([[[0, 1], [2, 3]]]), (4, 1, 1))], 4, chunk=4)
    found = roofline(latent, work, machine(), context=100, sequences=1, runtime=PLAIN)
    assert found.pre_ns_N[1] == pytest.approx(4 * 2 * 700 / 1000 + 2 * 100 * 5000 / 1000)


def test_layers_without_experts_belong_to_the_stretch_before_the_next_router() -> None:
    more = sizes(attentions=(Attention(0, 16, 32), Attention(0, 16, 32), Attention(2, 16, 32)))
    slow = Runtime("slow", 10, 0, 0, False, 0.0)
    found = roofline(more, one_token(), machine(kernel_us=1, device_gb_per_s=1e6), runtime=slow)
    # Two layers, and the one after the last MoE layer; the second waits 4 ns less, for the experts before it.
    assert found.pre_ns_N.tolist() == [30_000, 10_000 - 4]
    assert found.exec_ns_N[0] == 4


def test_tokens_of_a_step() -> None:
    work = decoding([np.array([[[0, 3], [1, 2]], [[0, 1], [1, 2]], [[0, 1], [1, 3]]])], 4, chunk=2)
    assert tokens_of(work).tolist() == [2, 2, 1, 1]
    assert step_tokens(work).tolist() == [2, 1]
    assert step_tokens(work.part(0, 0)).tolist() == []


def test_costs_have_the_machine_and_the_times() -> None:
    work = one_token()
    found = costs_of(sizes(), work, machine(), context=100, runtime=RUNTIMES["replay"], forecast_us=7)
    times = roofline(sizes(), work, machine(), context=100, runtime=RUNTIMES["replay"])
    assert found.expert_bytes == 2000
    assert found.copy_ns == pytest.approx(2_000 + 2000 / 10)
    assert found.read_ns == pytest.approx(50_000 + 2000 / 2)
    assert (found.event_ns, found.forecast_ns, found.link_chunk_bytes) == (25_000, 7_000, 0)
    assert np.array_equal(found.pre_ns_N, times.pre_ns_N)
    assert np.array_equal(found.exec_ns_N, times.exec_ns_N)


def test_a_coded_block_is_shorter_and_has_to_be_decoded() -> None:
    found = costs_of(sizes(), one_token(), machine(), block_bytes=600, chunk_bytes=256)
    assert found.expert_bytes == 600
    assert found.copy_ns == pytest.approx(2_000 + (600 + 2000) / 100 + 600 / 10)
    assert found.link_chunk_bytes == 256


def test_copies_in_pieces_have_a_latency_each() -> None:
    """A piece of 20 KB takes 2 us at 10 GB/s, and as long to begin."""
    found = costs_of(sizes(), one_token(), machine(), chunk_bytes=256, piece_bytes=20_000)
    assert found.forecast_share == pytest.approx(0.5)
    assert costs_of(sizes(), one_token(), machine(), chunk_bytes=256).forecast_share == 1


def test_host_memory_can_be_the_slower_end_of_the_link() -> None:
    assert costs_of(sizes(), one_token(), machine(host_gb_per_s=4)).link_bytes_per_ns == 4


@pytest.mark.parametrize("context", [0, -5, float("nan"), True])
def test_a_context_that_is_none_is_refused(context: Any) -> None:
    with pytest.raises(ConfigError, match="write 1 or more tokens"):
        roofline(sizes(), one_token(), machine(), context=context)


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 layers, 2 of 4 experts, and small has 2 layers, 2 of 8"):
        roofline(sizes(experts=8), one_token(), machine())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"top_k": 5}, "4 experts in a layer and uses 5"),
        ({"layers": 0}, "layers=0"),
        ({"slot_bytes": 0}, "slot_bytes=0"),
        ({"stretch_parameters": (1,)}, "2 MoE layers and 1 stretches"),
        ({"step_parameters": -1}, "fewer than 0 weights"),
        ({"attentions": (Attention(3, 1, 1),)}, "runs in no stretch"),
    ],
)
def test_impossible_sizes_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sizes(**changed)


@settings(max_examples=40, deadline=None)
@given(
    bandwidth=st.floats(1, 1000),
    tflops=st.floats(0.1, 100),
    kernel=st.floats(0, 20),
    context=st.integers(1, 10_000),
    runtime=st.sampled_from(list(RUNTIMES.values())),
)
def test_a_faster_machine_is_never_slower(
    bandwidth: float, tflops: float, kernel: float, context: int, runtime: Runtime
) -> None:
    def total(**changed: Any) -> float:
        values = {"device_gb_per_s": bandwidth, "tflops": tflops, "kernel_us": kernel} | changed
        found = roofline(sizes(), one_token(), machine(**values), context=context, runtime=runtime)
        assert sum(found.shares.values()) == pytest.approx(1)
        return float(found.pre_ns_N.sum() + found.exec_ns_N.sum())

    base = total()
    assert total(device_gb_per_s=2 * bandwidth) <= base * (1 + 1e-9)
    assert total(tflops=2 * tflops) <= base * (1 + 1e-9)
    assert total(kernel_us=kernel / 2) <= base * (1 + 1e-9)
