"""A host that launches slower while the link copies: by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.rules import Rules
from specgate.runtime.simulator import Simulator, simulate
from tests.runtime.simulations import needs_native
from tests.runtime.test_simulator import ALL, broken, calls, costs_of, foresee

pytestmark = needs_native
HALF = {"link_slowdown": 0.5}


def copied_ahead(**changes: Any) -> float:
    """All of three events of 30 + 70 that have their expert; what none uses is on the link from 30 to 140."""
    w = calls([0], [0], [0])
    seen = foresee(w, (1, 2, 3, 0.9))
    result = simulate(seen, costs_of(w, **changes), ALL, 4, warm=[0])
    assert result.total("prefetches") == 1
    assert result.total("stall_ns") == 0
    assert result.total("total_ns") == result.total("compute_ns")
    return result.total("total_ns")


def test_the_device_s_own_work_is_as_fast_as_ever() -> None:
    assert copied_ahead() == copied_ahead(**HALF) == 300


def test_launches_that_bind_an_event_take_longer_beside_a_copy() -> None:
    whole, part = np.array([70.0, 70.0, 70.0]), np.array([40.0, 0.0, 0.0])
    # Event 0 runs from 30 to 100, all of it beside the copy, which is over before the next one runs
    assert copied_ahead(**HALF, host_exec_ns_N=whole) == 300 + 35
    assert copied_ahead(**HALF, host_exec_ns_N=part) == 300 + 20
    # Event 1 has 30 before its router, from 100 to 130
    assert copied_ahead(**HALF, host_pre_ns_N=np.full(3, 30.0)) == 300 + 15
    # 20 of each event are the store's: from 120 to 150 and 20 of the copy, which ends at 20 + 140
    assert copied_ahead(**HALF, event_ns=20.0) == 3 * 120 + 10


def test_launches_from_router_to_router_take_longer_by_what_the_link_copied_meanwhile() -> None:
    launches = {"launch_ns_N": np.array([30.0, 150.0, 150.0])}
    assert copied_ahead(**launches) == 30 + 150 + 150 + 70
    assert copied_ahead(**launches, **HALF) == 30 + (150 + 110 / 2) + 150 + 70
    # From 30 to 70 only: what lies behind them is no matter of theirs
    hidden = {"launch_ns_N": np.array([30.0, 40.0, 40.0])}
    assert copied_ahead(**hidden, link_slowdown=1.5) == 300, "30 + 40 + 60 is not beyond 130"
    assert copied_ahead(**hidden, link_slowdown=1.75) == 300 + 10


def test_the_copy_that_an_event_waits_for_slows_nothing_down() -> None:
    w = calls([0], [3], [0])
    seen = foresee(w, (1, 1, 3, 0.9))
    # 3 is on the link from 30 to 140, and waited for from 130 on; the host launches from 130 to 280
    changes = {"launch_ns_N": np.array([30.0, 10.0, 150.0]), "host_exec_ns_N": np.array([0.0, 70.0, 0.0])}
    result = simulate(seen, costs_of(w, **changes, **HALF), ALL, 4, warm=[0])
    assert (result.total("late"), result.total("stall_ns")) == (1, 10)
    assert result.total("total_ns") == 280 + 70


def test_a_demand_s_own_copies_slow_nothing_down() -> None:
    w = calls([0, 1], [1, 2], [0])
    launches = np.full(3, 150.0)
    slow, free = (
        simulate(w, costs_of(w, launch_ns_N=launches, event_ns=5.0, link_slowdown=s), Rules(), 2).totals()
        for s in (3.0, 0.0)
    )
    assert slow == free


def test_stepping_stops_at_the_same_points() -> None:
    """A forecast that becomes known in the time that copies add is judged in it."""
    w = calls([0], [0], [0])
    seen = foresee(w, (1, 2, 3, 0.9), (2, 1, 2, 0.9))
    # The first forecast is known at 70, what it fetches is on the link from then to 180: event 1's router,
    # which the host would have had at 130, chooses at 160. What is known before event 1 comes at 140
    costs = costs_of(w, forecast_ns=40.0, launch_ns_N=np.array([30.0, 100.0, 0.0]), **HALF)
    whole = simulate(seen, costs, ALL, 4, warm=[0])
    stepped = Simulator(seen, costs, Rules(), 4, warm=[0])
    times = []
    while stepped.advance() is not None:
        times.append(stepped.now_ns)
        stepped.act(0.0, 3)
    assert stepped.result().totals() == whole.totals()
    assert times[:4] == [40, 70, 140, 160 + 40]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_slowdown_that_makes_no_sense(value: float) -> None:
    w = calls([0], [1])
    with pytest.raises(ConfigError, match=r"link_slowdown=.* slows nothing down"):
        simulate(w, broken(costs_of(w), "link_slowdown", value), Rules(), 2)


@pytest.mark.parametrize("field", ["host_pre_ns_N", "host_exec_ns_N"])
def test_parts_of_the_host_that_make_no_sense(field: str) -> None:
    w = calls([0], [1])
    with pytest.raises(ConfigError, match=rf"{field}\[1\]=.* is no time"):
        simulate(w, broken(costs_of(w), field, np.array([1.0, -1.0])), Rules(), 2)
    with pytest.raises(ConfigError, match=f"{field} has 1 entries where 2 are needed"):
        simulate(w, broken(costs_of(w), field, np.array([1.0])), Rules(), 2)
