"""Loading a checkpoint: what comes back is what was saved, and nothing a bad file holds is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specgate.calibration.conformal import ConformalSets
from specgate.calibration.fit import CalibratorFitter
from specgate.calibration.load import check_compatible, find_checkpoint, load_predictor
from specgate.calibration.registry import CALIBRATORS
from specgate.errors import CheckpointError
from specgate.predictors.base import Predictor
from specgate.traces.batch import StackSpec
from tests.predictors.support import fitted, make_batch

SPEC = StackSpec(layers=3, experts=6, top_k=2, hidden_size=8, vocab_size=11, phase="decode")


def save(predictor: Predictor, path: Path) -> Path:
    torch.save({"state_dict": predictor.state_dict(), "hyper_parameters": dict(predictor.hparams)}, path)
    return path


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("name", ["markov", "mlp", "router_residual"])
@pytest.mark.parametrize("calibrator", [None, *CALIBRATORS])
def test_what_was_saved_comes_back(tmp_path: Path, name: str, calibrator: str | None) -> None:
    predictor = fitted(name)
    batch = make_batch("decode", B=6, T=12)
    if calibrator is not None:
        CalibratorFitter(calibrator, cells=2000, conformal=True)(predictor, [batch])
    again = load_predictor(save(predictor, tmp_path / "x.ckpt"))
    assert type(again) is type(predictor)
    assert type(again.calibrator) is type(predictor.calibrator)
    if calibrator is not None:
        p = again.probabilities(batch)
        mine, theirs = predictor.get_submodule("conformal"), again.get_submodule("conformal")
        assert isinstance(mine, ConformalSets)
        assert isinstance(theirs, ConformalSets)
        assert torch.equal(theirs.sets(p, again.kinds, 0.8), mine.sets(p, predictor.kinds, 0.8))
    assert not again.training
    torch.testing.assert_close(again.probabilities(batch), predictor.eval().probabilities(batch))


def test_poisoned_checkpoint_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    trap, file = tmp_path / "executed", tmp_path / "poisoned.ckpt"
    predictor = fitted("popularity")
    torch.save(
        {
            "state_dict": predictor.state_dict(),
            "hyper_parameters": {**predictor.hparams, "extra": Malicious(trap)},
        },
        file,
    )
    with pytest.raises(CheckpointError, match=r"refused, nothing in it was run \(.*system.*\)"):
        load_predictor(file)
    assert not trap.exists()
    torch.load(file, weights_only=False)  # the trap does work: a careless loader would have stepped into it
    assert trap.exists()


def test_a_calibrator_of_another_version_is_refused(tmp_path: Path) -> None:
    predictor, file = fitted("popularity"), tmp_path / "x.ckpt"
    state = predictor.state_dict() | {"calibrator.spline_QHN": torch.zeros(3)}
    torch.save({"state_dict": state, "hyper_parameters": dict(predictor.hparams)}, file)
    with pytest.raises(CheckpointError, match=r"unknown calibrator \(buffers spline_QHN\)"):
        load_predictor(file)


def test_raw_pickle_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    trap, file = tmp_path / "executed", tmp_path / "raw.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Malicious(trap)}))
    with pytest.raises(CheckpointError, match="not a checkpoint or was cut short"):
        load_predictor(file)
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    whole = save(fitted("mlp"), tmp_path / "whole.ckpt").read_bytes()
    file = tmp_path / "cut.ckpt"
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt is (not a checkpoint or was cut short|damaged)"):
        load_predictor(file)


def test_missing_foreign_and_unknown_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt does not exist"):
        load_predictor(tmp_path / "nowhere.ckpt")
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"model": {"weight": torch.zeros(2)}}, foreign)
    with pytest.raises(CheckpointError, match="was not written by specgate"):
        load_predictor(foreign)
    torch.save([1, 2], foreign)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_predictor(foreign)
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("readme.txt", "no tensors here")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_predictor(foreign)
    predictor = fitted("popularity")
    torch.save(
        {"state_dict": {}, "hyper_parameters": {**predictor.hparams, "predictor": "crystal_ball"}}, foreign
    )
    with pytest.raises(CheckpointError, match="no predictor named 'crystal_ball'"):
        load_predictor(foreign)
    torch.save({"state_dict": {}, "hyper_parameters": dict(predictor.hparams)}, foreign)
    with pytest.raises(CheckpointError, match="does not fit the predictor 'popularity'"):
        load_predictor(foreign)
    torch.save({"state_dict": {}, "hyper_parameters": {**predictor.hparams, "odd": 1}}, foreign)
    with pytest.raises(CheckpointError, match="'odd'"):
        load_predictor(foreign)


def test_directory_of_a_run_means_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.ckpt file"):
        find_checkpoint(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").touch()
    assert find_checkpoint(tmp_path).name == "last.ckpt"
    (folder / "epoch=3.ckpt").touch()
    assert find_checkpoint(tmp_path).name == "epoch=3.ckpt"
    (folder / "epoch=4.ckpt").touch()
    with pytest.raises(CheckpointError, match="holds 2 checkpoints"):
        find_checkpoint(tmp_path)
    (folder / "best.ckpt").touch()
    assert find_checkpoint(tmp_path).name == "best.ckpt"
    assert find_checkpoint(folder / "epoch=4.ckpt").name == "epoch=4.ckpt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "layers=3 and the trace has layers=4"),
        ({"experts": 8}, "experts=6 and the trace has experts=8"),
        ({"top_k": 1}, "top_k=2 and the trace has top_k=1"),
        ({"phase": "prefill"}, "phase=decode and the trace has phase=prefill"),
        ({"hidden_size": None}, "size 8 and the trace serves none"),
        ({"hidden_size": 16}, "size 8 and the trace serves 16"),
        ({"vocab_size": 12}, "11 token ids and the trace has 12"),
    ],
)
def test_mismatching_trace_is_refused(change: dict[str, object], message: str) -> None:
    predictor = fitted("mlp")
    check_compatible(predictor, SPEC)
    with pytest.raises(CheckpointError, match=message):
        check_compatible(predictor, replace(SPEC, **change))  # type: ignore[arg-type]


def test_id_only_predictor_takes_any_hidden_size() -> None:
    check_compatible(fitted("mlp", hidden=False), replace(SPEC, hidden_size=64, vocab_size=5))
