"""Prices against a link that is run by hand, and against enumerated futures."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from specgate.policy import pricing

times = st.floats(0, 1e6)


def stall_with_prefetch(load: float, copy: float, horizon: int, event: float, backlog: float) -> float:
    """The link works off its backlog, then copies; after ``horizon`` events the expert is wanted.

    No demand waits longer than it would without a prefetch: it would be loaded anew.
    """
    link_free = 0.0 + backlog
    there = link_free + copy
    wanted = 0.0
    for _ in range(horizon):
        wanted += event
    return min(max(there - wanted, 0.0), load)


@given(copy=st.floats(1, 1e6), read=times, horizon=st.integers(1, 12), event=times, backlog=times)
def test_saved_time_is_the_stall_that_is_not_there(
    copy: float, read: float, horizon: int, event: float, backlog: float
) -> None:
    load = pricing.load_time(copy, read, in_host=False)
    saved = pricing.saved_time(load, copy, horizon, event, backlog)
    slow = load - stall_with_prefetch(load, copy, horizon, event, backlog)
    assert saved == pytest.approx(slow, rel=1e-9, abs=1e-6)
    assert 0 <= saved <= load


@given(
    copy=st.floats(1, 1e5),
    horizon=st.integers(1, 6),
    event=times,
    backlog=times,
    victim=st.floats(0, 1),
    price=st.floats(0, 1),
    p=st.floats(0, 1),
)
def test_a_prefetch_gains_on_average_iff_p_is_above_break_even(
    copy: float, horizon: int, event: float, backlog: float, victim: float, price: float, p: float
) -> None:
    threshold = pricing.break_even(
        load_ns=copy,
        copy_ns=copy,
        horizon=horizon,
        mean_event_ns=event,
        backlog_ns=backlog,
        value_victim=victim,
        price=price,
    )
    assume(not math.isclose(p, threshold, rel_tol=1e-6, abs_tol=1e-9))
    gain = 0.0
    for used, of_used in ((True, p), (False, 1 - p)):  # is the newcomer used?
        for missed, of_missed in ((True, victim), (False, 1 - victim)):  # is the victim missed?
            without = copy if used else 0.0
            with_it = stall_with_prefetch(copy, copy, horizon, event, backlog) if used else 0.0
            with_it += copy if missed else 0.0
            gain += of_used * of_missed * (without - with_it - price * copy)
    if math.isinf(threshold):
        assert gain <= 1e-6
    else:
        assert (gain > 0) == (p > threshold) or abs(gain) < 1e-6 * copy


def test_deeper_horizons_and_freer_links_need_less_precision() -> None:
    common = {"load_ns": 100.0, "copy_ns": 100.0, "mean_event_ns": 30.0, "price": 0.3}
    by_depth = [pricing.break_even(horizon=h, **common) for h in (1, 2, 3, 4, 5)]
    assert by_depth == sorted(by_depth, reverse=True)
    assert by_depth[0] == pytest.approx(1.0)  # 30 of 100 ns are saved, and 30 are the price
    assert by_depth[3] == by_depth[4] == pytest.approx(0.3)
    by_backlog = [pricing.break_even(horizon=2, backlog_ns=b, **common) for b in (0, 20, 40, 60)]
    assert by_backlog == sorted(by_backlog)
    assert by_backlog[-1] == math.inf


def test_price_of_the_link() -> None:
    assert pricing.price_of_link(0.8, interruptible=False, price_scale=0.5) == 0.8
    assert pricing.price_of_link(0.8, interruptible=True, price_scale=0.5) == pytest.approx(0.4)
    assert pricing.load_time(3.0, 5.0, in_host=True) == 3.0
    assert pricing.load_time(3.0, 5.0, in_host=False) == 8.0


def test_reuse_probability() -> None:
    assert pricing.reuse_probability(1.0, 0.0, 1.0) == 1.0
    assert pricing.reuse_probability(0.25, 0.0, 1.0) == pytest.approx(0.25, rel=1e-4)
    assert pricing.reuse_probability(0.25, math.log(0.5), 0.5) == pytest.approx(0.25, rel=1e-4)
    assert pricing.reuse_probability(0.0, 5.0, 0.0) == 1.0


@given(
    now=st.integers(0, 30),
    layer=st.integers(0, 3),
    q=st.floats(0, 1),
    p=st.floats(0, 1),
    discount=st.floats(0.5, 1),
)
def test_value_is_the_discounted_expectation_of_the_next_two_chances(
    now: int, layer: int, q: float, p: float, discount: float
) -> None:
    L = 4
    coming = [n for n in range(now + 1, now + 3 * L) if n % L == layer][:2]
    assert pricing.value_of_block(now, layer, L, q, discount) == pytest.approx(
        q * discount ** (coming[0] - now)
    )
    hinted = pricing.value_of_block(now, layer, L, q, discount, hint=(p, coming[0]))
    used_first, used_second = discount ** (coming[0] - now), discount ** (coming[1] - now)
    assert hinted == pytest.approx(p * used_first + (1 - p) * q * used_second)
