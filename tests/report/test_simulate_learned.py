"""mode=simulate with policies that learn: agents are trained once, the bandit gets what it picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import initialize_config_dir

from specgate.errors import ConfigError
from specgate.policy.agent import Agent
from specgate.policy.bandit import FEATURES, Bandit
from specgate.policy.registry import policy
from specgate.report.modes import policy_config
from specgate.report.publish import publish
from specgate.report.record import Run, read_record
from specgate.report.results import make
from specgate.report.simulate import simulate
from specgate.report.simulate_learned import Choice, choose, picked, rewards_of
from specgate.report.simulate_learned_page import against_table, bandit_table, seeds_table
from specgate.report.simulate_page import left_out, policies_of
from specgate.runtime import native
from tests.policy.support import small_workload
from tests.report.replays import data_of, save_predictor, shape, write_decode_trace
from tests.report.test_simulate import machine, quick
from tests.test_configs import CONF

pytestmark = pytest.mark.skipif(not native.available(), reason="the native core is not built")
RL = {"steps": 300, "thresholds": (0.2, 0.6), "depths": (1, 2), "hidden": 8}
ARMS = ({"name": "lru"}, {"name": "priced", "depth": 1}, {"name": "on_demand"})


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decode_trace(tmp_path_factory.mktemp("learned") / "trace")


@pytest.fixture(scope="module")
def checkpoint(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictor(data_of(trace), tmp_path_factory.mktemp("learned") / "predictor.ckpt")


def run(
    trace: Path, checkpoint: Path | None, policies: dict[str, Any], folder: Path | None = None, **changes: Any
) -> dict[str, Any]:
    settings = quick(checkpoint, residency=[0.25], **changes)
    return simulate(settings, policies, shape(), {"slow": machine()}, {"tiny": data_of(trace)}, None, folder)


def agent_policies(**changes: Any) -> dict[str, Any]:
    return {
        "lru": policy("lru"), "priced": policy("priced"), "oracle": policy("oracle"),
        "rl seed=0": policy("rl", **(RL | changes)),
        "rl seed=1": policy("rl", **(RL | changes | {"seed": 1})),
    }  # fmt: skip


# ---------------------------------------------------------------------- agents


def test_agents_are_trained_once_and_kept(trace: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    first = run(trace, checkpoint, agent_policies(), tmp_path)
    assert [(a["policy"], a["trained"], a["points"]) for a in first["agents"]] == [
        ("rl seed=0", True, 300), ("rl seed=1", True, 300),
    ]  # fmt: skip
    files = sorted((tmp_path / "agents").glob("*.pt"))
    assert sorted(a["file"] for a in first["agents"]) == [file.name for file in files]
    assert Agent.load(files[0]).actions[0][0] > 1
    rows = {row["policy"]: row for row in first["rows"]}
    oracle, least = rows["oracle"]["tokens_per_second"], rows["rl seed=0"]
    assert 0 < least["tokens_per_second"] <= oracle
    assert least["against_main"] == pytest.approx(
        least["tokens_per_second"] / rows["priced"]["tokens_per_second"]
    )
    assert rows["priced"]["best_reference"] == "lru"  # no agent is a reference

    again = run(trace, checkpoint, agent_policies(), tmp_path)
    assert [a["trained"] for a in again["agents"]] == [False, False]
    assert again["rows"] == first["rows"]

    files[0].with_suffix(".json").unlink()  # interrupted while it was written
    third = run(trace, checkpoint, agent_policies(), tmp_path)
    assert sum(a["trained"] for a in third["agents"]) == 1
    assert third["rows"] == first["rows"]

    other = run(trace, checkpoint, agent_policies(gamma=0.5), tmp_path)
    assert all(a["trained"] for a in other["agents"])
    elsewhere = run(trace, checkpoint, agent_policies(), None, agents=str(tmp_path / "agents"))
    assert [a["trained"] for a in elsewhere["agents"]] == [False, False]
    assert elsewhere["rows"] == first["rows"]


def test_agents_are_trained_for_each_batch(trace: Path, checkpoint: Path) -> None:
    pytest.importorskip("stable_baselines3")
    found = run(trace, checkpoint, {"rl": policy("rl", **RL)}, batches=[1, 2], groupings=2)
    assert [(a["batch"], a["trained"], a["file"]) for a in found["agents"]] == [
        (1, True, None), (2, True, None),
    ]  # fmt: skip
    one, two = found["rows"]
    assert two["documents"] == one["documents"] == one["groups"]
    assert two["groups"] == 2 * (one["documents"] // 2)


# ---------------------------------------------------------------------- the bandit


def test_a_bandit_of_one_arm_is_that_arm(trace: Path, checkpoint: Path) -> None:
    policies = {"lru": policy("lru"), "priced": policy("priced"), "oracle": policy("oracle")}
    policies["bandit"] = Bandit([{"name": "priced"}])  # type: ignore[assignment]
    found = run(trace, checkpoint, policies)
    rows = {row["policy"]: row for row in found["rows"]}
    same = {k for k in rows["bandit"] if k not in ("policy", "rules") and not k.startswith("against_")}
    assert {k: rows["bandit"][k] for k in same} == {k: rows["priced"][k] for k in same}
    (choice,) = found["choices"]
    assert choice["regret_fixed"][-1] == choice["regret_each"][-1] == 0
    assert choice["documents"] == rows["priced"]["documents"]


def test_its_regret_is_that_of_its_choices(trace: Path, checkpoint: Path, tmp_path: Path) -> None:
    policies: dict[str, Any] = {"lru": policy("lru"), "bandit": Bandit(ARMS), "oracle": policy("oracle")}
    found = run(trace, checkpoint, policies, batches=[1, 2])
    assert [row["policy"] for row in found["rows"]] == ["lru", "bandit", "oracle"] * 2
    for choice in found["choices"]:
        assert choice["arms"] == ["lru", "priced depth=1", "on_demand"]
        each, fixed = np.array(choice["regret_each"]), np.array(choice["regret_fixed"])
        assert (np.diff(each, prepend=0) >= 0).all()
        assert each[-1] == pytest.approx(
            choice["documents"] * (choice["best_each_reward"] - choice["reward"]), abs=1e-5
        )
        assert each[-1] >= fixed[-1] - 1e-9
        worst = choice["arms"].index("on_demand")
        assert choice["regret_arms"]["on_demand"][-1] == max(r[-1] for r in choice["regret_arms"].values())
        assert choice["choices"].count(worst) < choice["documents"]
    path = Run("benchmark.py").write(tmp_path / "run", **found)
    page = publish(read_record(path), tmp_path / "run")
    assert "regret" in page.read_text()
    assert len(list((tmp_path / "run" / "plots").glob("*regret.png"))) == 1
    text = make(tmp_path / "docs" / "RESULTS.md", [str(tmp_path / "run")], "simulate-x").read_text()
    assert "images/simulate-x-regret.png" in text
    assert (tmp_path / "docs" / "images" / "simulate-x-regret.png").exists()


def test_a_bandit_whose_arms_lack_a_forecast_is_left_out(trace: Path) -> None:
    policies: dict[str, Any] = {"lru": policy("lru"), "bandit": Bandit(ARMS)}
    found = run(trace, None, policies)
    assert [row["policy"] for row in found["rows"]] == ["lru"]
    assert found["skipped"][0]["policy"] == "bandit"
    with pytest.raises(ConfigError, match=r"None of simulate\.policies"):
        run(trace, None, {"bandit": Bandit(ARMS)})


def test_figures_are_those_of_the_picked_arm() -> None:
    figures = [{"total_ns": np.array([1.0, 2.0, 3.0])}, {"total_ns": np.array([4.0, 5.0, 6.0])}]
    assert picked(figures, np.array([1, 0, 1]))["total_ns"].tolist() == [4.0, 2.0, 6.0]
    rewards = rewards_of([f["total_ns"] for f in figures], np.array([2.0, 2.0, 3.0]))
    assert rewards.tolist() == [[2.0, 0.5], [1.0, 0.4], [1.0, 0.5]]


def test_it_learns_before_it_is_judged() -> None:
    documents = [small_workload(seed, tokens=(10,)) for seed in range(12)]
    rewards = np.tile([1.0, 1.4, 0.9], (12, 1))
    chosen = choose(Bandit(ARMS, explore=0.05), (documents, rewards), (documents[:4], rewards[:4]))
    assert chosen.regret.choices_D.tolist() == [1, 1, 1, 1]
    assert chosen.learned_on == 12
    assert chosen.regret.against_each == pytest.approx(0)
    entry = Choice(chosen.regret, rewards[:4], 12).entry(Bandit(ARMS).labels)
    assert entry["best_fixed"] == "priced depth=1"
    assert entry["regret_arms"]["lru"] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert len(FEATURES) == 8


# ---------------------------------------------------------------------- tables


def row(name: str, speed: float, **more: Any) -> dict[str, Any]:
    return {"hardware": "m", "batch": 1, "residency": 0.25, "policy": name, "tokens_per_second": speed} | more


def test_tables_of_seeds_and_variants() -> None:
    ratio = {"against_main": 0.9, "against_main_low": 0.8, "against_main_high": 0.95}
    rows = [
        row("priced", 20.0), row("lru", 10.0, **ratio), row("priced depth=1", 18.0, **ratio),
        row("rl seed=0", 16.0, **ratio), row("rl seed=1", 18.0, **ratio),
    ]  # fmt: skip
    seeds, variants = seeds_table(rows), against_table(rows)
    assert seeds is not None
    assert seeds.rows == [["rl", "2", "17 ± 1.41 (16 to 18)"], ["priced", "–", "20"]]
    assert variants is not None
    assert [r[0] for r in variants.rows] == ["priced depth=1", "rl seed=0", "rl seed=1"]
    assert variants.rows[0][1] == "0.900 [0.800, 0.950]"
    assert seeds_table(rows[:4]) is None
    assert against_table(rows[:2]) is None


def test_oracles_with_options_stay_below_the_line() -> None:
    rows = [row("known_tokens tokens=1", 5.0), row("lru", 10.0)]
    assert policies_of(rows) == ["lru", "known_tokens tokens=1"]


def test_what_several_cells_left_out_is_said_once() -> None:
    skipped = [
        {"policy": "layer_sizes (a, batch 8, 25 %)", "reason": "too few slots"},
        {"policy": "layer_sizes (b, batch 8, 25 %)", "reason": "too few slots"},
        {"policy": "next_gate", "reason": "no routers"},
    ]
    assert left_out(skipped) == [
        "layer_sizes is left out (a, batch 8, 25 %; b, batch 8, 25 %): too few slots.",
        "next_gate is left out: no routers.",
    ]


def test_the_command_line_names_a_bandit() -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        label, made = policy_config("bandit explorer=thompson")
    assert (label, type(made)) == ("bandit explorer=thompson", Bandit)
    assert bandit_table([]).rows == []
