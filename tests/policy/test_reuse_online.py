"""The model of reuse fitted as a model runs: which steps count, when it is fitted, and to what."""

from __future__ import annotations

import numpy as np
import pytest

from specgate.policy.reuse import Reuse, fit_reuse
from specgate.policy.reuse_online import FIRST, LAST, TRIED, ReuseCounter
from specgate.policy.workload import Workload
from tests.policy.support import small_workload


def feed(counter: ReuseCounter, workload: Workload, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for layer in range(workload.layers):
            n = step * workload.layers + layer
            here = slice(*workload.event_start_N1[n : n + 2])
            counter(layer, workload.expert_M[here].tolist())


@pytest.fixture(scope="module")
def workload() -> Workload:
    return small_workload(seed=3, tokens=(LAST + 200,))


def test_it_is_fitted_to_all_steps_so_far_and_ever_more_rarely(workload: Workload) -> None:
    told: list[tuple[int, Reuse]] = []
    counter = ReuseCounter(
        workload.layers, workload.experts, workload.top_k, 9, lambda r: told.append((counter.steps, r))
    )
    feed(counter, workload, workload.steps)
    assert [steps for steps, _ in told] == [FIRST, 4 * FIRST, 16 * FIRST]
    for steps, found in told:
        wanted = fit_reuse(workload.part(0, steps), 9, half_lives=TRIED)
        assert found == wanted
    assert counter.steps == LAST, "then it is over, and nothing is kept any more"


def test_prompts_and_broken_steps_do_not_count(workload: Workload) -> None:
    told: list[Reuse] = []
    counter = ReuseCounter(workload.layers, workload.experts, workload.top_k, 9, told.append)
    feed(counter, workload, 20)
    for layer in range(workload.layers):
        counter(layer, range(workload.experts))  # a prompt uses all
    counter(0, [0, 1])
    counter(2, [0, 1])  # layer 1 was left out, as where a call ends in an error
    counter(1, [0, 1])
    assert counter.steps == 20
    feed(counter, workload, FIRST - 21, first=20)
    assert told == []
    feed(counter, workload, 1, first=FIRST - 1)
    assert told == [fit_reuse(workload.part(0, FIRST), 9, half_lives=TRIED)]


def test_what_says_nothing_of_reuse_tells_nothing() -> None:
    told: list[Reuse] = []
    counter = ReuseCounter(1, 64, 1, 4, told.append)
    for step in range(FIRST):
        counter(0, [step % 64])  # no expert ever comes again
    assert all(np.isfinite([r.intercept, r.slope, r.half_life]).all() and r.slope >= 0 for r in told)
