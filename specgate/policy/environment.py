"""Prefetching as a game for reinforcement learning: a gymnasium environment over a simulator's points.

Letters: O numbers of an observation, A actions.

Only :mod:`specgate.policy.rl` imports this, when it trains: gymnasium is an optional dependency (``rl``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from specgate.errors import ConfigError
from specgate.policy.agent import LARGEST, Observation, Steps, actions_of, seen_by_network


class PrefetchEnv(gymnasium.Env[Observation, np.int64]):
    """One point of a simulation is one step: see the forecast and the link, choose what to fetch ahead.

    Action 0 fetches nothing, the others a threshold and a depth. The reward is the time that went by until
    the next point, negative, in mean events: what was stalled weighs as much as what was computed, and the
    latter no choice can change. An episode is one simulation.

    Args:
        simulators: one is drawn for each episode.
        mean_event_ns: of the simulations' compute, the unit of the reward.
        thresholds, depths: of the actions.

    Shapes:
        observation: float32 ``[O]``, 0 to LARGEST; action: whole number below A.
    """

    def __init__(
        self,
        simulators: Sequence[Steps],
        mean_event_ns: float,
        thresholds: Sequence[float],
        depths: Sequence[int],
    ) -> None:
        if not simulators or not mean_event_ns > 0:
            raise ConfigError(
                f"{len(simulators)} simulations with events of {mean_event_ns} ns are nothing to learn from; "
                "give one or more, and a time above 0."
            )
        self.simulators = list(simulators)
        self.mean_event_ns = mean_event_ns
        self.actions = actions_of(thresholds, depths)
        self.simulator = self.simulators[0]
        self.simulator.reset()
        first = self.simulator.advance()
        if first is None:
            raise ConfigError("A simulation without events is nothing to learn from; give documents.")
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))
        self.observation_space = gymnasium.spaces.Box(0.0, LARGEST, first.shape, np.float32)
        self._last = seen_by_network(first)
        self._then_ns = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.simulator = self.simulators[int(self.np_random.integers(len(self.simulators)))]
        self.simulator.reset()
        first = self.simulator.advance()
        if first is None:
            raise ConfigError("A simulation without events is nothing to learn from; give documents.")
        self._then_ns = self.simulator.now_ns
        self._last = seen_by_network(first)
        return self._last, {}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self.simulator.act(*self.actions[int(action)])
        found = self.simulator.advance()
        now_ns = self.simulator.now_ns
        reward = -(now_ns - self._then_ns) / self.mean_event_ns
        self._then_ns = now_ns
        if found is not None:
            self._last = seen_by_network(found)
        return self._last, reward, found is None, False, {}
