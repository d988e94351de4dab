"""The precision from which the native simulator fetches is the break-even that users are shown."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specgate.policy.pricing import break_even, price_of_link, reuse_probability, value_of_block
from specgate.policy.rules import Rules
from specgate.policy.workload import Forecasts, Workload, decoding
from tests.policy.support import count, simulated, some_costs

COPY = 100.0
RULES = {"eviction": "priced", "half_life": 4.0, "intercept": -0.5, "slope": 0.8, "discount": 0.9}


def foreseen(p: float, horizon: int) -> Workload:
    """Two layers, two tokens; before the second one, expert 2 is foreseen with probability p."""
    workload = decoding([np.array([[[0], [0]], [[1], [1]]])], experts=4)
    p_PHE = np.zeros((workload.points, 2, 4), dtype=np.float32)
    p_PHE[3, horizon - 1, 2] = p  # point 0 of step 1
    return workload.with_forecasts(Forecasts.from_dense(p_PHE))


def fetches(p: float, horizon: int, slots: int, event_ns: float, chunk: int, scale: float) -> bool:
    workload = foreseen(p, horizon)
    costs = some_costs(
        workload,
        pre_ns_N=np.full(4, event_ns - 20.0),
        exec_ns_N=np.full(4, 20.0),
        link_chunk_bytes=chunk,
    )
    rules = Rules(prefetch="priced", depth=2, price_scale=scale, **RULES)  # type: ignore[arg-type]
    return count(simulated(workload, rules, slots, costs), "prefetches") > 0


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("event_ns", [70.0, 110.0, 400.0])
@pytest.mark.parametrize(("chunk", "scale"), [(0, 1.0), (100, 0.5), (100, 0.3)])
def test_native_and_python_agree(horizon: int, slots: int, event_ns: float, chunk: int, scale: float) -> None:
    # Both events of the first token had a miss of 100 ns, so that means and utilisation are known exactly.
    use = COPY / (event_ns + COPY)
    f = 1 - 2 ** (-1 / 4.0)  # used once, in the step that is worked on
    q = reuse_probability(f, -0.5, 0.8)
    worth = [value_of_block(1, layer, 2, q, 0.9) for layer in (0, 1)]
    expected = break_even(
        load_ns=COPY,
        copy_ns=COPY,
        horizon=horizon,
        mean_event_ns=event_ns,
        value_victim=min(worth) if slots == 2 else 0.0,
        price=price_of_link(use, interruptible=chunk > 0, price_scale=scale),
    )
    low, high = 0.0, 1.0
    if not fetches(1.0, horizon, slots, event_ns, chunk, scale):
        assert expected >= 1 - 1e-6
        return
    for _ in range(22):
        middle = (low + high) / 2
        if fetches(middle, horizon, slots, event_ns, chunk, scale):
            high = middle
        else:
            low = middle
    assert not math.isinf(expected)
    assert high == pytest.approx(expected, abs=2e-6)
