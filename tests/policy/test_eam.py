"""Matching of expert activation matrices against a matcher that does it point by point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgate.errors import ConfigError
from specgate.policy import eam
from specgate.policy.workload import Workload
from tests.policy.support import count, simulated, small_workload, some_costs


def own_matrix(workload: Workload, first_step: int, last_event: int) -> np.ndarray:
    """Uses of the document so far, ``[L, E]``: events from its first step to ``last_event`` inclusive."""
    own = np.zeros((workload.layers, workload.experts))
    for n in range(first_step * workload.layers, last_event + 1):
        for e in workload.event(n):
            own[n % workload.layers, e] += 1
    return own


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_nearest_matrix_is_the_one_of_greatest_cosine(seed: int) -> None:
    library = eam.matrices_of(small_workload(seed + 1, tokens=(9, 5, 7, 6)))
    workload = small_workload(seed, tokens=(5, 4))
    nearest = eam.match(library, workload)
    L = workload.layers
    for point in range(workload.points):
        step, p = divmod(point, L + 1)
        first_step = int(np.searchsorted(workload.document_S, workload.document_S[step]))
        own = own_matrix(workload, first_step, step * L + p - 1)
        if not own.any():
            own = library.mean(0)
        scores = [cosine(own, matrix) for matrix in library]
        assert scores[nearest[point]] == pytest.approx(max(scores), abs=1e-12)


def test_matrices_are_shares_of_steps() -> None:
    train = small_workload(3, tokens=(9, 5))
    shares = eam.matrices_of(train)
    assert shares.shape == (2, 3, 6)
    for d in range(2):
        document = train.document(d)
        by_hand = np.zeros((3, 6))
        for n in range(document.events):
            by_hand[n % 3, document.event(n)] += 1 / document.steps
        assert shares[d] == pytest.approx(by_hand)
    assert shares.sum(-1) == pytest.approx(np.full((2, 3), 2.0))  # K


def test_forecasts_are_the_matched_matrix_less_the_further_ahead() -> None:
    train, workload = small_workload(1, tokens=(9, 5, 7)), small_workload(2, tokens=(4, 3))
    policy = eam.ExpertActivationMatrices(depth=2, foresight=4, least=0.1)
    forecasts = policy.foresee(train, workload)
    library = eam.matrices_of(train)
    nearest = eam.match(library, workload)
    L = workload.layers
    for point in range(workload.points):
        step, p = divmod(point, L + 1)
        expected = set()
        for h in range(1, 5):
            n = step * L + p + h - 1
            if n >= workload.events or workload.document_S[n // L] != workload.document_S[step]:
                continue
            for e in range(workload.experts):
                chance = library[nearest[point], n % L, e] * max(1 - (h - 1) / L, 0)
                if np.float32(chance) >= np.float32(0.1):
                    expected.add((h, e, round(chance, 5)))
        assert {(h, e, round(p, 5)) for h, e, p in forecasts.at(point)} == expected


def test_a_document_of_the_library_finds_itself() -> None:
    train = small_workload(4, tokens=(30, 30, 30))
    nearest = eam.match(eam.matrices_of(train), train)
    ends = [(d + 1) * 30 * 4 - 1 for d in range(3)]
    assert nearest[ends].tolist() == [0, 1, 2]


def test_thinning_keeps_one_of_each_kind() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.random((3, 2, 5))
    copies = np.concatenate([kinds + 1e-3 * rng.random((3, 2, 5)) for _ in range(10)])
    kept = eam.thin(copies, capacity=12, seed=1)
    assert len(kept) <= 12
    nearest = {int(np.argmax([cosine(k, kind) for kind in kinds])) for k in kept}
    assert nearest == {0, 1, 2}
    assert all((copies == k).all((1, 2)).any() for k in kept)  # documents, not means
    assert np.array_equal(eam.thin(copies, 12, 1), kept)
    assert np.array_equal(eam.thin(copies, 30, 1), copies)


@pytest.mark.parametrize("options", [{"capacity": 0}, {"width": 0}, {"least": 1.5}, {"depth": 0}])
def test_nonsense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        eam.ExpertActivationMatrices(**options)  # type: ignore[arg-type]


def test_it_runs_and_fetches_ahead() -> None:
    train, workload = small_workload(1, tokens=(30, 20)), small_workload(1, tokens=(25,))
    policy = eam.ExpertActivationMatrices(foresight=3)
    rules = policy.fit(train, some_costs(train), 8)
    seen = workload.with_forecasts(policy.foresee(train, workload))
    assert count(simulated(seen, rules, 8), "prefetches") > 0
