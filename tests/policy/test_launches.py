"""When host and device are done: against a host and a device that take one operation after the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.policy.hardware import Hardware
from specgate.policy.launches import Work, answered_at_once, launched_ahead, waited_for
from specgate.policy.roofline import RUNTIMES, Runtime, costs_of, roofline
from tests.policy.machines import machine, sizes
from tests.policy.test_roofline import one_token

TIMES = st.floats(0, 500)


def queue(
    dense_N: list[float],
    experts: float,
    head: float,
    counts: tuple[int, int, int],
    operation: float,
    layers: int,
    readback: float,
    upload: float,
    ahead: bool = False,
    copying: float = 0.0,
    asked: float = 0.0,
) -> list[float]:
    """When each event's router is known, operation by operation; the first of a part does all of its work.

    The host launches one operation after the other, the device runs each once it is launched, in order. The
    host hands over what is foreseen before a step, and once an event's experts are launched.
    """
    host = device = 0.0
    known = []

    def run(count: int, work: float) -> None:
        nonlocal host, device
        for i in range(count):
            host += operation
            device = max(device, host) + (work if i == 0 else 0.0)

    for n, dense in enumerate(dense_N):
        if n % layers == 0:
            run(counts[2], head)
            host = max(host, device) + readback + asked
        run(counts[0], dense)
        host = max(host, device) + readback
        known.append(host)
        there = host + copying
        host = host + upload if ahead else there + upload
        device = max(device, host, there)
        run(counts[1], experts)
        host += asked
    return known


@settings(max_examples=200, deadline=None)
@given(
    dense=st.lists(TIMES, min_size=2, max_size=6),
    experts=TIMES,
    head=TIMES,
    counts=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5)),
    operation=st.floats(0.1, 30),
    readback=st.floats(0, 50),
    upload=st.floats(0, 50),
    asked=st.floats(0, 60),
    slower=st.floats(0.001, 1),
)
def test_a_host_that_waits_against_a_queue(
    dense: list[float], experts: float, head: float, counts: tuple[int, int, int], operation: float,
    readback: float, upload: float, asked: float, slower: float,
) -> None:  # fmt: skip
    layers = 2
    dense = dense[: len(dense) - len(dense) % layers]
    N = len(dense)
    work = Work(
        dense_N=np.array(dense),
        launches_N=np.full(N, counts[0] * operation),
        experts_N=np.full(N, experts),
        launch_experts=counts[1] * operation,
        head_S=np.full(N // layers, head),
        launch_head=counts[2] * operation,
        operation=operation,
        layers=layers,
        asked=asked,
    )
    found = waited_for(work, readback, upload, ahead=True)
    model = (dense, experts, head, counts)
    want = queue(*model, operation, layers, readback, upload, asked=asked)
    between_N = found.exec_N[:-1] + found.pre_N[1:]  # from router to router
    assert between_N.tolist() == pytest.approx(np.diff(want).tolist())
    by = 1 + slower
    late_N = np.diff(queue(*model, by * operation, layers, readback, upload, asked=by * asked)) - np.diff(
        want
    )
    bound_N = found.bound_exec_N[:-1] + found.bound_pre_N[1:]
    assert (late_N >= slower * bound_N - 1e-6).all(), "a slower host takes longer for what it binds, at least"
    most = sum(counts) * operation + 2 * asked
    assert (late_N <= slower * most + 1e-6).all()
    still = (late_N < 1e-3 * slower * operation) & (bound_N > 1e-6)
    assert not still.any(), "and what it does not bind takes no longer"
    assert (found.pre_N >= 0).all()
    assert (found.host_N <= found.pre_N + found.exec_N + 1e-9).all()


@settings(max_examples=200, deadline=None)
@given(
    dense=st.lists(TIMES, min_size=2, max_size=6),
    experts=TIMES,
    head=TIMES,
    counts=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5)),
    operation=st.floats(0.1, 30),
    readback=st.floats(0, 50),
    send=st.floats(0, 50),
    asked=st.floats(0, 60),
    copying=st.one_of(st.just(0.0), st.floats(0, 2000)),
)
def test_a_host_that_launches_ahead_against_a_queue(
    dense: list[float], experts: float, head: float, counts: tuple[int, int, int], operation: float,
    readback: float, send: float, asked: float, copying: float,
) -> None:  # fmt: skip
    layers = 2
    dense = dense[: len(dense) - len(dense) % layers]
    N = len(dense)
    work = Work(
        dense_N=np.array(dense),
        launches_N=np.full(N, counts[0] * operation),
        experts_N=np.full(N, experts),
        launch_experts=counts[1] * operation,
        head_S=np.full(N // layers, head),
        launch_head=counts[2] * operation,
        operation=operation,
        layers=layers,
        asked=asked,
    )
    found = launched_ahead(work, readback, send)
    assert found.launch_N is not None
    known = [max(found.pre_N[0], found.launch_N[0])]  # as the simulator does it, with so much copying
    for n in range(1, N):
        end = known[-1] + copying + found.exec_N[n - 1]
        known.append(max(end + found.pre_N[n], known[-1] + found.launch_N[n]))
    want = queue(dense, experts, head, counts, operation, layers, readback, send, True, copying, asked)
    late = np.diff(known) - np.diff(want)
    if copying:
        assert late.min() >= -1e-6, "never too fast"
        most = send + 2 * operation + asked
        assert late.max() <= most + 1e-6, "what is sent, begun and handed over while experts are copied"
    else:
        assert late.tolist() == pytest.approx([0.0] * (N - 1), abs=1e-6)
    assert known[0] == pytest.approx(want[0])
    assert (found.bound_pre_N <= found.pre_N + 1e-9).all()
    assert found.bound_exec_N.tolist() == [send + operation] * N
    first_N = np.arange(N) % layers == 0
    assert (found.bound_pre_N[~first_N] == 0).all(), "the device's own work follows on the experts"
    assert (found.bound_pre_N[first_N] >= asked + operation).all()


def test_a_processor_does_both_one_after_the_other() -> None:
    work = Work(
        np.array([5.0, 7.0]), np.array([2.0, 2.0]), np.array([11.0, 11.0]), 3.0, np.array([13.0]), 1.0, 1.0, 2
    )
    found = waited_for(work, 0.5, 0.25, ahead=False)
    assert found.exec_N.tolist() == [14.25, 14.25]
    assert found.bound_exec_N.tolist() == [3, 3]
    assert found.bound_pre_N.tolist() == [3, 2]
    assert found.pre_N.tolist() == [13 + 1 + 0.5 + 5 + 2 + 0.5, 7 + 2 + 0.5]


def test_nothing_is_waited_for_in_a_profile_that_does_not_say_how_long() -> None:
    """Vendors' figures: as it was before the host's time was measured."""
    old = machine(kernel_us=1)
    slow, waits = Runtime("slow", 10, 4, 5, False, 3.0), Runtime("slow", 10, 4, 5, False, 3.0, waits=True)
    a, b = (roofline(sizes(), one_token(), old, runtime=r) for r in (slow, waits))
    assert a.pre_ns_N.tolist() == b.pre_ns_N.tolist()
    assert a.exec_ns_N.tolist() == b.exec_ns_N.tolist()


def measured(**changed: float) -> Hardware:
    return machine(**{"operation_us": 1, "readback_us": 10, "upload_us": 20, "kernel_us": 0.5} | changed)


def test_a_measured_profile_by_hand() -> None:
    """10 dense and 4 expert operations of 1 us; the device is faster."""
    slow = Runtime("slow", 10, 4, 5, False, 3.0, waits=True)
    found = roofline(sizes(), one_token(), measured(), runtime=slow)
    assert found.exec_ns_N.tolist() == [24_000, 24_000], "slots sent over, four launches"
    assert found.pre_ns_N.tolist() == [5_000 + 10_000 + 10_000 + 10_000, 10_000 + 10_000]
    waiting = 3 * 10_000 + 2 * 20_000 + 2 * 3_000
    total = 2 * 24_000 + 35_000 + 20_000 + 2 * 3_000
    assert found.shares["host"] == pytest.approx(waiting / total)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.binds == "host"


def test_a_measured_profile_by_hand_with_launches_ahead() -> None:
    """As before, but 5 us to send slots, hidden behind whatever is copied."""
    ahead = Runtime("ahead", 10, 4, 5, False, 3.0, waits=True, ahead=True)
    found = costs_of(sizes(), one_token(), measured(send_us=5), runtime=ahead)
    experts, begun = 2 * 2000 / 100, 5_000 + 1_000
    assert found.exec_ns_N.tolist() == pytest.approx([begun + experts] * 2)
    assert found.launch_ns_N is not None
    assert found.launch_ns_N.tolist() == pytest.approx([35_000, 5_000 + 4_000 + 10_000 + 10_000])
    assert found.pre_ns_N[0] == found.launch_ns_N[0]
    dense = (700 * 2 + 16 * 2) / 100
    assert found.pre_ns_N[1] == pytest.approx(10_000 + dense)
    assert found.compute_ns == pytest.approx(35_000 + 29_000 + begun + experts + 2 * 3_000)
    shares = roofline(sizes(), one_token(), measured(send_us=5), runtime=ahead).shares
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    waiting = costs_of(sizes(), one_token(), measured(), runtime=ahead)
    assert waiting.launch_ns_N is None, "a profile that does not say what sending costs"


def test_an_engine_that_does_not_wait_is_not_slowed_down() -> None:
    found = roofline(sizes(), one_token(), measured(), runtime=RUNTIMES["fused"])
    assert found.exec_ns_N.tolist() == [1_000, 1_000], "two launches by kernel_us"


def test_what_the_host_binds_is_in_the_costs() -> None:
    """6 us until the device begins, the dense launches after a head's answer, and 3 us to hand over."""
    ahead = Runtime("ahead", 10, 4, 5, False, 3.0, waits=True, ahead=True)
    slow = measured(send_us=5, launch_slowdown=0.2)
    found = costs_of(sizes(), one_token(), slow, runtime=ahead, asked_us=3)
    assert found.link_slowdown == 0.2
    assert found.host_exec_ns_N is not None
    assert found.host_pre_ns_N is not None
    assert found.launch_ns_N is not None
    assert found.host_exec_ns_N.tolist() == [6_000, 6_000], "slots sent, and the first launch"
    assert found.host_pre_ns_N.tolist() == [5_000 + 3_000 + 10_000, 0]
    assert found.launch_ns_N.tolist() == [35_000 + 3_000, 29_000 + 3_000]
    fused = costs_of(sizes(), one_token(), slow, runtime=RUNTIMES["fused"])
    assert fused.host_exec_ns_N is not None
    assert fused.host_exec_ns_N.tolist() == fused.exec_ns_N.tolist(), "launches bind it"


