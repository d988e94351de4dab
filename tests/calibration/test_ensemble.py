"""Which files an ensemble is made of, and its weights against a search over the simplex."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from specgate import load_predictor
from specgate.calibration.base import Calibrator
from specgate.calibration.ensemble import (
    EnsembleOfCheckpoints,
    fit_stacking,
    given_to_what_happened,
    load_members,
    member_files,
    mixture_nll,
    simplex_weights,
)
from specgate.errors import CheckpointError, ConfigError
from specgate.predictors.ensemble import Ensemble
from specgate.traces.batch import targets
from specgate.traces.datamodule import RoutingDataModule
from specgate.training import save_predictor
from tests.predictors.support import fitted, make_batch
from tests.predictors.test_ensemble import ensemble_of, said
from tests.test_configs import CONF, composed


def run_of(folder: Path, name: str = "popularity", job: bool = False) -> Path:
    """A finished run's directory."""
    save_predictor(fitted(name), folder / "predictor.ckpt")
    if job:
        (folder / ".hydra").mkdir()
    return folder


# --- files ---


def test_a_run_a_file_a_multirun_and_a_glob_name_checkpoints(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "sweep" / str(i), job=True) for i in (0, 1, 2, 10)]
    alone = run_of(tmp_path / "alone")
    jobs = [run / "predictor.ckpt" for run in runs]
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    assert member_files([tmp_path / "sweep", alone]) == [*jobs, alone / "predictor.ckpt"]
    assert member_files(f"{tmp_path}/sweep/*") == jobs
    assert member_files([f"{tmp_path}/sweep/[02]", str(alone / "predictor.ckpt")]) == [
        jobs[0],
        jobs[2],
        alone / "predictor.ckpt",
    ]
    (tmp_path / "sweep" / "multirun.yaml").unlink()  # several runs that somebody has put together
    assert member_files([str(tmp_path / "sweep")]) == jobs


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    run_of(tmp_path / "0", job=True), run_of(tmp_path / "1", job=True)
    (tmp_path / "2" / ".hydra").mkdir(parents=True)
    (tmp_path / "multirun.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"no predictor.ckpt of job 2: let it finish"):
        member_files(tmp_path)
    with pytest.raises(ConfigError, match="is named twice"):
        member_files([tmp_path / "0", tmp_path / "1", tmp_path / "0" / "predictor.ckpt"])
    with pytest.raises(ConfigError, match="names nothing"):
        member_files([])
    with pytest.raises(CheckpointError, match="is named like"):
        member_files(f"{tmp_path}/seed-*")
    with pytest.raises(CheckpointError, match="does not exist"):
        member_files(["/nowhere"])


def test_labels_tell_members_apart(tmp_path: Path) -> None:
    files = [run_of(tmp_path / folder) / "predictor.ckpt" for folder in ("0", "1", "a/0")]
    assert list(load_members(files)) == ["popularity (0)", "popularity (1)", "popularity (0, 2)"]


# --- weights ---


@pytest.mark.parametrize("K", [1, 2])
def test_what_members_gave_to_what_happened(K: int) -> None:
    g = torch.Generator().manual_seed(0)
    p = torch.rand(7, 3, 5, generator=g)
    used = torch.rand(7, 5, generator=g).topk(K).indices
    found = given_to_what_happened(p, used)
    want = []
    for n in range(7):
        cells = [int(used[n, 0])] if K == 1 else range(5)
        for e in cells:
            hit = e in used[n].tolist()
            want.append([float(p[n, m, e]) if hit else 1 - float(p[n, m, e]) for m in range(3)])
    np.testing.assert_allclose(found.numpy(), np.array(want), rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_the_best_of_the_simplex(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    said_NM = torch.rand(200, 3, generator=g, dtype=torch.float64) ** torch.tensor([1.0, 1.5, 1.2 + seed])
    weight = simplex_weights(said_NM)
    assert float(weight.min()) >= 0
    assert float(weight.sum()) == pytest.approx(1)
    mine, steps = mixture_nll(said_NM, weight), 60
    for i in range(steps + 1):
        for j in range(steps + 1 - i):
            other = torch.tensor([i, j, steps - i - j], dtype=torch.float64) / steps
            assert mine <= mixture_nll(said_NM, other) + 1e-6


def test_a_member_that_knows_takes_all_the_weight() -> None:
    said_NM = torch.tensor([[0.9, 0.2, 0.5]], dtype=torch.float64).expand(50, 3)
    torch.testing.assert_close(
        simplex_weights(said_NM), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("K", [1, 2])
def test_stacking_beats_equal_weights_and_every_member_where_it_was_fitted(K: int) -> None:
    ensemble = ensemble_of("mean", K=K)
    ensemble.combine = "stacking"
    batches = [make_batch(K=K, seed=s) for s in range(20, 26)]
    before = ensemble(batches[0])
    rows = fit_stacking(ensemble, batches)
    assert {(row["kind"], row["horizon"]) for row in rows} == {
        (kind, h) for kind in ("within", "wrapped", "entry") for h in (1, 2, 3)
    } - {("within", 3)}
    for row in rows:
        assert row["nll"] <= row["nll_equal_weights"] + 1e-6
        assert row["nll"] <= row["nll_best_member"] + 1e-6
        assert list(row["weights"]) == ensemble.labels
        assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(ensemble(batches[0]), before)
    # the number of events of one kind and horizon, counted otherwise
    wanted = sum(
        int((targets(b, 3)[1][..., 0] & (ensemble.kinds[:, 0] == 0)).sum()) for b in batches
    )  # fmt: skip
    (within,) = [row for row in rows if (row["kind"], row["horizon"]) == ("within", 1)]
    assert within["events"] == wanted
    assert said(ensemble, batches[0]).shape[0] == 3


# --- through train.py ---


QUICK = ["logger=none", "data.window=32", "data.batch_size=8", "threads=1", "trainer.max_epochs=1"]


def train(run: Path, trace: Path, *overrides: str) -> dict[str, Any]:
    import train as entry

    cfg = composed(CONF, "train", [f"data.traces={trace}", *QUICK, *overrides], run)
    entry.train(cfg, Console(quiet=True))
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_py_makes_an_ensemble_of_runs(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    trace, sweep = tiny_traces["olmoe"], tmp_path / "sweep"
    for i in range(2):
        train(sweep / str(i), trace, "model=mlp", "model.width=16", f"seed={i}", "test=false")
    train(tmp_path / "markov", trace, "model=markov", "test=false")
    members = f"model.checkpoints=[{sweep},{tmp_path / 'markov'}]"
    found = train(tmp_path / "run", trace, "model=ensemble", "model.combine=stacking", members)
    labels = ["mlp (0)", "mlp (1)", "markov (markov)"]
    assert all(list(row["weights"]) == labels for row in found["fitted_on_validation"])
    assert found["fitted_on_validation"]
    assert found["predictor_report"]["members"] == labels
    assert {row["predictor"] for row in found["rows"]} == {"ensemble"}
    assert {row["split"] for row in found["rows"]} == {"validation", "test"}
    assert all(row["calibrated"] for row in found["rows"])
    file = tmp_path / "run" / "predictor.ckpt"
    moved = file.rename(tmp_path / "alone.ckpt")
    for folder in ("sweep/0", "sweep/1", "markov"):
        (tmp_path / folder / "predictor.ckpt").unlink()
    again = load_predictor(moved)
    assert type(again) is Ensemble
    assert all(isinstance(one.calibrator, Calibrator) and one.calibrator.fitted for one in again._each())
    saved = {row["kind"]: row["weights"] for row in found["fitted_on_validation"] if row["horizon"] == 2}
    for kind, weights in again.report()["weights"].items():
        if kind in saved:
            assert weights[1] == pytest.approx(list(saved[kind].values()), abs=1e-5)


def test_a_multirun_of_seeds_is_an_ensemble(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    """The commands of docs/predictors.md: members by one multirun, together by its directory."""
    trace, sweep = tiny_traces["olmoe"], tmp_path / "members"
    fixed = [f"data.traces={trace}", *QUICK, "test=false", "model.width=16"]
    command = [sys.executable, str(CONF.parent / "train.py"), "-m", "model=mlp", "seed=0,1"]
    done = subprocess.run(
        [*command, *fixed, f"hydra.sweep.dir={sweep}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = train(tmp_path / "run", trace, "model=ensemble", f"model.checkpoints=[{sweep}]", "test=false")
    assert found["predictor_report"]["members"] == ["mlp (0)", "mlp (1)"]
    ensemble = load_predictor(tmp_path / "run")
    batch = next(iter(RoutingDataModule(trace, window=32).val_dataloader()))
    assert isinstance(ensemble, Ensemble)
    assert float(ensemble.uncertainty(batch)["epistemic"].max()) > 0, "seeds differ"


def test_members_of_another_stack_are_refused(tiny_traces: dict[str, Path], tmp_path: Path) -> None:
    files = [run_of(tmp_path / name, name) for name in ("popularity", "markov")]
    data = RoutingDataModule(tiny_traces["olmoe"])
    with pytest.raises(CheckpointError, match=r"member popularity \(popularity\): .*layers=3 .*layers=4"):
        EnsembleOfCheckpoints.resolve({"checkpoints": files}, data)
    cfg = composed(CONF, "train", [f"data.traces={tiny_traces['olmoe']}", *QUICK, "model=ensemble"], tmp_path)
    import train as entry

    with pytest.raises(ConfigError, match=r"names nothing: give the members' runs"):
        entry.train(cfg, Console(quiet=True))
