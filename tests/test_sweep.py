"""Sweeps: every option of conf/sweep runs two real jobs and ends with one ranked table, however jobs end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf
from rich.console import Console

from specgate.errors import ConfigError
from specgate.pruning import MedianStopping, median_verdict, running_average
from specgate.report.runs import group_runs, read_runs
from specgate.report.sweep import main, report, sweep_table
from tests.test_configs import CONF, composed

ROOT = Path(__file__).parent.parent
QUICK = [
    "logger=none", "data.window=32", "data.batch_size=16", "threads=1", "trainer=debug",
    "trainer.max_epochs=1", "data.max_sequences={train: 16, validation: 8, test: 8}",
]  # fmt: skip


def sweep(folder: Path, trace: Path, *overrides: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """``train.py -m`` in a process of its own; its sweep.json and what it printed."""
    start = [
        sys.executable,
        str(ROOT / "train.py"),
        "-m",
        f"hydra.sweep.dir={folder}",
        f"data.traces={trace}",
    ]
    done = subprocess.run(
        [*start, *QUICK, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert done.stdout.strip().splitlines()[-1] == str(folder / "sweep.json"), text
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found, done.stdout


def two_jobs(found: dict[str, Any], folder: Path) -> None:
    """Both jobs' real metrics are in the ranking."""
    assert {group["run"] for group in found["groups"]} == {"popularity", "markov"}
    assert [group["rank"] for group in found["groups"]] == [1, 2]
    first, second = (group["recall"]["mean"] for group in found["groups"])
    assert first >= second > 0
    assert found["unfinished"] == []
    assert {run["predictor"] for run in found["runs"]} == {"popularity", "markov"}
    for run in found["runs"]:
        metrics = json.loads((folder / run["source"] / "metrics.json").read_text())
        assert metrics["training_seconds"] == run["training_seconds"] > 0
        assert metrics["tokens_seen"] > 0
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "Sweep on" in (folder / "sweep.md").read_text()