def test_nothing_is_slower_in_a_profile_that_does_not_say_so() -> None:
    assert costs_of(sizes(), one_token(), measured()).link_slowdown == 0


def test_gathered_experts_are_as_fast_as_they_were_measured() -> None:
    gathers = Runtime("gathers", 0, 0, 0, True, 0.0)
    slow = costs_of(sizes(), one_token(), machine(gathered_gb_per_s=50), runtime=gathers)
    assert slow.exec_ns_N.tolist() == pytest.approx([2 * 3 * 2000 / 50] * 2)
    assert (
        slow.pre_ns_N.tolist() == costs_of(sizes(), one_token(), machine(), runtime=gathers).pre_ns_N.tolist()
    )


@settings(max_examples=60, deadline=None)
@given(dense=TIMES, experts=TIMES, head=TIMES, launches=TIMES, operation=st.floats(0.01, 5))
def test_waiting_is_never_faster(
    dense: float, experts: float, head: float, launches: float, operation: float
) -> None:
    N = 4
    work = Work(np.full(N, dense), np.full(N, launches), np.full(N, experts), launches, np.full(2, head),
                operation, operation, 2)  # fmt: skip
    free, waits = answered_at_once(work), waited_for(work, 1.0, 2.0, ahead=True)
    for ends in (free, waits):
        assert (ends.bound_pre_N >= 0).all()
        assert (ends.bound_pre_N <= ends.pre_N + 1e-9).all()
        assert (ends.bound_exec_N <= ends.exec_N + 1e-9).all()
    assert (waits.pre_N + waits.exec_N).sum() >= (free.pre_N + free.exec_N).sum() - 1e-6


