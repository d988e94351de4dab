"""Documents dealt into batches: every deal is fair, and intervals know which batches share documents."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.report.simulate_groups import groups_of, weights_of
from specgate.report.simulate_rows import bounds, resampled


@pytest.mark.parametrize(("documents", "size", "deals"), [(25, 8, 4), (7, 2, 5), (9, 3, 2), (10, 9, 6)])
def test_each_deal_is_fair(documents: int, size: int, deals: int) -> None:
    groups = groups_of(documents, size, deals, 3)
    per_deal = documents // size
    assert len(groups) == deals * per_deal
    assert all(len(set(g)) == size and g == sorted(g) for g in groups)
    dealt = [groups[i : i + per_deal] for i in range(0, len(groups), per_deal)]
    for deal in dealt:
        assert len({d for g in deal for d in g}) == per_deal * size  # nobody twice
    for one, other in pairwise(dealt):  # who was left out is in the next
        assert set(range(documents)) - {d for g in one for d in g} <= {d for g in other for d in g}
    assert groups == groups_of(documents, size, deals, 3)
    if size > 1 and per_deal > 1:
        assert dealt[0] != dealt[1]


def test_one_document_each_or_all_at_once_need_one_deal() -> None:
    assert groups_of(4, 1, 9, 0) == [[0], [1], [2], [3]]
    assert groups_of(4, 4, 9, 0) == [[0, 1, 2, 3]]
    with pytest.raises(ConfigError, match="3 documents make no batch of 4"):
        groups_of(3, 4, 1, 0)


def test_weights_of_single_documents_are_their_counts() -> None:
    groups = groups_of(6, 1, 1, 0)
    assert (weights_of(groups, 6, 200, 5) == resampled(6, 200, 5)).all()


def test_where_members_add_up_groups_say_what_documents_say() -> None:
    """Over all groups there are, a sum of the members' times has the very mean of the resampled documents."""
    D, B = 7, 3
    groups = [list(g) for g in combinations(range(D), B)]
    time_D = np.random.default_rng(1).gamma(4.0, size=D)
    time_G = np.array([sum(time_D[d] for d in g) for g in groups])
    weights_RG = weights_of(groups, D, 300, 2)
    of_groups_R = weights_RG @ time_G / weights_RG.sum(1)
    of_documents_R = resampled(D, 300, 2) @ time_D / D
    assert of_groups_R == pytest.approx(B * of_documents_R)


@pytest.mark.parametrize("chance", [0.0, 3.0])
def test_intervals_are_as_wide_as_other_documents_would_make_them(chance: float) -> None:
    """Against the truth: the mean time of a batch over many samples of documents from one population.

    A batch takes the time of its members (deviation 5.7), and a chance part of its own: who met whom.
    """
    random, D, B, deals = np.random.default_rng(0), 25, 8, 4
    means, widths, naive = [], [], []
    for sample in range(400):
        time_D = random.gamma(4.0, size=D)
        groups = groups_of(D, B, deals, sample)
        time_G = np.array([time_D[g].sum() for g in groups]) + random.normal(0, chance, len(groups))
        means.append(time_G.mean())
        weights_RG = weights_of(groups, D, 200, sample)
        widths.append(np.square((weights_RG @ time_G / weights_RG.sum(1)).std()))
        naive.append(np.square((resampled(len(groups), 200, sample) @ time_G / len(groups)).std()))
    true, found, shared_nobody = np.std(means), np.sqrt(np.mean(widths)), np.sqrt(np.mean(naive))
    assert 0.9 * true < found < (1.15 if chance == 0 else 1.4) * true
    assert shared_nobody < 0.75 * true


@pytest.mark.parametrize("size", [3, 4])
def test_documents_of_one_batch_have_no_interval(size: int) -> None:
    weights = weights_of(groups_of(4, size, 3, 0), 4, 100, 0)
    assert np.isnan(weights).all()
    assert np.isfinite(weights_of(groups_of(4, 2, 3, 0), 4, 100, 0)).all()
    assert bounds(weights[:, 0]) == (None, None)
