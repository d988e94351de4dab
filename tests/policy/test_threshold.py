"""Fitted thresholds against trying every one, and against a loop over the forecasts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgate.errors import ConfigError, NotApplicableError
from specgate.policy.threshold import Threshold, best_threshold, fit_thresholds
from specgate.policy.workload import oracle_forecasts
from tests.policy.support import count, noisy_forecasts, simulated, small_workload, some_costs


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.integers(-9, 9)), min_size=1, max_size=20
    )
)
def test_no_other_threshold_gains_more(entries: list[tuple[float, int]]) -> None:
    p, gain = (np.array(column, dtype=float) for column in zip(*entries, strict=True))

    def total(threshold: float) -> float:
        return float(gain[p >= threshold].sum())

    found = best_threshold(p, gain)
    most = max(total(t) for t in [*p, 1.0])
    assert total(found) == max(most, 0.0)


def test_thresholds_are_those_of_a_loop_over_the_forecasts() -> None:
    train = small_workload(3, tokens=(40, 30))
    train = train.with_forecasts(noisy_forecasts(train, depth=2))
    costs = some_costs(train)
    L, slots = train.layers, 9
    size = slots // L
    found = fit_thresholds(train, costs, slots, depth=2)

    before: list[list[list[int]]] = []  # per layer and step, most recent first
    for layer in range(L):
        recent: list[int] = []
        rows = []
        for step in range(train.steps):
            rows.append(list(recent))
            now = train.event(step * L + layer)
            recent = sorted(now, reverse=True) + [e for e in recent if e not in now]
        before.append(rows)
    misses = sum(
        len([e for e in train.event(n) if e not in before[n % L][n // L][:size]]) for n in range(train.events)
    )
    price = misses * 100 / (misses * 100 + 60 * train.events)
    assert train.forecasts is not None
    for layer in range(L):
        victim = sum(
            before[layer][s][size - 1] in train.event(s * L + layer)
            for s in range(train.steps)
            if len(before[layer][s]) >= size
        )
        candidates = []
        for point in range(train.points):
            step, p = divmod(point, L + 1)
            for h, e, chance in train.forecasts.at(point):
                n = step * L + p + h - 1
                if n % L != layer or e in before[layer][n // L][:size]:
                    continue
                saved = 100 - max(0, 100 - 60 * h)
                gain = saved * (e in train.event(n)) - (victim / train.steps * 100 + price * 100)
                candidates.append((chance, gain))
        totals = {t: sum(g for c, g in candidates if c >= t) for t, _ in candidates}
        best = max(totals.values())
        assert best > 0
        assert totals[found[layer]] == pytest.approx(best, abs=1e-3)


def test_the_oracle_s_forecasts_are_taken_and_useless_ones_are_not() -> None:
    train = small_workload(5, tokens=(40,))
    sure = train.with_forecasts(oracle_forecasts(train, 3))
    assert fit_thresholds(sure, some_costs(train), 9, 3).tolist() == [1.0, 1.0, 1.0]
    late = some_costs(train, pre_ns_N=np.zeros(train.events), exec_ns_N=np.zeros(train.events))
    assert fit_thresholds(sure, late, 9, 3).tolist() == [1.0, 1.0, 1.0]


def test_without_forecasts_there_is_nothing_to_fit() -> None:
    train = small_workload()
    with pytest.raises(NotApplicableError, match="policy=threshold works on forecasts"):
        Threshold().fit(train, some_costs(train), 9)


def test_options_reach_the_rules() -> None:
    train = small_workload()
    rules = Threshold(threshold=0.4, depth=2, load_rise=0.5, eviction="lfru").fit(train, some_costs(train), 9)
    assert (rules.prefetch, rules.eviction, rules.depth, rules.load_rise) == ("threshold", "lfru", 2, 0.5)
    assert rules.thresholds_L is not None
    assert rules.thresholds_L.tolist() == [0.4] * 3


@pytest.mark.parametrize(
    "options", [{"threshold": 1.5}, {"load_rise": -1.0}, {"depth": 0}, {"eviction": "coldest"}]
)
def test_nonsense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Threshold(**options)  # type: ignore[arg-type]


def test_a_loaded_link_prefetches_less() -> None:
    workload = small_workload(6, tokens=(60,))
    workload = workload.with_forecasts(noisy_forecasts(workload, 3))
    prefetched = []
    for rise in (0.0, 2.0, 10.0):
        policy = Threshold(threshold=0.3, load_rise=rise, full_rise=0.0, host_rise=0.0)
        rules = policy.fit(workload, some_costs(workload), 6)
        prefetched.append(count(simulated(workload, rules, 6), "prefetches"))
    assert prefetched[0] > prefetched[1] > prefetched[2]
