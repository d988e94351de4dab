"""Eviction policies: whom each gives up, by hand; and Belady's, against the best of all ways of evicting."""

from __future__ import annotations

from itertools import combinations
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.errors import ConfigError
from tests.runtime.ledgers import LEDGERS, POLICIES, Make, counted, for_each, load, on_device, run


def cache(make: Make, policy: str, blocks: int = 6, slots: int = 2, **options: Any) -> Any:
    """A device of ``slots`` over a source in memory."""
    return make([0] * blocks, [10], [slots], [0], policy, resident_host=True, **options)


@for_each
def test_lru_gives_up_the_oldest_and_counts_arrivals(make: Make) -> None:
    ledger = cache(make, "lru")
    load(ledger, 0, 1, 0)
    load(ledger, 2)
    assert on_device(ledger, 6) == {0, 2}
    ledger.prefetch(1, 0.1, 9)
    run(ledger)  # 1 arrives at tick 4, 0 was used at tick 3, 2 at tick 4
    assert on_device(ledger, 6) == {1, 2}
    load(ledger, 3)  # equal: the least id goes
    assert on_device(ledger, 6) == {2, 3}


@for_each
def test_lru_counts_a_demand_at_its_call_and_again_at_arrival(make: Make) -> None:
    ledger = cache(make, "lru", slots=3)
    ledger.demand([1])
    job = ledger.next_job()
    ledger.release([1])
    load(ledger, 0)
    ledger.complete(job.id, "OK")  # 1 arrives during tick 2
    load(ledger, 2)
    load(ledger, 3)
    assert on_device(ledger, 6) == {1, 2, 3}, "0 and 1 are both of tick 2"


@for_each
def test_lfu_counts_uses_of_absent_blocks(make: Make) -> None:
    ledger = cache(make, "lfu")
    ledger.demand([0])
    ledger.demand([0])
    ledger.complete(ledger.next_job().id, "FAILED")
    ledger.release([0])
    ledger.release([0])
    load(ledger, 0, 1, 1)  # 0 was used 3 times, 1 twice
    load(ledger, 2)
    assert on_device(ledger, 6) == {0, 2}
    load(ledger, 1)  # 2 was used once, 1 three times
    assert on_device(ledger, 6) == {0, 1}
    load(ledger, 1, 0)  # four times each, 0 after 1
    load(ledger, 3)
    assert on_device(ledger, 6) == {0, 3}


@for_each
@pytest.mark.parametrize(("half_life", "left"), [(1.0, {1, 2}), (64.0, {0, 2})])
def test_lfru_forgets_with_the_half_life(make: Make, half_life: float, left: set[int]) -> None:
    ledger = cache(make, "lfru", half_life=half_life)
    # At tick 4 block 0 has 1/2 + 1/4 + 1/8 of a use at half-life 1, nearly 3 uses at 64; block 1 has one.
    load(ledger, 0, 0, 0, 1, 2)
    assert on_device(ledger, 6) == left


@for_each
def test_lfru_gives_up_first_what_was_never_used(make: Make) -> None:
    ledger = cache(make, "lfru", slots=3)
    load(ledger, 5)
    ledger.prefetch(4, 0.5, 9)
    run(ledger)
    ledger.demand([])
    ledger.prefetch(3, 0.5, 9)
    run(ledger)
    load(ledger, 0)
    assert on_device(ledger, 6) == {5, 3, 0}, "4 came before 3"
    load(ledger, 1)
    assert on_device(ledger, 6) == {5, 0, 1}


@for_each
@pytest.mark.parametrize("policy", ["lfu", "lfru", "static", "forecast"])
def test_of_equal_keys_the_oldest_arrival_goes(make: Make, policy: str) -> None:
    ledger = cache(make, policy)
    ledger.demand([0, 1])
    first, second = ledger.next_job(), ledger.next_job()
    ledger.complete(second.id, "OK")
    ledger.demand([])
    ledger.complete(first.id, "OK")
    ledger.release([0, 1])
    load(ledger, 2)
    assert on_device(ledger, 6) == {0, 2}


@for_each
def test_static_goes_by_the_weights_of_now(make: Make) -> None:
    ledger = cache(make, "static")
    load(ledger, 1, 0, 2)
    assert on_device(ledger, 6) == {0, 2}, "all 0: the oldest"
    ledger.set_weights([0.0, 1.0, 3.0, 2.0, 0.0, -1.0])
    load(ledger, 3)
    assert on_device(ledger, 6) == {2, 3}
    load(ledger, 5)
    load(ledger, 4)
    assert on_device(ledger, 6) == {2, 4}, "a demand is admitted whatever its weight"
    ledger.set_weights([0.0, 1.0, -3.0, 2.0, 0.0, -1.0])
    load(ledger, 0)
    assert on_device(ledger, 6) == {4, 0}
    load(ledger, 1)
    assert on_device(ledger, 6) == {0, 1}, "equal weights: 4 is the older"
    for weights in ([1.0], [float("nan")] * 6):
        with pytest.raises(ConfigError):
            ledger.set_weights(weights)


