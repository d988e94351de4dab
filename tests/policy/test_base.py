"""What all policies share: budgets, determinism, foresight."""

from __future__ import annotations

import pytest

from specgate.errors import BudgetError, ConfigError, NotApplicableError
from specgate.policy.base import check_depth, check_eviction
from specgate.policy.registry import ORACLES, POLICIES, policy
from specgate.policy.workload import oracle_forecasts
from tests.policy.support import noisy_forecasts, small_workload, some_costs


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_fits_the_same_twice_and_leaves_its_input_alone(name: str) -> None:
    train = small_workload(1, tokens=(30, 20))
    train = train.with_forecasts(noisy_forecasts(train, 6))
    before = train.expert_M.copy(), train.forecasts
    rules = policy(name).fit(train, some_costs(train), 9)
    assert policy(name).fit(train, some_costs(train), 9).plain() == rules.plain()
    assert (train.expert_M == before[0]).all()
    assert train.forecasts is before[1]


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_below_one_event_is_refused(name: str) -> None:
    train = small_workload(tokens=(10, 8))
    train = train.with_forecasts(noisy_forecasts(train, 6))
    with pytest.raises(BudgetError, match="1 slots"):
        policy(name).fit(train, some_costs(train), 1)


@pytest.mark.parametrize("name", POLICIES)
def test_foresight_is_as_deep_as_its_source_says(name: str) -> None:
    train = small_workload(1, tokens=(30, 20))
    mine = policy(name)
    source = mine.forecast_source
    assert (source == "oracle") == (name in ORACLES and name != "belady")
    assert (mine.horizons == 0) == (source == "none")
    workload = small_workload(2, tokens=(8,))
    if source in ("predictor", "next_gate"):
        with pytest.raises(NotApplicableError, match=f"policy={name} works on forecasts"):
            mine.foresee(train, workload)
        seen = workload.with_forecasts(noisy_forecasts(workload, 4))
        told = mine.foresee(train, seen)
        assert told is not None
        assert seen.forecasts is not None
        for point in range(seen.points):
            near = [entry for entry in seen.forecasts.at(point) if entry[0] <= mine.horizons]
            assert list(told.at(point)) == near
        return
    found = mine.foresee(train, workload)
    if source == "none":
        assert found is None
        return
    assert found is not None
    assert int(found.horizon_M.max()) <= mine.horizons
    if source == "oracle" and name != "known_tokens":  # which has a test of its own
        exact = oracle_forecasts(workload, mine.horizons)
        assert (found.expert_M == exact.expert_M).all()


def test_checks() -> None:
    assert check_depth("x", 255) == 255
    for depth in (0, 256, True, 1.5):
        with pytest.raises(ConfigError, match="x: depth="):
            check_depth("x", depth)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eviction=newest"):
        check_eviction("newest")
