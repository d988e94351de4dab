"""The documents of a trace as workloads, with what a predictor foresees of them.

Letters: T tokens of a document, L MoE layers, P = L + 1 source points of a token, H horizons, E experts, K
experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from specgate.calibration.load import check_compatible
from specgate.errors import ConfigError
from specgate.policy.workload import NO_EXPERT, Forecasts, Workload, decoding
from specgate.predictors.base import Predictor
from specgate.report.replay_trace import SPLITS, renewed_PH
from specgate.traces.batch import INVALID
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.windows import WindowDataset

LEAST = 2.0**-9
"""Forecasts below this probability are left out: no price makes them worth fetching."""
WINDOWS = 16
"""Windows that a predictor reads at a time."""


@dataclass(frozen=True)
class Part:
    """A stretch of scored tokens: experts ``[T, L, K]`` (NO_EXPERT where a token was dropped) and, by name of
    the foresight, sparse forecasts.
    """

    experts_TLK: NDArray[np.int64]
    forecasts: dict[str, Forecasts]


def windows_of(data: RoutingDataModule, split: str) -> WindowDataset:
    """The windows of a split, in order.

    Raises:
        ConfigError: an unknown split, or a data set that is held in a device's memory.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split} is unknown; choose one of {', '.join(SPLITS)}.")
    loaders = {
        "test": data.test_dataloader,
        "validation": data.val_dataloader,
        "train": data.train_dataloader,
    }
    dataset = loaders[split]().dataset
    if not isinstance(dataset, WindowDataset):
        raise ConfigError(f"data.cache={data.cache} is not for a simulation, which reads once; leave it out.")
    return dataset


def choose_documents(dataset: WindowDataset, count: int | None, tokens: int | None) -> list[list[int]]:
    """Windows of each document, in order: ``count`` documents, spread evenly, of the first ``tokens`` tokens.

    Raises:
        ConfigError: if the split has none.
    """
    of: dict[int, list[int]] = {}
    for window, document in enumerate(dataset.table.document.tolist()):
        of.setdefault(document, []).append(window)
    documents = list(of.values())
    if not documents:
        raise ConfigError("This split of the trace has no documents; choose another split= or trace.")
    if count is not None and count < len(documents):
        picked = np.linspace(0, len(documents) - 1, count).round().astype(int)
        documents = [documents[i] for i in picked]
    if tokens is None:
        return documents
    kept = []
    for windows in documents:
        have, some = 0, []
        for window in windows:
            if have >= tokens:
                break
            some.append(window)
            have += int(dataset.table.length[window])
        kept.append(some)
    return kept


@torch.no_grad()
def read_windows(
    dataset: WindowDataset,
    windows: Sequence[int],
    predictors: dict[str, Predictor],
    device: torch.device,
    tick: Callable[[int], None] = lambda _: None,
) -> Iterator[Part]:
    """The scored tokens of each window, with the forecasts of each predictor.

    Args:
        predictors: by the name of the foresight.
        tick: told how many windows were read.
    """
    for first in range(0, len(windows), WINDOWS):
        some = list(windows[first : first + WINDOWS])
        batch = dataset.__getitems__(some)
        here = batch.to(device)
        found = {name: predictor.probabilities(here).float().cpu() for name, predictor in predictors.items()}
        for b in range(len(some)):
            keep_T = batch.mask_BT[b].nonzero().flatten()
            forecasts = {}
            for name, p_BTPHE in found.items():
                known_PH = (predictors[name].kinds != INVALID).cpu()
                known_PH &= renewed_PH(*known_PH.shape)
                p_TPHE = torch.where(known_PH[..., None], p_BTPHE[b, keep_T].clamp(0, 1), 0.0).nan_to_num(0.0)
                flat_PHE = p_TPHE.reshape(-1, *p_TPHE.shape[2:]).numpy()
                forecasts[name] = Forecasts.from_dense(flat_PHE, LEAST)
            experts_TLK = batch.experts_BTLK[b, keep_T]
            if batch.dropped_BTL is not None:  # over the capacity of its expert: no expert is run
                experts_TLK = experts_TLK.masked_fill(batch.dropped_BTL[b, keep_T, :, None], NO_EXPERT)
            yield Part(experts_TLK.numpy(), forecasts)
        tick(len(some))


def assemble(parts: Sequence[Part], experts: int, name: str, tokens: int | None) -> dict[str, Workload]:
    """One document from its parts, by the name of the foresight; ``none`` has no forecasts."""
    experts_TLK = np.concatenate([part.experts_TLK for part in parts])[:tokens]
    plain = decoding([experts_TLK], experts, [name])
    out = {"none": plain}
    for foresight in parts[0].forecasts if parts else ():
        whole = _concatenate([part.forecasts[foresight] for part in parts])
        out[foresight] = plain.with_forecasts(within(whole, plain))
    return out


def documents_of(
    data: RoutingDataModule,
    split: str,
    count: int | None = None,
    tokens: int | None = None,
    predictors: dict[str, Predictor] | None = None,
    device: torch.device | str = "cpu",
    tick: Callable[[int, int], None] = lambda _done, _all: None,
) -> dict[str, list[Workload]]:
    """The documents of a split, one workload each, by the name of the foresight (``none``: without).

    Args:
        count: that many documents, spread evenly; None: all.
        tokens: the first of each; None: all.
        predictors: by the name of the foresight.
        tick: told the windows read so far and in all.

    Raises:
        ConfigError: see :func:`windows_of` and :func:`choose_documents`.
        CheckpointError: a predictor that was made for another trace.
    """
    predictors, device = predictors or {}, torch.device(device)
    for predictor in predictors.values():
        check_compatible(predictor, data.spec)
        predictor.to(device).eval()
    dataset = windows_of(data, split)
    chosen = choose_documents(dataset, count, tokens)
    total, done = sum(map(len, chosen)), 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        tick(done, total)

    parts = read_windows(dataset, [w for windows in chosen for w in windows], predictors, device, progress)
    out: dict[str, list[Workload]] = {name: [] for name in ("none", *predictors)}
    for windows in chosen:
        name = data.documents[int(dataset.table.document[windows[0]])]
        mine = [next(parts) for _ in windows]
        for foresight, workload in assemble(mine, data.spec.experts, name, tokens).items():
            out[foresight].append(workload)
    return out


def _concatenate(parts: Sequence[Forecasts]) -> Forecasts:
    starts, at = [np.zeros(1, dtype=np.int64)], 0
    for part in parts:
        starts.append(part.start_P1[1:] + at)
        at += len(part.expert_M)
    return Forecasts(
        np.concatenate(starts),
        np.concatenate([part.horizon_M for part in parts]),
        np.concatenate([part.expert_M for part in parts]),
        np.concatenate([part.p_M for part in parts]),
    )


def within(forecasts: Forecasts, workload: Workload) -> Forecasts:
    """Those of the workload's points that are about an event of it."""
    L = workload.layers
    start_P1 = forecasts.start_P1[: workload.points + 1]
    point_M = np.repeat(np.arange(workload.points), np.diff(start_P1))
    M = len(point_M)
    horizon_M = forecasts.horizon_M[:M]
    event_M = (point_M // (L + 1)) * L + point_M % (L + 1) + horizon_M - 1
    keep_M = event_M < workload.events
    counts_P = np.bincount(point_M[keep_M], minlength=workload.points)
    out_P1 = np.zeros(workload.points + 1, dtype=np.int64)
    np.cumsum(counts_P, out=out_P1[1:])
    return Forecasts(out_P1, horizon_M[keep_M], forecasts.expert_M[:M][keep_M], forecasts.p_M[:M][keep_M])
