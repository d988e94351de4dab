"""Reinforcement learning: an agent that learns in the simulator what to fetch ahead at every point."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from specgate.errors import ConfigError
from specgate.policy.agent import Agent, Steps, actions_of
from specgate.policy.base import ForecastSource, Policy, check_depth, check_eviction, check_slots
from specgate.policy.costs import Costs
from specgate.policy.reuse import fit_reuse
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload

ALGORITHMS = ("ppo", "dqn")
#: Told the steps done, the steps in all, and the mean reward of a step since it was told last.
Progress = Callable[[int, int, float], None]


class ReinforcementLearning(Policy):
    """The ``rl`` policy: at every point, a network chooses the threshold and the depth.

    PPO (Schulman et al., 2017, arXiv:1707.06347) or DQN (Mnih et al., 2013, arXiv:1312.5602) of
    stable-baselines3 over :class:`~specgate.policy.environment.PrefetchEnv`. :meth:`fit` gives the rules of
    eviction, as those of ``priced``; :meth:`train` gives the agent that takes the place of the prefetch rule.

    Args:
        algorithm: ``ppo`` or ``dqn``.
        steps: points that are played in training.
        thresholds, depths: the agent's choices, each with each, and to fetch nothing.
        foresight: the largest horizon that eviction looks at.
        eviction: who goes first.
        hidden: units of each of the two hidden layers.
        learning_rate: of Adam.
        gamma: discount of rewards per point.
        calibrated: whether a predictor's probabilities are calibrated first.
        seed: of everything drawn at random.
    """

    name: ClassVar[str] = "rl"
    forecast_source: ClassVar[ForecastSource] = "predictor"

    def __init__(
        self,
        algorithm: str = "ppo",
        steps: int = 50_000,
        thresholds: Sequence[float] = (0.2, 0.35, 0.5, 0.7, 0.9),
        depths: Sequence[int] = (1, 2, 3),
        foresight: int = 24,
        eviction: str = "priced",
        hidden: int = 32,
        learning_rate: float = 1e-3,
        gamma: float = 0.97,
        calibrated: bool = True,
        seed: int = 0,
    ) -> None:
        if algorithm not in ALGORITHMS:
            raise ConfigError(f"algorithm={algorithm} is unknown; choose one of {', '.join(ALGORITHMS)}.")
        if steps < 1 or hidden < 1:
            raise ConfigError(f"steps={steps} and hidden={hidden} must be 1 or more.")
        if not learning_rate > 0 or not 0 <= gamma < 1:
            raise ConfigError(
                f"learning_rate={learning_rate} must be above 0 and gamma={gamma} from 0 to below 1."
            )
        actions_of(thresholds, depths)
        self.algorithm, self.steps, self.seed = algorithm, steps, seed
        self.thresholds, self.depths = tuple(thresholds), tuple(check_depth(self.name, d) for d in depths)
        self.foresight = max(check_depth(self.name, foresight, "foresight"), *self.depths)
        self.eviction = check_eviction(eviction)
        self.hidden, self.learning_rate, self.gamma = hidden, learning_rate, gamma
        self.calibrated = calibrated

    @property
    def horizons(self) -> int:
        return self.foresight

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        reuse = fit_reuse(train, slots)
        return Rules(
            eviction=self.eviction,
            prefetch="threshold",
            thresholds_L=np.ones(train.layers),
            depth=max(self.depths),
            half_life=reuse.half_life,
            intercept=reuse.intercept,
            slope=reuse.slope,
            discount=0.3 ** (1 / train.layers),  # as priced has it
        )

    def train(
        self, simulators: Sequence[Steps], mean_event_ns: float, progress: Progress | None = None
    ) -> Agent:
        """Plays training documents and returns what was learned; the same seed gives the same agent.

        Args:
            simulators: one per training document (or stretch), with this policy's rules and forecasts.
            mean_event_ns: of their compute, the unit of the reward.
            progress: told how it goes, about every 2,000 points.

        Raises:
            ConfigError: gymnasium or stable-baselines3 is not installed.
        """
        baselines = _baselines()
        environment = importlib.import_module("specgate.policy.environment").PrefetchEnv(
            simulators, mean_event_ns, self.thresholds, self.depths
        )
        common: dict[str, Any] = {
            "env": environment,
            "learning_rate": self.learning_rate,
            "gamma": self.gamma,
            "seed": self.seed,
            "device": "cpu",
            "policy_kwargs": {"net_arch": [self.hidden, self.hidden]},
        }
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)  # networks of this size are slower with more
            if self.algorithm == "ppo":
                rows = 128 * min(16, max(self.steps // 512, 1))
                model = baselines.PPO("MlpPolicy", n_steps=rows, batch_size=128, ent_coef=0.005, **common)
            else:
                model = baselines.DQN(
                    "MlpPolicy",
                    buffer_size=min(self.steps, 100_000),
                    learning_starts=min(1000, self.steps // 10),
                    train_freq=4,
                    target_update_interval=1000,
                    exploration_fraction=0.3,
                    **common,
                )
            model.learn(self.steps, callback=_callback(baselines, self.steps, progress))
        finally:
            torch.set_num_threads(threads)
        return agent_of(model, self.algorithm, environment.actions)


def agent_of(model: Any, algorithm: str, actions: Sequence[tuple[float, int]]) -> Agent:
    """The network that chooses, taken out of a model of stable-baselines3."""
    if algorithm == "ppo":
        modules = [*model.policy.mlp_extractor.policy_net, model.policy.action_net]
    else:
        modules = list(model.policy.q_net.q_net)
    layers = [(m.weight, m.bias) for m in modules if isinstance(m, torch.nn.Linear)]
    return Agent(layers, "tanh" if algorithm == "ppo" else "relu", actions)


def _baselines() -> Any:
    try:
        importlib.import_module("gymnasium")
        return importlib.import_module("stable_baselines3")
    except ImportError as error:
        raise ConfigError(
            f"policy=rl trains with gymnasium and stable-baselines3, and one is missing ({error}); "
            "pip install 'specgate[rl]'."
        ) from None


def _callback(baselines: Any, steps: int, progress: Progress | None) -> Any:
    """Of stable-baselines3: tells ``progress`` how training goes."""

    class Tell(baselines.common.callbacks.BaseCallback):
        every, rewards, count = 2000, 0.0, 0

        def _on_step(self) -> bool:
            self.rewards += float(np.sum(self.locals["rewards"]))
            self.count += 1
            if progress is not None and self.count >= self.every and self.num_timesteps < steps:
                progress(self.num_timesteps, steps, self.rewards / self.count)
                self.rewards, self.count = 0.0, 0
            return True

        def _on_training_end(self) -> None:
            if progress is not None and self.count:
                progress(steps, steps, self.rewards / self.count)

    return Tell()
