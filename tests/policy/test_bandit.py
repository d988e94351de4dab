"""The bandit against tables whose best choices are known, and its features counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.bandit import FEATURES, Bandit, features_of
from specgate.policy.workload import Forecasts, decoding
from tests.policy.support import noisy_forecasts, small_workload

TWO = ({"name": "lru"}, {"name": "priced", "depth": 1})


def split_table(D: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of two kinds, told apart by one feature; each kind has another best arm."""
    rng = np.random.default_rng(seed)
    features = rng.random((D, len(FEATURES))) * 0.1
    features[:, 0] = 1.0
    kind = rng.integers(0, 2, D)
    features[:, 2] = kind
    rewards = np.where(kind[:, None] == np.arange(2), 1.2, 0.8) + rng.normal(0, 0.05, (D, 2))
    return features, rewards


@pytest.mark.parametrize("explorer", ["linucb", "thompson"])
def test_it_learns_which_kind_of_document_wants_which_arm(explorer: str) -> None:
    bandit = Bandit(TWO, explorer=explorer, explore=0.3)
    learning = bandit.run(*split_table(300, seed=0))
    assert learning.against_fixed < 0  # better than any fixed arm, while it learns
    judged = bandit.run(*split_table(200, seed=1), learning=False)
    assert judged.against_each < 0.05 * (judged.best_each - judged.best_fixed[1])


def test_regret_is_counted_from_the_table() -> None:
    rewards = np.array([[1.0, 3.0], [2.0, 1.0], [5.0, 4.0]])
    features = np.zeros((3, len(FEATURES)))
    features[:, 0] = 1
    found = Bandit(TWO, explore=0.0).run(features, rewards, learning=False)
    assert found.choices_D.tolist() == [0, 0, 0]  # knows nothing: the first
    assert (found.reward, found.best_fixed, found.best_each, found.random) == (8.0, (0, 8.0), 10.0, 8.0)
    assert (found.against_fixed, found.against_each) == (0.0, 2.0)


def test_only_the_chosen_arm_s_reward_is_looked_at() -> None:
    features, rewards = split_table(40, seed=2)
    first = Bandit(TWO).run(features, rewards)
    hidden = np.full_like(rewards, np.nan)
    at = np.arange(40), first.choices_D
    hidden[at] = rewards[at]
    assert Bandit(TWO).run(features, np.where(np.isnan(hidden), -99.0, hidden)).choices_D.tolist() == list(
        first.choices_D
    )


def test_expected_rewards_are_ridge_regressions() -> None:
    features, rewards = split_table(50, seed=3)
    bandit = Bandit(TWO, ridge=2.0, prior=0.7)
    for x, r in zip(features, rewards[:, 1], strict=True):
        bandit.learn(x, 1, float(r))
    F = len(FEATURES)
    stacked = np.concatenate([features, np.sqrt(2.0) * np.eye(F)])
    before = np.sqrt(2.0) * 0.7 * np.eye(F)[0]
    by_hand, *_ = np.linalg.lstsq(stacked, np.concatenate([rewards[:, 1], before]), rcond=None)
    assert bandit.expected_A(features[0]) == pytest.approx([0.7, float(by_hand @ features[0])])


def test_seeds_states_and_forgetting() -> None:
    tables = split_table(60, seed=4)
    one, two = (Bandit(TWO, explorer="thompson", seed=5) for _ in range(2))
    assert one.run(*tables).choices_D.tolist() == two.run(*tables).choices_D.tolist()
    loaded = Bandit(TWO)
    loaded.load_state(json.loads(json.dumps(one.state())))
    judged = [b.run(*tables, learning=False).choices_D.tolist() for b in (one, loaded)]
    assert judged[0] == judged[1]
    one.reset()
    assert one.expected_A(tables[0][0]) == pytest.approx([1.5, 1.5])
    with pytest.raises(ConfigError, match="2 arms is none of 6"):
        Bandit().load_state(loaded.state())


def test_features_by_hand() -> None:
    tokens = np.array([[[0, 1]], [[0, 2]], [[3, 2]]])  # T=3, L=1, K=2
    workload = decoding([tokens], experts=4)
    p_PHE = np.zeros((6, 2, 4))
    p_PHE[0, 0] = [0.5, 0.5, 0, 0]
    p_PHE[0, 1] = [0.9, 0.9, 0.9, 0.9]  # another horizon does not count
    seen = workload.with_forecasts(Forecasts.from_dense(p_PHE))
    values = dict(zip(FEATURES, features_of(seen, 2), strict=True))
    assert values["one"] == 1
    assert values["spread"] == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(4)) / np.log(4))  # uses 2, 1, 1
    assert values["repeats"] == 0.5  # expert 0 of 0 and 2
    assert values["distinct"] == 0.75
    assert values["width"] == 0.5
    assert values["most"] == 0.5
    assert values["entropy"] == pytest.approx(0.5)
    assert values["mass"] == 0.5
    assert features_of(workload, 3)[5:].tolist() == [0, 0, 0]


def test_features_know_the_first_tokens_alone() -> None:
    long = small_workload(1, tokens=(30,))
    long = long.with_forecasts(noisy_forecasts(long, 2))
    assert features_of(long, 4) == pytest.approx(features_of(long.part(0, 4), 4))
    assert ((features_of(long, 4) >= 0) & (features_of(long, 4) <= 1)).all()


def test_labels_and_nonsense() -> None:
    assert Bandit(TWO).labels == ["lru", "priced depth=1"]
    with pytest.raises(ConfigError, match="candidates"):
        Bandit([])
    with pytest.raises(ConfigError, match="explorer=greedy"):
        Bandit(TWO, explorer="greedy")
    with pytest.raises(ConfigError, match="ridge=0"):
        Bandit(TWO, ridge=0.0)
    with pytest.raises(ConfigError, match="first_tokens=0"):
        Bandit(TWO, first_tokens=0)
    with pytest.raises(ConfigError, match="2 arms do not fit"):
        Bandit().run(*split_table(3, 0))
