"""Reinforcement learning: the environment's rules, that both algorithms learn, and a run in the simulator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from specgate.errors import ConfigError
from specgate.policy.agent import Agent
from specgate.policy.rl import ReinforcementLearning
from tests.policy.support import noisy_forecasts, small_workload, some_costs


class Lesson:
    """Steps of a simulation whose best action is plain to see.

    The first number says whether it pays to fetch at this point: where it does, a step takes 1 ns if one
    fetches and 3 ns if not; where it does not, the other way round.
    """

    def __init__(self, length: int = 60, seed: int = 0) -> None:
        self.length, self.seed = length, seed
        self.reset()

    def reset(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.at, self.now_ns, self.acted = 0, 0.0, True
        self.pays = bool(self.random.integers(2))

    def advance(self) -> np.ndarray | None:
        if self.at == self.length:
            return None
        self.at += 1
        self.pays = bool(self.random.integers(2))
        self.acted = False
        return np.array([self.pays, 0.5], dtype=np.float32)

    def act(self, threshold: float, depth: int) -> None:
        assert not self.acted, "one action for each point"
        self.acted = True
        self.now_ns += 1.0 if (threshold <= 1) == self.pays else 3.0


@pytest.fixture
def trainable() -> None:
    pytest.importorskip("gymnasium")
    pytest.importorskip("stable_baselines3")


@pytest.mark.usefixtures("trainable")
def test_the_environment_keeps_gymnasium_s_contract() -> None:
    from gymnasium.utils.env_checker import check_env

    from specgate.policy.environment import PrefetchEnv

    environment = PrefetchEnv([Lesson(), Lesson(seed=1)], 1.0, [0.3, 0.7], [1, 2])
    check_env(environment, skip_render_check=True)
    assert environment.action_space.n == 5


@pytest.mark.usefixtures("trainable")
def test_rewards_add_up_to_the_time_of_the_simulation() -> None:
    from specgate.policy.environment import PrefetchEnv

    lesson = Lesson()
    environment = PrefetchEnv([lesson], 4.0, [0.5], [1])
    observation, _ = environment.reset(seed=0)
    total, steps, over = 0.0, 0, False
    while not over:
        observation, reward, over, cut, _ = environment.step(np.int64(steps % 2))
        assert not cut
        assert environment.observation_space.contains(observation)
        total += reward
        steps += 1
    assert steps == 60
    assert total == pytest.approx(-lesson.now_ns / 4.0)


@pytest.mark.usefixtures("trainable")
def test_nothing_to_learn_from_is_refused() -> None:
    from specgate.policy.environment import PrefetchEnv

    with pytest.raises(ConfigError, match="0 simulations"):
        PrefetchEnv([], 1.0, [0.5], [1])
    with pytest.raises(ConfigError, match="without events"):
        PrefetchEnv([Lesson(length=0)], 1.0, [0.5], [1])


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_it_learns_when_to_fetch(algorithm: str, tmp_path: Path) -> None:
    policy = ReinforcementLearning(
        algorithm, steps=6000, thresholds=(0.5,), depths=(1,), gamma=0.0, hidden=16
    )
    told: list[tuple[int, int, float]] = []
    agent = policy.train([Lesson()], 1.0, lambda *report: told.append(report))
    lesson = Lesson(length=200, seed=9)
    agent.play(lesson)
    assert lesson.now_ns < 1.1 * 200  # always wrong is 600, guessing 400
    assert told[-1][0] == told[-1][1] == 6000
    assert [t[0] for t in told] == sorted({t[0] for t in told})
    assert told[-1][2] > told[0][2]
    agent.save(tmp_path / "a.pt")
    again = Lesson(length=200, seed=9)
    Agent.load(tmp_path / "a.pt").play(again)
    assert again.now_ns == lesson.now_ns


@pytest.mark.usefixtures("trainable")
def test_the_same_seed_gives_the_same_agent() -> None:
    def weights(seed: int) -> list[float]:
        policy = ReinforcementLearning(steps=300, thresholds=(0.5,), depths=(1,), hidden=4, seed=seed)
        return policy.train([Lesson()], 1.0).layers[0][0].flatten().tolist()

    assert weights(1) == weights(1)
    assert weights(1) != weights(2)


@pytest.mark.usefixtures("trainable")
def test_it_runs_in_the_simulator() -> None:
    simulator = pytest.importorskip("specgate.runtime.simulator")
    if not pytest.importorskip("specgate.runtime.native").available():
        pytest.skip("the native core is not built here")
    workload = small_workload(1, tokens=(40,))
    workload = workload.with_forecasts(noisy_forecasts(workload, 2))
    costs = some_costs(workload)
    policy = ReinforcementLearning(steps=400, hidden=8)
    rules = policy.fit(workload, costs, 8)
    game = simulator.Simulator(workload, costs, rules, 8)
    agent = policy.train([game], costs.compute_ns / costs.events)
    agent.play(game)
    total = game.result().total("total_ns")
    assert total == pytest.approx(game.now_ns)
    assert total >= costs.compute_ns
    agent.play(game)
    assert game.result().total("total_ns") == total


def test_without_the_libraries_training_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ConfigError, match=r"pip install 'specgate\[rl\]'"):
        ReinforcementLearning().train([Lesson()], 1.0)


def test_the_rules_are_those_of_priced_eviction() -> None:
    train = small_workload(tokens=(30,))
    rules = ReinforcementLearning(depths=(1, 4)).fit(train, some_costs(train), 9)
    assert (rules.eviction, rules.depth) == ("priced", 4)


@pytest.mark.parametrize(
    "options", [{"algorithm": "a2c"}, {"steps": 0}, {"gamma": 1.0}, {"thresholds": ()}, {"depths": (0,)}]
)
def test_nonsense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ReinforcementLearning(**options)  # type: ignore[arg-type]