@for_each
def test_forecast_goes_by_the_last_hint_until_it_is_used(make: Make) -> None:
    ledger = cache(make, "forecast")
    load(ledger, 3, 0, 1)
    assert on_device(ledger, 6) == {0, 1}, "all 0: the oldest"
    assert ledger.prefetch(0, 0.3, 9) == "resident"
    load(ledger, 2)
    assert on_device(ledger, 6) == {0, 2}
    ledger.prefetch(2, 0.2, 9)
    load(ledger, 0)  # consumes 0.3
    load(ledger, 1)
    assert on_device(ledger, 6) == {1, 2}
    ledger.prefetch(1, 0.3, 9)
    ledger.prefetch(3, 0.2, 9)
    run(ledger)
    assert on_device(ledger, 6) == {1, 2}, "0.2 does not displace 0.2"
    ledger.prefetch(3, 0.25, 9)
    run(ledger)
    assert on_device(ledger, 6) == {1, 3}


@for_each
@pytest.mark.parametrize(("now", "left"), [(5, {1, 3}), (6, {2, 3})])
def test_a_forecast_lapses_after_its_deadline(make: Make, now: int, left: set[int]) -> None:
    ledger = cache(make, "forecast")
    load(ledger, 1, 2)
    ledger.prefetch(1, 0.9, 5)
    ledger.advance(now)
    load(ledger, 3)  # 2 is the younger
    assert on_device(ledger, 6) == left


@for_each
@pytest.mark.parametrize(("now", "read"), [(5, []), (6, [1])])
def test_a_forecast_lapses_in_host_memory_too(make: Make, now: int, read: list[int]) -> None:
    ledger = make([0] * 4, [10], [2], [1], "lru", "forecast")
    ledger.prefetch(0, 0.9, 5, "host")
    run(ledger)
    ledger.advance(now)
    ledger.prefetch(1, 0.1, 9, "host")
    assert [job.block for job in run(ledger)] == read


@for_each
def test_a_later_forecast_does_not_lapse_with_the_one_it_replaced(make: Make) -> None:
    ledger = cache(make, "forecast")
    load(ledger, 1, 2)
    ledger.prefetch(1, 0.9, 5)
    ledger.prefetch(1, 0.8, 7)
    ledger.advance(6)
    load(ledger, 3)
    assert on_device(ledger, 6) == {1, 3}


@for_each
@pytest.mark.parametrize(("now", "left"), [(2, {1}), (3, {0})])
def test_what_lapsed_admits_nothing(make: Make, now: int, left: set[int]) -> None:
    ledger = cache(make, "forecast", slots=1)
    load(ledger, 0)
    ledger.prefetch(1, 0.5, 9)
    assert ledger.prefetch(1, 0.4, 2, "host") == "resident", "the last forecast, though no request"
    ledger.advance(now)
    run(ledger)
    assert on_device(ledger, 6) == left
    assert (ledger.state(1)[6] is None) == (left == {1}), "the request stands until 9"


@for_each
@pytest.mark.parametrize("slabs", [0, 4])
def test_a_request_turned_down_at_once_is_no_forecast(make: Make, slabs: int) -> None:
    ledger = make([0] * 4, [10], [2], [slabs], "forecast")
    load(ledger, 0, 1)
    ledger.advance(5)
    assert ledger.prefetch(0, 0.9, 4) == "stale"
    if slabs == 0:
        assert ledger.prefetch(0, 0.9, 9, "host") == "refused"
    load(ledger, 2)
    assert on_device(ledger, 4) == {1, 2}, "0 is the oldest, and no forecast speaks for it"


@for_each
def test_a_request_that_a_full_queue_refuses_is_a_forecast_all_the_same(make: Make) -> None:
    ledger = make([0] * 4, [10], [2], [2], "lru", "forecast", max_pending=1)
    ledger.prefetch(0, 0.5, 1, "host")
    job = ledger.next_job()
    ledger.advance(2)  # nobody wants 0 any more, and its first forecast lapsed
    ledger.prefetch(1, 0.9, 9, "host")
    assert ledger.prefetch(0, 0.8, 9, "host") == "refused"
    ledger.complete(job.id, "OK")
    run(ledger)
    ledger.prefetch(2, 0.7, 9, "host")
    assert run(ledger) == [], "0.7 does not displace 0.8"
    ledger.advance(3)
    ledger.prefetch(2, 0.85, 9, "host")
    assert [job.block for job in run(ledger)] == [2]


