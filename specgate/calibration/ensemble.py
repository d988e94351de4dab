"""Ensembles from files: which checkpoints a configuration means, and how much each member's word counts.

Letters: M members, N (event, expert) cells, Q kinds of target, H horizons, E experts per layer, K experts per
token, B sequences, T tokens, P source points.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specgate.calibration.fit import MAX_LOGITS
from specgate.calibration.load import check_compatible, find_checkpoint, load_predictor
from specgate.calibration.temperature import Reservoir
from specgate.errors import CheckpointError, ConfigError, NotApplicableError
from specgate.predictors.base import Predictor, batch_chunks
from specgate.predictors.ensemble import Ensemble
from specgate.traces.batch import KINDS, RoutingBatch, targets
from specgate.traces.datamodule import RoutingDataModule

FINISHED = "predictor.ckpt"


class EnsembleOfCheckpoints(Ensemble):
    """An :class:`Ensemble` that ``conf/model/ensemble.yaml`` describes: it reads its members' files and fits
    its weights. What it saves is an ``ensemble`` that needs neither.
    """

    @classmethod
    def resolve(cls, values: dict[str, Any], data: RoutingDataModule) -> dict[str, Any]:
        """Load what ``checkpoints`` names (see :func:`member_files`).

        Raises:
            ConfigError: if it names fewer than two.
            CheckpointError: if one cannot be loaded or is of another stack or phase than ``data``.
        """
        files = member_files(values.pop("checkpoints", None) or [])
        members = load_members(files)
        for label, member in members.items():
            try:
                check_compatible(member, data.spec)
            except CheckpointError as error:
                raise CheckpointError(f"member {label}: {error}") from None
        return values | {"members": list(members.values()), "labels": list(members)}

    def fit_on_validation(
        self, batches: Iterable[RoutingBatch], device: torch.device | str | None = None
    ) -> list[dict[str, Any]]:
        """Fit the weights if ``combine`` is ``stacking``."""
        return fit_stacking(self, batches, device) if self.combine == "stacking" else []


def member_files(checkpoints: str | Path | Sequence[str | Path]) -> list[Path]:
    """The checkpoint files that a list of paths means, in its order.

    Each is a ``.ckpt`` file, a run's directory, the directory of a multirun (all its jobs, 0, 1, 2, ...) or a
    glob of any of these.

    Raises:
        ConfigError: if nothing is named, or a checkpoint is named twice.
        CheckpointError: if a path or glob leads nowhere, or a multirun has a job without a predictor.
    """
    named = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if not named:
        raise NotApplicableError(
            "model.checkpoints names nothing: give the members' runs, e.g. model.checkpoints=[RUN,RUN]"
        )
    files: list[Path] = []
    for one in named:
        paths = [Path(one)]
        if not Path(one).exists() and glob.has_magic(str(one)):
            paths = sorted((Path(found) for found in glob.glob(str(one))), key=_natural)
            paths = [path for path in paths if path.is_dir() or path.suffix == ".ckpt"]
            if not paths:
                raise CheckpointError(f"no run or .ckpt file is named like {one}: check the path")
        files += [file for path in paths for file in _files_of(path)]
    for i, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:i]]:
            raise ConfigError(f"member {file} is named twice: name each checkpoint once")
    return files


def _files_of(path: Path) -> list[Path]:
    """The jobs' predictors of a multirun's directory, or the one checkpoint that ``path`` means."""
    jobs = sorted((job for job in path.glob("*") if job.is_dir()), key=_natural)
    multirun = (path / "multirun.yaml").is_file()
    finished = [job for job in jobs if (job / FINISHED).is_file()]
    if not multirun and ((path / FINISHED).is_file() or len(finished) < 2):
        return [find_checkpoint(path)]
    if multirun:
        missing = [job.name for job in jobs if job not in finished and (job / ".hydra").is_dir()]
        if missing or not finished:
            raise CheckpointError(
                f"{path} has no {FINISHED} of job {', '.join(missing) or '0'}: let it finish, run it again,"
                " or name the members one by one"
            )
    return [job / FINISHED for job in finished]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts 9 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def load_members(files: Sequence[Path]) -> dict[str, Predictor]:
    """The predictors in ``files`` by a label each: its name and its run's directory.

    Raises:
        CheckpointError: see :func:`load_predictor`.
    """
    found: dict[str, Predictor] = {}
    for i, file in enumerate(files):
        member = load_predictor(file)
        folder = file.parent.parent if file.parent.name == "checkpoints" else file.parent
        label = f"{member.name} ({folder.name})"
        found[label if label not in found else f"{member.name} ({folder.name}, {i})"] = member
    return found


@torch.no_grad()
def fit_stacking(
    ensemble: Ensemble,
    batches: Iterable[RoutingBatch],
    device: torch.device | str | None = None,
    cells: int = 400_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Give an ensemble the weights of least negative log-likelihood, per kind of target and horizon.

    Args:
        batches: of the validation split.
        device: where to compute; default, where the ensemble is.
        cells: bound on the (event, expert) cells kept per kind and horizon. seed: of their sampling.

    Returns:
        One row per kind and horizon: ``events``, ``weights`` by member, ``nll`` with these weights, with
        equal ones, and of the best member alone (of the averaged forecast, before the ensemble's own
        calibration).
    """
    ensemble.to(device if device is not None else ensemble.device).eval()
    M, E = len(ensemble.members), ensemble.experts
    capacity = max(1, cells // (1 if ensemble.top_k == 1 else E))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[tuple[int, int], Reservoir] = {}
    per_token = (ensemble.layers + 1) * ensemble.lookahead * E * M
    for batch in batches:
        for chunk in batch_chunks(batch, max(1, MAX_LOGITS // (batch.valid_BT.shape[1] * per_token))):
            chunk = chunk.to(ensemble.device)
            experts_BTPHK, valid_BTPH = targets(chunk, ensemble.lookahead)
            p_BTPHME = torch.stack(list(ensemble.member_probabilities(chunk)), dim=-2)
            for q in KINDS:
                for h0 in range(ensemble.lookahead):
                    place_BTP = valid_BTPH[..., h0] & (ensemble.kinds[:, h0] == q)
                    if bool(place_BTP.any()):
                        sample = samples.setdefault((q, h0), Reservoir(capacity, generator))
                        used_NK = experts_BTPHK[..., h0, :][place_BTP]
                        sample.add(p_BTPHME[..., h0, :, :][place_BTP].flatten(1), used_NK)
    rows = []
    for (q, h0), sample in sorted(samples.items()):
        said_NM = given_to_what_happened(sample.logits_ME.view(-1, M, E), sample.used_MK)
        weight_M = simplex_weights(said_NM)
        ensemble.weight_QHM[q, h0] = weight_M.to(ensemble.weight_QHM)
        rows.append(
            {
                "kind": KINDS[q],
                "horizon": h0 + 1,
                "events": sample.seen,
                "weights": {
                    label: round(w, 6) for label, w in zip(ensemble.labels, weight_M.tolist(), strict=True)
                },
                "nll": round(mixture_nll(said_NM, weight_M), 6),
                "nll_equal_weights": round(mixture_nll(said_NM, torch.full((M,), 1 / M)), 6),
                "nll_best_member": round(float(-said_NM.log().mean(0).max()), 6),
            }
        )
    return rows


def given_to_what_happened(p_NME: Tensor, used_NK: Tensor) -> Tensor:
    """The probability that each member gave to what happened: ``[cells, M]`` float64.

    One cell per event (K = 1: that of the used expert) or per event and expert (K > 1: p if used, else
    1 - p). At least 1e-7, as in ``specgate.metrics``.
    """
    used_NME = torch.zeros_like(p_NME, dtype=torch.bool)
    used_NME.scatter_(-1, used_NK[:, None].expand(-1, p_NME.shape[1], -1), True)
    if used_NK.shape[-1] == 1:
        said_NM = p_NME[used_NME].view(p_NME.shape[:2])
    else:
        said_NM = torch.where(used_NME, p_NME, 1 - p_NME).transpose(1, 2).flatten(0, 1)
    return said_NM.double().clamp(min=1e-7)


def mixture_nll(said_NM: Tensor, weight_M: Tensor) -> float:
    """Mean of -ln of the weighted mean."""
    return float(-(said_NM @ weight_M.to(said_NM)).log().mean())


def simplex_weights(said_NM: Tensor, rounds: int = 2000, tolerance: float = 1e-9) -> Tensor:
    """Weights, none negative, adding up to 1, under which the mixture makes what happened most likely.

    Expectation maximisation (Dempster, Laird and Rubin, 1977) of the members' shares: the likelihood is
    concave in them and never falls from one round to the next.

    Args:
        said_NM: see :func:`given_to_what_happened`.
        rounds: at most so many. tolerance: stop when a round gains less, in nats per cell.
    """
    weight_M = torch.full((said_NM.shape[1],), 1 / said_NM.shape[1], dtype=said_NM.dtype)
    before = -float("inf")
    for _ in range(rounds):
        mixed_N = said_NM @ weight_M
        now = float(mixed_N.log().mean())
        if now - before < tolerance:
            break
        before = now
        weight_M = weight_M * (said_NM.T @ (1 / mixed_N)) / len(said_NM)
    return weight_M / weight_M.sum()