@pytest.mark.parametrize("launcher", ["joblib", "submitit", pytest.param("ray", marks=pytest.mark.slow)])
def test_launchers_run_two_jobs(launcher: str, tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    local = ["hydra/launcher=submitit_local"] if launcher == "submitit" else []
    overrides = [f"sweep={launcher}", *local, "model=popularity,markov"]
    found, output = sweep(tmp_path / "sweep", tiny_traces["olmoe"], *overrides)
    two_jobs(found, tmp_path / "sweep")
    assert "markov" in output


def test_a_grid_groups_seeds_and_outlives_a_failed_job(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    overrides = ["sweep=grid", "model=mlp,router_lookahead", "seed=0,1", "++model.width=8"]
    found, output = sweep(folder, tiny_traces["olmoe"], *overrides, code=1)  # one has no width
    (group,) = found["groups"]
    assert group["seeds"] == [0, 1]
    of_seeds = [run["scores"]["validation"]["within"]["1"]["recall_at_k"] for run in found["runs"]]
    spread = group["recall_at_k"]["validation"]["1"]
    assert spread["mean"] == pytest.approx(sum(of_seeds) / 2, abs=1e-6)
    assert spread["deviation"] == pytest.approx(abs(of_seeds[0] - of_seeds[1]) / 2**0.5, abs=2e-6)
    assert [one["status"] for one in found["unfinished"]] == ["failed", "failed"]
    assert all("width" in one["error"] for one in found["unfinished"])
    assert "model=router_lookahead" in output
    assert {run["steps"] for run in found["runs"]} == {1}
    assert "│ mlp" in output
    narrow = Console(width=80, record=True, quiet=False, file=io.StringIO())
    report(folder, narrow)
    text = narrow.export_text()
    assert "mlp" in text
    assert max(map(len, text.split("job 2")[0].splitlines())) <= 80
    assert main([str(folder / "0" / "checkpoints")]) == 1  # no run in there


def test_what_does_not_apply_is_passed_over(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    """``model=glob(*)`` names the ensemble too, which has no members to combine then."""
    found, output = sweep(tmp_path / "sweep", tiny_traces["olmoe"], "model=ensemble,popularity")
    assert [group["run"] for group in found["groups"]] == ["popularity"]
    (left,) = found["unfinished"]
    assert left["status"] == "skipped"
    assert "model=ensemble" in left["overrides"]
    assert "give the members' runs" in left["error"]
    assert "skipped: " in output


def test_the_grid_holds_every_predictor_that_needs_no_files() -> None:
    params = OmegaConf.load(CONF / "sweep" / "grid.yaml").hydra.sweeper.params
    from hydra.core.override_parser.overrides_parser import OverridesParser

    names = [file.stem for file in (CONF / "model").glob("*.yaml")]
    (override,) = OverridesParser.create().parse_overrides([f"model={params.model}"])
    chosen = override.value().filter(names)  # type: ignore[union-attr]
    assert set(names) - set(chosen) == {"ensemble", "shadow"}


def test_optuna_searches_and_keeps_its_study(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/study.db"
    overrides = ["sweep=optuna", "model=mlp", "model.width=8", "hydra.sweeper.n_trials=2", storage]
    folder = tmp_path / "sweep"
    found, _ = sweep(folder, tiny_traces["olmoe"], *overrides)
    assert len(found["runs"]) == 2
    assert all(set(run["scores"]) == {"validation"} for run in found["runs"])  # the test split stays closed
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert best.best_value == pytest.approx(found["groups"][0]["recall"]["mean"], abs=1e-5)
    assert len({run["settings"]["model.lr"] for run in found["runs"]}) == 2
    import optuna

    study = optuna.load_study(study_name="specgate", storage=f"sqlite:///{tmp_path}/study.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    for job in "01":
        assert json.loads((folder / job / "curve.json").read_text())["state"] == "completed"


# --- the median stopping rule ---


def test_median_rule_by_hand() -> None:
    curve = [[10, 0.2], [20, 0.4], [30, 0.9]]
    assert running_average(curve, 20) == pytest.approx(0.3)
    assert running_average(curve, 5) is None
    others = [curve, [[10, 0.5], [20, 0.5]], [[10, 0.1], [20, 0.3]]]  # averages at 20: 0.3, 0.5, 0.2
    assert median_verdict([[20, 0.29]], others, jobs=3) == pytest.approx(0.3)
    assert median_verdict([[20, 0.31]], others, jobs=3) is None
    assert median_verdict([[10, 0.31], [20, 0.1]], others, jobs=3) is None  # its best counts
    assert median_verdict([[20, 0.0]], others, jobs=4) is None
    assert median_verdict([[20, 0.31]], others, jobs=3, sign=-1) == pytest.approx(0.3)  # a loss
    with pytest.raises(ConfigError, match="choose max or min"):
        MedianStopping("a", "b", mode="best")


class Falling(BoringModel):
    """Logs a given value per epoch."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def on_validation_epoch_end(self) -> None:
        self.log("val/recall", torch.tensor(self.values[self.current_epoch]))


def run_job(sweep: Path, job: int, values: list[float]) -> tuple[MedianStopping, int]:
    stopping = MedianStopping(str(sweep / str(job)), str(sweep), jobs=2)
    trainer = L.Trainer(
        max_epochs=len(values), limit_train_batches=2, limit_val_batches=1, callbacks=[stopping],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Falling(values))
    return stopping, trainer.global_step


def test_a_hopeless_run_is_stopped_and_a_good_one_goes_on(tmp_path: Path) -> None:
    for job, values in enumerate(([0.1, 0.3, 0.5], [0.2, 0.4, 0.6])):
        assert run_job(tmp_path, job, values)[0].pruned is None  # two others are needed
    good, steps = run_job(tmp_path, 2, [0.16, 0.31, 0.41])
    assert (good.pruned, steps) == (None, 6)
    bad, steps = run_job(tmp_path, 3, [0.2, 0.2, 0.9])
    assert steps == 4  # after the second epoch: 0.2 < the median of 0.2, 0.3 and 0.235
    assert bad.pruned == {"step": 4, "best": 0.2, "median": 0.235, "jobs": 3}
    assert json.loads((tmp_path / "3" / "curve.json").read_text())["state"] == "pruned"
    assert len(bad.completed()) == 3  # a stopped run is no yardstick


def test_a_stopped_run_is_still_a_whole_run(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    """train.py's own function among three completed jobs that were better from the first step on."""
    import train as entry

    for job in range(3):
        (tmp_path / str(job)).mkdir()
        curve = {"state": "completed", "monitor": "val/recall", "curve": [[1, 0.99]]}
        (tmp_path / str(job) / "curve.json").write_text(json.dumps(curve))
    overrides = ["sweep=optuna", "model=mlp", "model.width=8", "trainer.max_epochs=5", "data.num_workers=0"]
    overrides += [f"hydra.sweep.dir={tmp_path}", f"data.traces={tiny_traces['olmoe']}"]
    quick = [word for word in QUICK if "max_epochs" not in word]
    cfg = composed(CONF, "train", [*quick, *overrides], tmp_path / "3")
    value = entry.train(cfg, Console(quiet=True))
    metrics = json.loads((tmp_path / "3" / "metrics.json").read_text())
    assert metrics["pruned"]["median"] == 0.99
    assert metrics["pruned"]["jobs"] == 3
    assert metrics["steps"] == metrics["pruned"]["step"] == 1  # of five epochs of one step
    within = [row["recall_at_k"] for row in metrics["rows"] if row["kind"] == "within"]
    assert value == pytest.approx(sum(within) / len(within))
    assert "mlp (1 stopped early)" in sweep_table("t", group_runs(read_runs([tmp_path]))).rows[0]


def test_an_interrupted_job_is_listed(tmp_path: Path) -> None:
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("- model=mlp\n- seed=3\n")
    console = Console(width=80, record=True, file=io.StringIO())
    assert report(tmp_path, console) == tmp_path / "sweep.json"
    assert "job 0 interrupted: model=mlp seed=3" in console.export_text()
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [one["status"] for one in found["unfinished"]] == ["interrupted"]
    assert "1 of 1 jobs have no result" in (tmp_path / "sweep.md").read_text()
