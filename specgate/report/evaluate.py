"""Put a predictor's forecasts next to what was routed: one row of plain numbers per kind of target and
horizon.

Letters: B sequences, T tokens, P source points, H horizons, E experts per layer, K experts per token, L MoE
    layers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.data import DataLoader

from specgate.calibration.base import Calibrator
from specgate.calibration.fit import forecast_stream
from specgate.metrics import CalibrationMetrics, RoutingMetrics
from specgate.predictors.base import LinkCalibrator, Predictor
from specgate.traces.batch import RoutingBatch, targets
from specgate.traces.datamodule import RoutingDataModule

ORACLE = "oracle"
# In float32 sigmoid(40) is 1 and sigmoid(14) is 1 - 8e-7: certain, and still the heavier one first.
_FIRST, _CERTAIN = 40.0, 14.0


class Oracle(Predictor):
    """Knows what will be routed. It goes through the same code as every predictor, so that its row proves the
    metrics.
    """

    name = ORACLE
    learned = False

    def forward(self, batch: RoutingBatch) -> Tensor:
        """Large logits for experts that will be used, the host's rank-1 expert first: ``[B, T, P, H, E]``."""
        experts_BTPHK, _ = targets(batch, self.lookahead)
        logits_BTPHE = torch.full(
            (*experts_BTPHK.shape[:-1], self.experts), -_FIRST, device=experts_BTPHK.device
        )
        logits_BTPHE.scatter_(-1, experts_BTPHK, _CERTAIN)
        return logits_BTPHE.scatter_(-1, experts_BTPHK[..., :1], _FIRST)


def make_oracle(data: RoutingDataModule, horizons: int) -> Oracle:
    """The perfect forecast for the stack and phase that ``data`` serves."""
    spec = data.spec
    return Oracle(
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
        vocab_size=spec.vocab_size,
        phase=spec.phase,
        bidirectional=spec.bidirectional,
        lookahead=horizons,
    )


def evaluate(
    predictor: Predictor,
    batches: Iterable[RoutingBatch],
    *,
    labels: Mapping[str, Any],
    domains: Sequence[str] = ("all",),
    device: torch.device | str | None = None,
    bins: int = 20,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Score a predictor on batches, before and after its calibrator.

    Args:
        labels: what to write in front of every row: ``trace``, ``model``, ``stack``, ``phase``, ``split``
            and, if it is not ``predictor.name``, ``predictor``.
        domains: names of the domains that ``batch.domain_B`` counts.
        device: where to compute; default, where the predictor is.
        bins: calibration bins.
        progress: show a bar with the remaining time.

    Returns:
        Rows as plain JSON values, ordered by kind and horizon: the labels, ``learned``, ``layers``,
        ``experts``, ``top_k``, ``kind``, ``horizon``, the scores of ``specgate.metrics`` and the same
        calibration figures of the bare link as ``ece_uncalibrated``, ``nll_uncalibrated``,
        ``mean_confidence_uncalibrated``, ``reliability_uncalibrated``; ``calibrated`` says whether a fitted
        calibrator was used.
    """
    shape = (predictor.layers, predictor.experts, predictor.top_k, predictor.lookahead, list(domains), bins)
    after, before = RoutingMetrics(*shape), CalibrationMetrics(*shape)
    bare = LinkCalibrator(predictor.top_k)
    twice = not isinstance(predictor.calibrator, LinkCalibrator)  # else both are the same forecasts
    name = str(labels.get("predictor", predictor.name))
    started = time.perf_counter()
    for batch, logits_BTPHE in forecast_stream(predictor, _with_progress(batches, name, progress), device):
        place = logits_BTPHE.device
        if after.device != place:
            after.to(place), before.to(place)
        truth = (*targets(batch, predictor.lookahead), predictor.kinds.to(place), batch.domain_B)
        after.update(predictor.calibrator(logits_BTPHE, predictor.kinds), *truth)
        if twice:
            before.update(bare(logits_BTPHE.float(), predictor.kinds), *truth)
    seconds = time.perf_counter() - started
    fitted = isinstance(predictor.calibrator, Calibrator) and predictor.calibrator.fitted
    front = {
        **labels,
        "predictor": name,
        "learned": predictor.learned,
        "calibrated": fitted,
        "layers": predictor.layers,
        "experts": predictor.experts,
        "top_k": predictor.top_k,
        "seconds": round(seconds, 3),
    }
    return list(_rows(front, after, before if twice else after))


def _rows(
    front: Mapping[str, Any], after: CalibrationMetrics, before: CalibrationMetrics
) -> Iterator[dict[str, Any]]:
    raw = before.compute()
    for kind, horizons in after.compute().items():
        for horizon, scores in horizons.items():
            bare = raw[kind][horizon]
            yield {
                **front,
                "kind": kind,
                "horizon": horizon,
                **scores,
                "ece_uncalibrated": bare["ece"],
                "nll_uncalibrated": bare["nll"],
                "mean_confidence_uncalibrated": bare["mean_confidence"],
                "reliability_uncalibrated": bare["reliability"],
            }


def labels_of(data: RoutingDataModule, trace: str | None = None, split: str = "test") -> dict[str, str]:
    """The labels of rows on the trace that ``data`` serves; ``trace`` is its name, by default its
    directories'.
    """
    return {
        "trace": trace or "+".join(path.name for path in data.paths),
        "model": "+".join(dict.fromkeys(reader.header.model_id for reader in data.readers)),
        "stack": data.stack,
        "phase": data.phase,
        "split": split,
    }


def open_split(data: RoutingDataModule, split: str) -> DataLoader[RoutingBatch]:
    """The loader of ``test`` (the locked split) or ``validation``."""
    return data.test_dataloader() if split == "test" else data.val_dataloader()


def evaluate_data(
    predictor: Predictor,
    data: RoutingDataModule,
    *,
    split: str = "test",
    trace: str | None = None,
    name: str | None = None,
    device: torch.device | str | None = None,
    bins: int = 20,
    progress: bool = True,
    batches: Iterable[RoutingBatch] | None = None,
) -> list[dict[str, Any]]:
    """:func:`evaluate` on one split of a data module; ``split="test"`` opens the locked one.

    Args:
        batches: the split's loader, if it is open already.
        trace: name of the trace in the rows; default, directory/stack/phase.
        name: name of the predictor in the rows; default, ``predictor.name``.
    """
    batches = batches if batches is not None else open_split(data, split)
    labels = labels_of(data, trace, split) | {"predictor": name or predictor.name}
    return evaluate(
        predictor,
        batches,
        labels=labels,
        domains=data.domains,
        device=device,
        bins=bins,
        progress=progress,
    )


def _with_progress(batches: Iterable[RoutingBatch], description: str, show: bool) -> Iterator[RoutingBatch]:
    """The same batches with a bar that says how long it will still take, gone when done."""
    total = len(batches) if isinstance(batches, Sized) else None
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not (show and sys.stdout.isatty())) as bar:
        yield from bar.track(batches, total=total, description=description)
