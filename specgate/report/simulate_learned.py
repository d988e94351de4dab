"""Policies that learn in mode=simulate: agents of reinforcement learning, and the bandit among policies.

Both learn on documents that no predictor was trained on and that are not scored (of the validation split, if
the test split is scored), cell by cell: for one machine, batch and budget. Agents are kept in a folder; one
that was trained on the very same thing is read instead of being trained again, so that an interrupted run
goes on where it was.

Letters: D documents (or batches of them), A arms.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from specgate.policy.agent import Agent
from specgate.policy.bandit import Bandit, Regret
from specgate.policy.costs import Costs
from specgate.policy.rl import ReinforcementLearning
from specgate.policy.rules import Rules
from specgate.policy.workload import Workload
from specgate.report.record import write_json
from specgate.report.simulate_rows import Floats
from specgate.report.style import slug
from specgate.runtime.simulator import SimulationResult, Simulator

#: Told the points played, the points in all and the mean reward of a point.
Tell = Callable[[int, int, float], None]


@dataclass
class Shelf:
    """Trained agents, by all that they were trained on.

    Attributes:
        folder: where they lie; None keeps none.
        about: what they have in common: trace, shape, predictor, settings.
        entries: of the agents that were asked for, for metrics.json.
    """

    folder: Path | None
    about: Mapping[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)

    def file(self, label: str, about: Mapping[str, Any]) -> Path | None:
        """Where an agent lies, trained or not."""
        if self.folder is None:
            return None
        whole = json.dumps({**self.about, **about}, sort_keys=True, default=str)
        digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
        where = f"{about['hardware']}-b{about['batch']}-{100 * about['residency']:g}"
        return self.folder / f"{slug(f'{label} {where}')}-{digest}.pt"

    def agent(
        self,
        label: str,
        policy: ReinforcementLearning,
        about: Mapping[str, Any],
        games: Callable[[], tuple[list[Simulator], float]],
        tell: Tell | None = None,
    ) -> Agent:
        """The agent of a cell: read if it was trained before, else trained and kept.

        Args:
            label: of the policy.
            about: of the cell: ``hardware``, ``batch``, ``residency`` and what else decides.
            games: gives simulations of training documents and the mean time of their events in ns.

        Raises:
            ConfigError: gymnasium or stable-baselines3 is not installed.
            CheckpointError: a file that is no agent.
        """
        options = {key: value for key, value in vars(policy).items() if not key.startswith("_")}
        file = self.file(label, {**about, "options": options})
        notes = None if file is None else file.with_suffix(".json")
        cell = {key: about[key] for key in ("hardware", "batch", "residency")}
        if file is not None and notes is not None and file.exists() and notes.exists():
            entry = {**json.loads(notes.read_text()), "trained": False}
            agent = Agent.load(file)
        else:
            agent, entry = self._trained(policy, games, tell)
            if file is not None and notes is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                agent.save(file)
                write_json(notes, entry)  # last: with it, the agent is whole
            entry["trained"] = True
        self.entries.append(
            {"policy": label, **cell, "file": file.name if file is not None else None, **entry}
        )
        return agent

    @staticmethod
    def _trained(
        policy: ReinforcementLearning, games: Callable[[], tuple[list[Simulator], float]], tell: Tell | None
    ) -> tuple[Agent, dict[str, Any]]:
        curve: list[tuple[int, float]] = []

        def note(done: int, total: int, reward: float) -> None:
            curve.append((done, round(reward, 5)))
            if tell is not None:
                tell(done, total, reward)

        simulators, mean_event_ns = games()
        start = time.perf_counter()
        with torch.enable_grad():
            agent = policy.train(simulators, mean_event_ns, note)
        seconds = round(time.perf_counter() - start, 1)
        return agent, {
            "points": policy.steps,
            "documents": len(simulators),
            "seconds": seconds,
            "curve": curve,
        }


def costs_digest(costs: Costs) -> str:
    """What a machine costs for some documents, as a short text that changes with any of it."""
    digest = hashlib.sha256()
    for value in vars(costs).values():
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def games_of(
    documents: Sequence[Workload],
    costs: Callable[[Workload], Costs],
    rules: Rules,
    room: ArrayLike,
    host: int,
) -> tuple[list[Simulator], float]:
    """A simulation of each training document, and the mean compute of an event in ns."""
    priced = [costs(document) for document in documents]
    games = [
        Simulator(document, cost, rules, room, host) for document, cost in zip(documents, priced, strict=True)
    ]
    events = max(sum(cost.events for cost in priced), 1)
    return games, sum(cost.compute_ns for cost in priced) / events


def played(agent: Agent, game: Simulator) -> SimulationResult:
    """What an agent reaches."""
    agent.play(game)
    return game.result()


@dataclass(frozen=True)
class Choice:
    """What a bandit did with the scored documents of one cell.

    Attributes:
        regret: see :class:`~specgate.policy.bandit.Regret`.
        rewards_DA: speed in multiples of LRU's, of each arm on each document.
        learned_on: documents that it learned from before.
    """

    regret: Regret
    rewards_DA: Floats
    learned_on: int

    def entry(self, arms: Sequence[str]) -> dict[str, Any]:
        """Plain values for metrics.json; regret is summed over documents, in their order."""
        D = len(self.rewards_DA)
        earned_D = self.rewards_DA[np.arange(D), self.regret.choices_D]
        fixed = self.regret.best_fixed[0]
        return {
            "arms": list(arms),
            "choices": self.regret.choices_D.tolist(),
            "learned_on": self.learned_on,
            "documents": D,
            "reward": self.regret.reward / D,
            "best_fixed": arms[fixed],
            "best_fixed_reward": self.regret.best_fixed[1] / D,
            "best_each_reward": self.regret.best_each / D,
            "random_reward": self.regret.random / D,
            "regret_fixed": _summed(self.rewards_DA[:, fixed] - earned_D),
            "regret_each": _summed(self.rewards_DA.max(axis=1) - earned_D),
            "regret_arms": {
                arm: _summed(self.rewards_DA.max(axis=1) - self.rewards_DA[:, a])
                for a, arm in enumerate(arms)
            },
        }


def _summed(values_D: Floats) -> list[float]:
    return [round(float(value), 6) for value in np.cumsum(values_D)]


def choose(
    bandit: Bandit,
    before: tuple[Sequence[Workload], Floats],
    scored: tuple[Sequence[Workload], Floats],
) -> Choice:
    """Lets a bandit learn from documents and then pick an arm for each of the scored ones, learning on.

    Args:
        before, scored: documents, and rewards ``[D, A]`` of the arms on them.
    """
    bandit.reset()
    tables = [
        (np.stack([bandit.features_of(document) for document in documents]), rewards_DA)
        for documents, rewards_DA in (before, scored)
    ]
    bandit.run(*tables[0], rounds=bandit.rounds)
    return Choice(bandit.run(*tables[1]), scored[1], len(before[0]))


def rewards_of(times_AD: Sequence[Floats], reference_D: Floats) -> Floats:
    """Speeds in multiples of the reference's, ``[D, A]``."""
    return np.stack([reference_D / time_D for time_D in times_AD], axis=1)


def picked(figures_A: Sequence[Mapping[str, Floats]], choices_D: np.ndarray[Any, Any]) -> dict[str, Floats]:
    """Figures of each document under the arm that was picked for it."""
    return {
        key: np.stack([figures[key] for figures in figures_A])[choices_D, np.arange(len(choices_D))]
        for key in figures_A[0]
    }
