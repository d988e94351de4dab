"""A trained agent: a small network from what a simulator shows to what is fetched, in plain torch.

Letters: O numbers of an observation, A actions.

It holds tensors and plain values alone, so that a file loads with ``weights_only=True`` and runs without the
library that trained it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specgate.errors import CheckpointError, ConfigError

Observation = NDArray[np.float32]
#: A threshold above any probability fetches nothing.
NOTHING = 2.0
#: What the link's backlog, the one unbounded number, is cut to before a network sees it.
LARGEST = 10.0
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Steps(Protocol):
    """A simulation that stops at every point (specgate.runtime.simulator.Simulator)."""

    def reset(self) -> None:
        """Back to the beginning."""

    def advance(self) -> Observation | None:
        """On to the next point: what there is to see; None at the end."""

    def act(self, threshold: float, depth: int) -> None:
        """Fetch what the point foresees at least so surely, up to that horizon."""

    @property
    def now_ns(self) -> float:
        """Virtual time."""


def actions_of(thresholds: Sequence[float], depths: Sequence[int]) -> list[tuple[float, int]]:
    """Every threshold with every depth, and first to fetch nothing.

    Raises:
        ConfigError: there are none, or values that make no sense.
    """
    if not thresholds or not depths or not all(0 <= t <= 1 for t in thresholds) or min(depths) < 1:
        raise ConfigError(
            f"thresholds={list(thresholds)} and depths={list(depths)} make no actions; give probabilities "
            "and horizons from 1."
        )
    return [(NOTHING, 1), *((float(t), int(d)) for d in depths for t in thresholds)]


def seen_by_network(observation: Observation) -> Observation:
    """The observation with its numbers cut to what a network can take."""
    return np.clip(np.nan_to_num(observation), 0.0, LARGEST).astype(np.float32)


class Agent:
    """Chooses the action of greatest score.

    Args:
        layers: weight ``[out, in]`` and bias ``[out]`` of each linear layer, the last gives scores ``[A]``.
        activation: between them, ``tanh`` or ``relu``.
        actions: threshold and depth of each.

    Raises:
        ConfigError: shapes that do not fit together.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], activation: str, actions: Sequence[tuple[float, int]]
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ConfigError(f"activation={activation} is unknown; choose one of {', '.join(ACTIVATIONS)}.")
        sizes = [tuple(w.shape) for w, _ in layers]
        fits = all(a[0] == b[1] for a, b in pairwise(sizes))
        if not layers or not fits or sizes[-1][0] != len(actions):
            raise ConfigError(f"Layers {sizes} do not lead to {len(actions)} actions; train the agent anew.")
        self.layers = [
            (w.detach().float().cpu().clone(), b.detach().float().cpu().clone()) for w, b in layers
        ]
        self.activation, self.actions = activation, [(float(t), int(d)) for t, d in actions]
        self._between = ACTIVATIONS[activation]()

    @torch.no_grad()
    def scores(self, observation: Observation) -> Tensor:
        """Of each action: ``[A]``."""
        x = torch.from_numpy(seen_by_network(observation))
        for i, (weight, bias) in enumerate(self.layers):
            x = nn.functional.linear(x, weight, bias)
            if i + 1 < len(self.layers):
                x = self._between(x)
        return x

    def choose(self, observation: Observation) -> tuple[float, int]:
        """Threshold and depth."""
        return self.actions[int(self.scores(observation).argmax())]

    def play(self, simulator: Steps) -> None:
        """Runs a simulation from its beginning to its end; its result is read from it afterwards."""
        simulator.reset()
        while (observation := simulator.advance()) is not None:
            simulator.act(*self.choose(observation))

    def save(self, path: str | Path) -> None:
        """Writes tensors and plain values."""
        state = {
            "specgate_agent": 1,
            "activation": self.activation,
            "actions": self.actions,
            "layers": self.layers,
        }
        torch.save(state, path)

    @classmethod
    def load(cls, path: str | Path) -> Agent:
        """From :meth:`save`; no code of the file is run.

        Raises:
            CheckpointError: missing, damaged, or no agent.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("specgate_agent") != 1:
                raise ValueError("no agent of specgate")
            return cls(state["layers"], state["activation"], state["actions"])
        except FileNotFoundError:
            raise CheckpointError(f"agent {path} does not exist: train one, or name its file") from None
        except (ConfigError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is no agent of specgate ({error}): train one anew") from None
        except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is no agent of specgate ({reason}): train one anew") from None