def test_graphs_are_one_launch_each_and_their_operations_take_the_device_a_little() -> None:
    """3 us to launch a graph, 2 to send slots, 7 for the answer; 9 operations of 0.1 us before a router."""
    known = {
        "send_us": 5,
        "graph_us": 3,
        "node_us": 0.1,
        "gap_us": 0.2,
        "write_us": 2,
        "answer_us": 7,
        "graph_slowdown": 0.5,
    }
    runtime = Runtime("slow", 10, 4, 5, False, 3.0, waits=True, ahead=True, graphs=True)
    one, whole = measured(**known), one_token()
    found, plain = (roofline(sizes(), whole, m, runtime=runtime) for m in (one, measured(send_us=5)))
    bare = roofline(sizes(), whole, machine(), runtime=RUNTIMES["fused"])
    assert found.launch_ns_N is not None
    # the answer, the next stretch's graph or the device's work, sending, the experts' graph
    device = 3_000 + bare.pre_ns_N[1] + 900 + 200
    assert found.launch_ns_N[1] == pytest.approx(7_000 + device + 2_000 + 3_000)
    assert found.exec_ns_N.tolist() == pytest.approx(
        (bare.exec_ns_N + 2 * 100 + 200 + 2_000 + 3_000).tolist()
    )
    assert plain.launch_ns_N is not None
    assert plain.launch_ns_N[1] == 10_000 + 10_000 + 5_000 + 4_000, "a profile that says nothing of graphs"
    assert costs_of(sizes(), whole, one, runtime=runtime).link_slowdown == 0.5
