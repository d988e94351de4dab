"""The simulator by hand: cases small enough to work out on paper, refusals, Ctrl-C, what one observes."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest

from specgate.errors import BudgetError, ConfigError
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Forecasts, Workload, decoding, oracle_forecasts
from specgate.runtime.simulator import OBSERVATION, Simulator, simulate
from tests.runtime.simulations import needs_native

pytestmark = needs_native


def calls(
    *events: list[int], layers: int = 1, experts: int = 4, documents: list[int] | None = None
) -> Workload:
    """One event after the other, of ``layers`` layers."""
    start_N1 = np.concatenate([[0], np.cumsum([len(e) for e in events])]).astype(np.int64)
    expert_M = np.array([x for e in events for x in e], dtype=np.int32)
    of_S = np.array(documents or [0] * (len(events) // layers), dtype=np.int32)
    return Workload(layers, experts, 2, start_N1, expert_M, np.ones_like(expert_M), of_S)


def costs_of(workload: Workload, **changes: Any) -> Costs:
    """A copy takes 10 + 100, a read 50 + 200; an event 30 before and 70 after its router has chosen."""
    N = workload.events
    costs = Costs(
        expert_bytes=100,
        link_bytes_per_ns=1.0,
        link_latency_ns=10.0,
        link_chunk_bytes=25,
        file_bytes_per_ns=0.5,
        file_latency_ns=50.0,
        event_ns=0.0,
        forecast_ns=0.0,
        pre_ns_N=np.full(N, 30.0),
        exec_ns_N=np.full(N, 70.0),
    )
    return replace(costs, **changes)


def foresee(workload: Workload, *found: tuple[int, int, int, float]) -> Workload:
    """With forecasts: (point, horizon, expert, p)."""
    dense = np.zeros((workload.points, max(h for _, h, _, _ in found), workload.experts))
    for point, h, expert, p in found:
        dense[point, h - 1, expert] = p
    return workload.with_forecasts(Forecasts.from_dense(dense))


ALL = Rules(prefetch="threshold", thresholds_L=np.array([0.0]), depth=3)


def test_demands_are_copied_one_after_the_other() -> None:
    w = calls([0, 1], [1, 2], [0])
    result = simulate(w, costs_of(w), Rules(), 2)
    # Two copies; 2 in the place of 0, which is older than 1 only by its number; 0 again
    assert result.total("stall_ns") == 220 + 110 + 110
    assert result.total("total_ns") == 3 * 100 + 440
    assert (result.total("hits"), result.total("host_hits"), result.total("evictions")) == (1, 4, 2)
    assert result.hit_rate == 0.2
    assert result.stall_share == pytest.approx(440 / 740)
    assert result.total("demand_bytes") == 400
    assert result.total("link_busy_ns") == 440


def test_reads_and_copies_are_a_pipeline() -> None:
    w = calls([0, 1, 2])
    result = simulate(w, costs_of(w), Rules(), 3, host_slots=1, warm_host=[2])
    # 2 is copied while 0 is read (250), then 0 (360), then 1, read at 500
    assert result.total("stall_ns") == 500 + 110
    assert (result.total("host_hits"), result.total("misses"), result.total("file_bytes")) == (1, 2, 200)


def test_a_forecast_in_time_is_a_hit_and_one_too_late_is_late() -> None:
    w = calls([0], [1], [2])
    seen = foresee(w, (1, 1, 1, 0.9), (1, 2, 2, 0.8))
    result = simulate(seen, costs_of(w, pre_ns_N=np.array([30.0, 30.0, 50.0])), ALL, 3)
    assert (result.total("host_hits"), result.total("late"), result.total("hits")) == (1, 1, 1)
    # Event 0 waits for its own copy until 140 and ends at 210. 1 is on the link from 140 to 250, asked for at
    # 240; 2 from 250 to 360, and asked for at 250 + 70 + 50
    assert result.total("late_ns") == 10
    assert result.total("stall_ns") == 110 + 10
    assert (result.total("prefetches"), result.total("wasted_bytes")) == (2, 0)


@pytest.mark.parametrize(("chunk", "wait"), [(25, 5.0), (50, 30.0), (0, 30.0)])
def test_a_prefetch_is_stopped_at_its_next_chunk(chunk: int, wait: float) -> None:
    w = calls([0], [1], [0])
    seen = foresee(w, (1, 2, 3, 0.9))
    # 3 is wrong, and on the link from 140 on. At 220 it has done 80 of 110; 70 of its bytes are there
    result = simulate(seen, costs_of(w, link_chunk_bytes=chunk, exec_ns_N=np.full(3, 50.0)), ALL, 4)
    assert result.times["stall_ns"][0] == 110 + 110 + wait
    assert result.total("prefetches") == 1


def test_what_is_given_up_and_what_is_dropped() -> None:
    w = calls([0], [1, 2], [3])
    seen = foresee(w, (1, 2, 3, 1.0))
    result = simulate(seen, costs_of(w), ALL, 2)
    # 3 takes the free slot, and event 1 needs both: the copy is given up, and begun anew when it is demanded
    assert (result.total("prefetches"), result.total("wasted_bytes"), result.total("host_hits")) == (
        1,
        100,
        4,
    )
    late = foresee(w, (1, 1, 3, 1.0))
    result = simulate(late, costs_of(w, forecast_ns=1000.0), ALL, 2)
    assert result.total("prefetches") == 0


def test_of_two_transfers_under_way_the_less_probable_one_is_given_up() -> None:
    w = calls([0], [0, 3], [1, 2])
    seen = foresee(w, (1, 2, 1, 0.9), (1, 2, 2, 0.5))
    # From 30 on 1 is copied and 2 is read; at 130 event 1 needs one of their slots. The read is not stopped
    result = simulate(seen, costs_of(w), ALL, 3, host_slots=3, warm=[0], warm_host=[0, 1, 3])
    assert (result.total("hits"), result.total("host_hits"), result.total("misses")) == (3, 2, 0)
    assert (result.total("prefetches"), result.total("wasted_bytes"), result.total("file_bytes")) == (
        2,
        100,
        100,
    )


def test_the_gate_lets_nobody_in_who_is_only_as_hot_as_the_coldest() -> None:
    w = calls([0], [0], [1], [], layers=2)
    stays = {}
    for admission in ("gate", "always"):
        simulator = Simulator(w, costs_of(w), Rules(admission=admission), 2)
        simulator.run()
        stays[admission] = simulator.resident()
    # Block 4 (layer 1) was used in the same step as block 0, and goes before it, though it was used later
    assert stays == {"gate": [0, 1], "always": [1, 4]}


def test_nothing_is_foreseen_beyond_a_document() -> None:
    w = calls([0], [1], documents=[0, 1])
    seen = foresee(w, (1, 1, 1, 1.0))
    assert simulate(seen, costs_of(w), ALL, 2).total("prefetches") == 0
    within = replace(seen, document_S=np.zeros(2, dtype=np.int32))
    assert simulate(within, costs_of(w), ALL, 2).total("prefetches") == 1


def test_what_was_foreseen_is_not_evicted_for_what_is_less_likely() -> None:
    w = calls([0], [1], [2])
    seen = foresee(w, (1, 2, 0, 0.9), (1, 2, 3, 0.8))
    result = simulate(seen, costs_of(w), ALL, 1, warm=[0])
    assert result.total("refused") == 1
    likelier = foresee(w, (1, 2, 0, 0.7), (1, 2, 3, 0.8))
    assert simulate(likelier, costs_of(w), ALL, 2, warm=[0, 1]).total("prefetches") == 1


def test_an_approximate_copy_comes_first_and_the_exact_one_if_time_remains() -> None:
    w = calls([0], [3], [1], [2], [1])
    seen = foresee(w, (3, 1, 1, 0.5))
    rules = Rules(prefetch="priced")
    # The first event took 210, 110 of them on the link: a copy of all bytes saves 100 of its 110 and costs
    # 110 * 110 / 210, that is 0.576 of it; one of 20 bytes takes 30, saves all and costs 0.143
    whole = simulate(seen, costs_of(w), rules, 4)
    assert (whole.total("prefetches"), whole.total("stall_ns")) == (0, 440)
    result = simulate(seen, costs_of(w), replace(rules, low_bytes=20), 4)
    assert (result.total("prefetches"), result.total("low_hits"), result.total("late")) == (1, 1, 0)
    assert result.total("stall_ns") == 330
    # The exact copy takes the next 110, and is there when 1 is asked for again
    assert (result.total("prefetch_bytes"), result.total("hits")) == (120, 1)
    with pytest.raises(ConfigError, match="low_bytes=100 is not less than expert_bytes=100"):
        simulate(seen, costs_of(w), replace(rules, low_bytes=100), 4)


def test_tokens_are_counted_by_document() -> None:
    ids = np.array([[[0, 1], [1, 2]]] * 3)
    w = decoding([ids, ids[:2]], 4)
    result = simulate(w, costs_of(w), Rules(), 8)
    assert result.tokens_D.tolist() == [3, 2]
    assert result.tokens_per_second == pytest.approx(5 / result.total("total_ns") * 1e9)
    assert result.tokens_per_second_D[0] == pytest.approx(3 / result.times["total_ns"][0] * 1e9)
    with pytest.raises(ConfigError, match="nonsense is not counted"):
        result.total("nonsense")


def test_what_one_observes() -> None:
    w = foresee(calls([0], [1]), (0, 1, 0, 0.75), (0, 1, 1, 0.25), (0, 2, 2, 0.5))
    simulator = Simulator(w, costs_of(w), ALL, 4, warm=[3])
    seen = simulator.advance()
    assert seen is not None
    named = dict(zip(OBSERVATION, seen.tolist(), strict=True))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    expected = {"open_slots": 1.0, "mean_p_1": 0.5, "max_p_1": 0.75, "entropy_1": entropy, "mean_p_2": 0.5}
    expected |= {"max_p_2": 0.5}
    assert named == pytest.approx(dict.fromkeys(OBSERVATION, 0.0) | expected)
    simulator.act(0.5, 2)  # two experts; no time passes until the next point, at the router's choice
    seen = simulator.advance()
    assert seen is not None
    named = dict(zip(OBSERVATION, seen.tolist(), strict=True))
    assert (named["layer"], named["open_slots"]) == (1.0, 0.75)  # 0 is in use; 3 may go; 2 has none yet
    simulator.act(2.0, 1)
    assert simulator.advance() is not None  # before the second step
    assert simulator.event == 1
    with pytest.raises(ConfigError, match="threshold=nan is no probability"):
        simulator.act(float("nan"), 1)


# ---- Refusals


def test_an_event_larger_than_its_slots() -> None:
    w = calls([0], [1], [0, 2], [0, 1, 3], layers=2)
    with pytest.raises(BudgetError, match=r"Event 2 \(step 1, layer 0\) needs 2 experts at once .* 1 slots"):
        simulate(w, costs_of(w), Rules(), 1)
    with pytest.raises(BudgetError, match=r"Event 3 \(step 1, layer 1\) needs 3 experts .* at least 3"):
        simulate(w, costs_of(w), Rules(), [4, 2])
    assert simulate(w, costs_of(w), Rules(), [2, 3]).total("host_hits") > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_slots": [4, 4]}, "2 numbers of slots do not fit 1 layers"),
        ({"device_slots": 2.5}, "device_slots=2.5 is no whole number"),
        ({"device_slots": -1}, "-1 slots make no sense"),
        ({"host_slots": -1}, "host_slots=-1 makes no sense"),
        ({"warm": [1, 1]}, "warm names block 1 twice"),
        ({"warm": [4]}, "warm names block 4"),
        ({"warm_host": [-1]}, "warm_host names block -1"),
        ({"rules": Rules(eviction="static", weights_LE=np.zeros((1, 3)))}, "3 weights do not fit"),
        ({"rules": replace(ALL, thresholds_L=np.zeros(2))}, "2 thresholds do not fit 1 layers"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    w = calls([0, 1], [2])
    arguments: dict[str, Any] = {"rules": Rules(), "device_slots": 4} | changes
    with pytest.raises(ConfigError, match=message):
        simulate(w, costs_of(w), **arguments)


def test_warm_blocks_that_do_not_fit() -> None:
    w = calls([0, 1], [2])
    with pytest.raises(BudgetError, match="3 warm blocks do not fit the slots"):
        simulate(w, costs_of(w), Rules(), 2, warm=[0, 1, 2])
    with pytest.raises(BudgetError, match="2 warm blocks do not fit 1 places in host memory"):
        simulate(w, costs_of(w), Rules(), 2, host_slots=1, warm_host=[0, 1])


def broken(thing: Any, field: str, value: Any) -> Any:
    """Something whose own checks are passed over: those of the core must find it."""
    copy = replace(thing)
    object.__setattr__(copy, field, value)
    return copy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("expert_M", np.array([1, 0, 2], dtype=np.int32), "event 0 names expert 0 out of order"),
        ("expert_M", np.array([1, 1, 2], dtype=np.int32), "event 0 names expert 1 out of order"),
        ("expert_M", np.array([0, 4, 2], dtype=np.int32), "event 0 asks for expert 4, and a layer has 4"),
        ("expert_M", np.array([-1, 1, 2], dtype=np.int32), "event 0 asks for expert -1"),
        ("expert_M", np.array([0, 1], dtype=np.int32), "expert_M has 2 entries where 3 are needed"),
        ("expert_M", np.array([0, 1, 2]), "expert_M is no contiguous array of the right type"),
        ("event_start_N1", np.array([0, 4, 3]), "event 1 ends before it begins"),
        ("event_start_N1", np.array([0, 3]), "event_start_N1 has 2 entries where 3 are needed"),
        ("document_S", np.array([0, 2], dtype=np.int32), "step 1 belongs to document 2"),
        ("document_S", np.array([1, 1], dtype=np.int32), "step 0 belongs to document 1"),
        ("experts", 0, "1 layers of 0 experts"),
    ],
)
def test_workloads_that_make_no_sense(field: str, value: Any, message: str) -> None:
    w = calls([0, 1], [2])
    with pytest.raises(ConfigError, match=message):
        simulate(broken(w, field, value), costs_of(w), Rules(), 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("p_M", np.array([0.5, np.nan], dtype=np.float32), "say p=nan: probabilities are 0 to 1"),
        ("p_M", np.array([0.5, 0.7], dtype=np.float32), "not sorted by horizon"),
        ("horizon_M", np.array([2, 1], dtype=np.uint8), "not sorted by horizon"),
        ("horizon_M", np.array([0, 1], dtype=np.uint8), "not sorted by horizon"),
        ("expert_M", np.array([0, 9], dtype=np.int32), "name expert 9, and a layer has 4"),
        ("start_P1", np.array([0, 2]), "forecasts.start_P1 has 2 entries where 5 are needed"),
    ],
)
def test_forecasts_that_make_no_sense(field: str, value: Any, message: str) -> None:
    w = calls([0, 1], [2])
    seen = foresee(w, (0, 1, 0, 0.9), (0, 1, 1, 0.5))
    assert simulate(seen, costs_of(w), ALL, 4).total("prefetches") == 1
    with pytest.raises(ConfigError, match=message):
        simulate(broken(seen, "forecasts", broken(seen.forecasts, field, value)), costs_of(w), ALL, 4)


def test_launches_hide_behind_waiting() -> None:
    """200 of the host from router to router: 110 of copying and 100 of the device hide that, 100 do not."""
    w = calls([0], [0], [1])
    costs = costs_of(w, launch_ns_N=np.array([60.0, 200.0, 200.0]))
    result = simulate(w, costs, Rules(), 2)
    second = 60 + (110 + 70 + 30)
    third = second + 200
    assert result.total("total_ns") == third + 110 + 70
    assert result.total("stall_ns") == 2 * 110
    assert result.total("compute_ns") == 3 * 100 + 30 + 100, "the host is late for the first and the third"
    warm = simulate(w, costs, Rules(), 2, warm=[0, 1])
    assert warm.total("total_ns") == warm.total("compute_ns") == costs.compute_ns == 60 + 200 + 200 + 70


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["link_latency_ns", "file_latency_ns", "event_ns", "forecast_ns"])
def test_times_that_make_no_sense(field: str, value: float) -> None:
    w = calls([0, 1], [2])
    with pytest.raises(ConfigError, match=f"{field}=.* is no time"):
        simulate(w, broken(costs_of(w), field, value), Rules(), 4)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_times_of_events_that_make_no_sense(value: float) -> None:
    w = calls([0, 1], [2])
    for field in ("pre_ns_N", "exec_ns_N", "launch_ns_N"):
        with pytest.raises(ConfigError, match=rf"{field}\[1\]=.* is no time"):
            simulate(w, broken(costs_of(w), field, np.array([1.0, value])), Rules(), 4)
        with pytest.raises(ConfigError, match=f"{field} has 1 entries where 2 are needed"):
            simulate(w, broken(costs_of(w), field, np.array([1.0])), Rules(), 4)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["link_bytes_per_ns", "file_bytes_per_ns"])
def test_rates_that_make_no_sense(field: str, value: float) -> None:
    w = calls([0, 1], [2])
    with pytest.raises(ConfigError, match=f"{field}=.* moves nothing"):
        simulate(w, broken(costs_of(w), field, value), Rules(), 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eviction", "fifo", "eviction=fifo is unknown: choose one of none, lru"),
        ("prefetch", "all", "prefetch=all is unknown"),
        ("admission", "never", "admission=never is unknown"),
        ("half_life", 0.0, "half_life=0.* must be a positive number"),
        ("depth", 0, "depth=0 is no horizon"),
        ("discount", float("nan"), "discount=nan makes no sense"),
        ("slope", -1.0, "must be finite and the slope not negative"),
        ("mass", float("nan"), "mass is no number"),
    ],
)
def test_rules_that_make_no_sense(field: str, value: Any, message: str) -> None:
    w = calls([0, 1], [2])
    with pytest.raises(ConfigError, match=message):
        simulate(w, costs_of(w), broken(Rules(), field, value), 4)


# ---- Long runs


def long_simulator() -> Simulator:
    """About a second or more of work."""
    ids = np.random.default_rng(0).integers(0, 8, (4000, 4, 1))
    experts = np.tile(decoding([ids], 8).expert_M, 125)
    ones, of_S = np.ones(len(experts), dtype=np.int32), np.zeros(500_000, dtype=np.int32)
    w = Workload(4, 8, 1, np.arange(2_000_001), experts, ones, of_S)
    w = w.with_forecasts(oracle_forecasts(w, 1))
    rules = Rules(eviction="priced", prefetch="priced")
    return Simulator(w, costs_of(w), rules, 8)


def test_ctrl_c_stops_a_long_run() -> None:
    simulator = long_simulator()

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            simulator.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < simulator.event < 2_000_000


def test_other_threads_run_meanwhile() -> None:
    simulator = long_simulator()
    worker = threading.Thread(target=simulator.run)
    worker.start()
    counted = 0
    while worker.is_alive():
        counted += 1
        worker.join(0.001)
    assert counted > 10  # with the lock held it would be one or two
    assert simulator.event == 2_000_000
