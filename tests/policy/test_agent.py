"""Agents: what they choose, and files that hold no code."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from specgate.errors import CheckpointError, ConfigError
from specgate.policy.agent import LARGEST, NOTHING, Agent, actions_of, seen_by_network

ACTIONS = actions_of([0.5], [1, 2])


def an_agent(seed: int = 0) -> Agent:
    torch.manual_seed(seed)
    modules = [torch.nn.Linear(4, 8), torch.nn.Linear(8, len(ACTIONS))]
    return Agent([(m.weight, m.bias) for m in modules], "tanh", ACTIONS)


def test_actions() -> None:
    assert ACTIONS == [(NOTHING, 1), (0.5, 1), (0.5, 2)]
    for thresholds, depths in (([], [1]), ([0.5], []), ([1.5], [1]), ([0.5], [0])):
        with pytest.raises(ConfigError, match="make no actions"):
            actions_of(thresholds, depths)


def test_it_chooses_the_action_of_greatest_score() -> None:
    agent = an_agent()
    seen = np.array([0.1, 0.9, 0.0, 0.4], dtype=np.float32)
    (w1, b1), (w2, b2) = [(w.numpy(), b.numpy()) for w, b in agent.layers]
    scores = w2 @ np.tanh(w1 @ seen + b1) + b2
    assert agent.scores(seen).numpy() == pytest.approx(scores, abs=1e-5)
    assert agent.choose(seen) == ACTIONS[int(scores.argmax())]


def test_networks_see_bounded_numbers() -> None:
    odd = np.array([np.nan, np.inf, -1.0, 0.5], dtype=np.float32)
    assert seen_by_network(odd).tolist() == [0.0, LARGEST, 0.0, 0.5]


def test_a_saved_agent_is_the_same_and_holds_no_code(tmp_path: Path) -> None:
    agent = an_agent()
    agent.save(tmp_path / "agent.pt")
    torch.load(tmp_path / "agent.pt", weights_only=True)
    again = Agent.load(tmp_path / "agent.pt")
    seen = np.random.default_rng(0).random((50, 4)).astype(np.float32)
    assert [again.choose(s) for s in seen] == [agent.choose(s) for s in seen]


def test_what_is_no_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Agent.load(tmp_path / "none.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print, protocol=2))
    whole = tmp_path / "agent.pt"
    an_agent().save(whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:200])
    for name in ("other", "text", "code", "cut"):
        with pytest.raises(CheckpointError, match="no agent of specgate"):
            Agent.load(tmp_path / f"{name}.pt")


def test_layers_that_do_not_fit_are_refused() -> None:
    layers = [(torch.zeros(3, 4), torch.zeros(3)), (torch.zeros(3, 5), torch.zeros(3))]
    with pytest.raises(ConfigError, match="do not lead to 3 actions"):
        Agent(layers, "tanh", ACTIONS)
    with pytest.raises(ConfigError, match="activation=sine"):
        Agent(layers[:1], "sine", ACTIONS)
