"""Load a predictor's checkpoint with its calibrator: tensors and plain values only, no code from the file is
run.

A checkpoint names its class through the registry and gives plain hyperparameters;
``torch.load(weights_only=True)`` refuses everything else before it is built.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from specgate.calibration.conformal import ConformalSets
from specgate.calibration.registry import restore_calibrator
from specgate.errors import CheckpointError, SpecgateError
from specgate.predictors.base import Predictor
from specgate.predictors.quantize import prepare_packed
from specgate.predictors.registry import predictor_class
from specgate.traces.batch import StackSpec

_PREFERRED = ("model.ckpt", "predictor.ckpt", "best.ckpt")
_CALIBRATOR, _CONFORMAL = "calibrator.", "conformal."


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that ``path`` means: itself, or the one of a run's directory.

    In a directory ``model.ckpt``, ``predictor.ckpt`` and ``best.ckpt`` are looked for in this order, at
    any depth; without them it must hold exactly one ``.ckpt`` besides ``last.ckpt``.

    Raises:
        CheckpointError: if there is none, or several and no way to choose.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist: give a .ckpt file or a run's directory")
    found = sorted(path.rglob("*.ckpt"))
    for name in _PREFERRED:
        named = [file for file in found if file.name == name]
        if len(named) == 1:
            return named[0]
    others = [file for file in found if file.name != "last.ckpt"] or found
    if len(others) == 1:
        return others[0]
    if not others:
        raise CheckpointError(
            f"{path} holds no .ckpt file: give the output directory of a finished train.py run"
        )
    names = ", ".join(str(file.relative_to(path)) for file in others[:5])
    raise CheckpointError(f"{path} holds {len(others)} checkpoints ({names}, ...): name one of them")


def load_predictor(path: str | Path, device: torch.device | str = "cpu") -> Predictor:
    """A trained predictor, in evaluation mode, with the calibrator it was saved with.

    Args:
        path: a ``.ckpt`` file, or the directory of a run (see :func:`find_checkpoint`).
        device: where to put it.

    Raises:
        CheckpointError: if the file is missing, truncated, poisoned (it holds anything but tensors and plain
            values), not from specgate, of an unknown predictor, or does not fit its class.
    """
    file = find_checkpoint(path)
    saved = read_checkpoint(file)
    hparams, state = saved.get("hyper_parameters"), saved.get("state_dict")
    if not isinstance(hparams, dict) or not isinstance(state, dict) or "predictor" not in hparams:
        raise CheckpointError(
            f"{file} was not written by specgate (it names no predictor): train one with train.py"
        )
    cls = predictor_class(str(hparams["predictor"]))
    try:
        predictor = cls(**hparams)
        for prefix, part in predictors_in(predictor):
            if saved_calibrator := _below(prefix + _CALIBRATOR, state):
                part.calibrator = restore_calibrator(saved_calibrator, part)
            if _below(prefix + _CONFORMAL, state):
                part.add_module("conformal", ConformalSets(part.lookahead, part.experts))
        if isinstance(saved.get("quantization"), dict):
            prepare_packed(predictor, state, **saved["quantization"])
        predictor.load_state_dict(state)
    except SpecgateError:
        raise
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} does not fit the predictor {hparams['predictor']!r} of this version ({reason}): "
            "train it again"
        ) from error
    return predictor.eval().to(device)


def predictors_in(predictor: Predictor) -> list[tuple[str, Predictor]]:
    """The predictor itself and those it is made of (an ensemble's members), each with the prefix of its keys
    in the state.
    """
    modules = predictor.named_modules()
    return [(f"{name}." if name else "", part) for name, part in modules if isinstance(part, Predictor)]


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state whose keys begin with ``prefix``, under the keys' rest."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint file, read without ever building an object that the file names.

    Raises:
        CheckpointError: if the file is missing, truncated, poisoned or no checkpoint.
    """
    if not file.is_file():
        raise CheckpointError(f"checkpoint {file} does not exist: give a .ckpt file or a run's directory")
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} is not a checkpoint or was cut short (no complete archive): copy it again or train again"
        )
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds something other than tensors and plain values and was refused, nothing in it was "
            f"run ({_blocked(error)}): do not trust this file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file} is damaged ({str(error).splitlines()[0]}): copy it again or train again"
        ) from None
    if not isinstance(saved, dict):
        raise CheckpointError(
            f"{file} holds a {type(saved).__name__}, not a checkpoint: train one with train.py"
        )
    return saved


def _blocked(error: Exception) -> str:
    """The name that the unpickler refused, if its message says so."""
    for line in str(error).splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return line.strip().removeprefix("WeightsUnpickler error: ")[:120]
    return "refused by the weights-only reader"


def check_compatible(predictor: Predictor, spec: StackSpec) -> None:
    """Refuse to use a predictor on a trace of another shape or phase.

    Args:
        spec: ``RoutingDataModule.spec``.

    Raises:
        CheckpointError: naming the first value that differs.
    """
    for name in ("layers", "experts", "top_k", "phase"):
        have, want = getattr(predictor, name), getattr(spec, name)
        if have != want:
            raise CheckpointError(
                f"{predictor.name} was trained for {name}={have} and the trace has {name}={want}: "
                "use the trace it was trained on, or train on this one"
            )
    if predictor.hidden_size is not None and spec.hidden_size != predictor.hidden_size:
        raise CheckpointError(
            f"{predictor.name} was trained on hidden states of size {predictor.hidden_size} and the trace "
            f"serves {spec.hidden_size or 'none'}: collect with hidden states, or train with "
            "data.use_hidden=false"
        )
    if spec.vocab_size > predictor.vocab_size:
        raise CheckpointError(
            f"{predictor.name} was trained for {predictor.vocab_size} token ids and the trace has "
            f"{spec.vocab_size}: it comes from another tokenizer, train on this trace"
        )
