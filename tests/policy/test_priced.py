"""The default policy: its options, its fit, and what it does in the simulator."""

from __future__ import annotations

import numpy as np
import pytest

from specgate.errors import BudgetError, ConfigError, NotApplicableError
from specgate.policy.priced import Priced
from specgate.policy.reuse import fit_reuse
from specgate.policy.rules import Rules
from specgate.policy.workload import oracle_forecasts
from tests.policy.support import count, noisy_forecasts, simulated, small_workload, some_costs


def test_parts() -> None:
    train = small_workload(tokens=(30,))
    costs = some_costs(train)
    made = {part: Priced(part).fit(train, costs, 8) for part in ("both", "evict_only", "prefetch_only")}
    assert {p: (r.eviction, r.prefetch) for p, r in made.items()} == {
        "both": ("priced", "priced"),
        "evict_only": ("priced", "none"),
        "prefetch_only": ("lru", "priced"),
    }


def test_the_fit_is_that_of_the_model_of_reuse_and_can_be_set() -> None:
    train = small_workload(1, tokens=(40, 30))
    rules, reuse = Priced().fit(train, some_costs(train), 9), fit_reuse(train, 9)
    assert (rules.half_life, rules.intercept, rules.slope, rules.discount) == (
        reuse.half_life,
        reuse.intercept,
        reuse.slope,
        pytest.approx(0.3 ** (1 / 3)),
    )
    assert Priced(discount=None).fit(train, some_costs(train), 9).discount == reuse.discount
    fixed = Priced(half_life=5.0, discount=0.343).fit(train, some_costs(train), 9)
    assert (fixed.half_life, fixed.discount) == (5.0, pytest.approx(0.7))
    assert fixed.intercept == fit_reuse(train, 9, (5.0,)).intercept


def test_options_reach_the_rules() -> None:
    train = small_workload(tokens=(30,))
    rules = Priced(depth=4, adaptive=True, entropy_high=0.5, backlog_high=2.0, price_scale=0.1).fit(
        train, some_costs(train), 9
    )
    assert (rules.depth, rules.adaptive, rules.entropy_high, rules.backlog_high, rules.price_scale) == (
        4,
        True,
        0.5,
        2.0,
        0.1,
    )
    assert Priced(depth=8, foresight=6).horizons == 8
    assert rules.low_bytes == 0
    assert Priced(approximate=True, low_share=0.25).fit(train, some_costs(train), 9).low_bytes == 250
    assert Priced("evict_only", approximate=True).fit(train, some_costs(train), 9).low_bytes == 0
    assert not Priced(calibrated=False).calibrated


@pytest.mark.parametrize(
    "options",
    [
        {"part": "none"},
        {"depth": 0},
        {"foresight": 0},
        {"low_share": 1.0},
        {"discount": 2.0},
        {"half_life": 0.0},
    ],
)
def test_nonsense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Priced(**options)  # type: ignore[arg-type]


def test_it_needs_forecasts_and_room() -> None:
    train = small_workload()
    with pytest.raises(NotApplicableError, match="checkpoint"):
        Priced().foresee(train, train)
    with pytest.raises(BudgetError, match="1 slots hold fewer"):
        Priced().fit(train, some_costs(train), 1)


def test_perfect_forecasts_leave_hardly_a_stall_where_there_is_time() -> None:
    train = small_workload(2, tokens=(60,))
    costs = some_costs(train, pre_ns_N=np.full(train.events, 400.0))
    workload = train.with_forecasts(oracle_forecasts(train, 3))
    rules = Priced(depth=3).fit(train, costs, 10)
    lru = simulated(workload, Rules(), 10, costs)
    priced = simulated(workload, rules, 10, costs)
    assert count(lru, "stall_ns") > 0
    assert count(priced, "stall_ns") < 0.2 * count(lru, "stall_ns")


def test_forecasts_in_eviction_save_misses() -> None:
    train = small_workload(3, tokens=(80,))
    workload = train.with_forecasts(oracle_forecasts(train, 6))
    without = simulated(train, Priced("evict_only").fit(train, some_costs(train), 9), 9)
    seeing = simulated(workload, Priced("evict_only").fit(train, some_costs(train), 9), 9)
    assert count(seeing, "hits") > count(without, "hits")


def test_a_link_without_time_to_spare_is_left_to_demands() -> None:
    """Where a prefetch cannot arrive in time and demands fill the link, priced fetches next to nothing."""
    workload = small_workload(4, tokens=(60,))
    costs = some_costs(
        workload, pre_ns_N=np.full(workload.events, 1.0), exec_ns_N=np.full(workload.events, 1.0)
    )
    workload = workload.with_forecasts(noisy_forecasts(workload, 3))
    priced = simulated(workload, Priced("prefetch_only").fit(workload, costs, 6), 6, costs)
    eager = simulated(workload, Rules(prefetch="top", width=2, depth=3), 6, costs)
    assert count(eager, "prefetches") > 0
    assert count(priced, "prefetches") < 0.1 * count(eager, "prefetches")