@for_each
def test_belady_gives_up_the_farthest_next_use(make: Make) -> None:
    ledger = cache(make, "belady", slots=3)
    ledger.set_future([[4], [3], [1], [0], [1], [3], [4], [0]])
    load(ledger, 4, 3, 1, 0)  # next: 1 at 5, 3 at 6, 4 at 7
    assert on_device(ledger, 6) == {0, 1, 3}
    ledger.prefetch(4, 0.0, 9)
    run(ledger)  # 4 is next at 7, 0 at 8
    assert on_device(ledger, 6) == {1, 3, 4}
    ledger.prefetch(0, 1.0, 9)
    run(ledger)
    assert on_device(ledger, 6) == {1, 3, 4}
    load(ledger, 5)  # tick 5 goes another way than foretold, and 1 has no use after it
    assert on_device(ledger, 6) == {3, 4, 5}
    ledger.set_future([])
    load(ledger, 0)
    assert on_device(ledger, 6) == {0, 4, 5}, "nothing is known: the least id"
    ledger.prefetch(1, 1.0, 9)
    run(ledger)
    assert on_device(ledger, 6) == {0, 4, 5}, "never is not sooner than never"
    load(ledger, 1)
    load(ledger, 2)
    assert on_device(ledger, 6) == {2, 4, 5}, "the least id, though used last"


@for_each
def test_each_tier_has_its_own_policy(make: Make) -> None:
    ledger = make([0] * 6, [10], [2], [2], "lru", "static")
    ledger.set_weights([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    load(ledger, 0, 1, 2)
    assert on_device(ledger, 6) == {1, 2}
    assert [ledger.state(b)[3] for b in range(3)] == ["PRESENT", "ABSENT", "PRESENT"]


@for_each
def test_a_hit_on_the_device_is_a_use_for_host_memory_too(make: Make) -> None:
    ledger = make([0] * 6, [10], [2], [2])
    load(ledger, 0, 1, 0)
    load(ledger, 2)
    assert [ledger.state(b)[3] for b in range(3)] == ["PRESENT", "ABSENT", "PRESENT"]


@for_each
def test_a_prefetch_is_admitted_to_host_memory_by_its_policy(make: Make) -> None:
    ledger = make([0] * 6, [10], [2], [1], "lru", "forecast")
    ledger.prefetch(0, 0.5, 9, "host")
    run(ledger)
    ledger.prefetch(1, 0.5, 9, "host")
    assert run(ledger) == []
    ledger.prefetch(1, 0.6, 9, "host")
    assert [job.block for job in run(ledger)] == [1]
    ledger.prefetch(2, 0.1, 9)
    assert run(ledger) == [], "the device has room, the way there has none"


# ---- Belady's is the best ----------------------------------------------------------------


def fewest_misses(events: list[list[int]], slots: int) -> int:
    """The least loads over all ways of evicting, where all blocks of an event are resident at once."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for event in events:
        following: dict[frozenset[int], int] = {}
        for held, cost in costs.items():
            others = held - set(event)
            for kept in range(min(len(others), slots - len(event)) + 1):
                for some in combinations(sorted(others), kept):
                    after = frozenset(event) | frozenset(some)
                    loads = cost + len(set(event) - held)
                    following[after] = min(following.get(after, loads), loads)
        costs = following
    return min(costs.values())


def misses(make: Make, policy: str, events: list[list[int]], slots: int, tier: str, seed: int) -> int:
    """Loads of a cache that fetches each event whole, and only then; forecasts and weights are noise."""
    random, blocks = Random(seed), 1 + max((b for event in events for b in event), default=0)
    resident = tier == "memory"
    ledger = make([0] * blocks, [10], [slots], [blocks * (tier == "host")], policy, resident_host=resident)
    ledger.set_future(events)
    ledger.set_weights([random.random() for _ in range(blocks)])
    for event in events:
        for b in range(blocks):
            if ledger.ready([b]):
                ledger.prefetch(b, random.random(), 0)  # a hint only: the block is there
        ledger.demand(event)
        run(ledger)
        assert ledger.ready(event)
        ledger.release(event)
    hit, host_hit, miss, late = counted(ledger, "hit", "host_hit", "miss", "late")
    assert (hit + host_hit + miss, late) == (sum(map(len, events)), 0)
    return host_hit + miss


def event_lists(blocks: int, width: int, longest: int) -> st.SearchStrategy[list[list[int]]]:
    event = st.lists(st.integers(0, blocks - 1), max_size=width, unique=True)
    return st.lists(event, min_size=1, max_size=longest)


@settings(max_examples=150, deadline=None)
@given(event_lists(6, 3, 10), st.integers(3, 5), st.sampled_from(["memory", "host", "file"]), st.integers())
def test_belady_misses_least_of_all(events: list[list[int]], slots: int, tier: str, seed: int) -> None:
    least = fewest_misses(events, slots)
    for make in LEDGERS.values():
        assert misses(make, "belady", events, slots, tier, seed) == least
        for policy in POLICIES[:-1]:
            assert misses(make, policy, events, slots, tier, seed) >= least


@for_each
@pytest.mark.parametrize("seed", range(4))
def test_belady_misses_no_more_than_any_policy_on_long_runs(make: Make, seed: int) -> None:
    random = Random(seed)
    popular = [random.expovariate(1.0) for _ in range(24)]
    events = [sorted(set(random.choices(range(24), popular, k=4))) for _ in range(120)]
    found = {policy: misses(make, policy, events, 8, "memory", seed) for policy in POLICIES}
    assert min(found, key=found.__getitem__) == "belady"
    assert found["belady"] < found["lru"]
