"""The documents of a trace as a replay runs them, and what is foreseen at each point of them.

Letters: T tokens of a document, L MoE layers, P = L + 1 source points, H horizons, E experts, K experts per
token. Point p = 0 is before the first MoE layer, p = l + 1 is once layer l's router has chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specgate.calibration.load import check_compatible
from specgate.errors import ConfigError
from specgate.predictors.base import Predictor
from specgate.traces.batch import INVALID, RoutingBatch
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.windows import WindowDataset

SPLITS = ("test", "validation", "train")
NEAR, EVERY = 6, 6
"""Forecasts of more than so many layers ahead are renewed at every so-many-th point of a token only: they
change little from point to point, and there would be millions of them."""

#: What is asked for at one point: layer, horizon, (expert, probability) of each, most probable first.
Wanted = list[tuple[int, int, list[tuple[int, float]]]]
#: ``plan[t][p]``.
Plan = list[list[Wanted]]
#: The same of one point as a store takes it: blocks (layer * E + expert), their p, calls until each is due.
Asked = tuple[NDArray[np.uint32], NDArray[np.float64], NDArray[np.int64]]


@dataclass
class Document:
    """Tokens of a trace that are replayed one by one.

    Attributes:
        name: of the document.
        experts_TLK: their experts in rank order.
        weights_TLK: the router's weights of those.
        p_TPHE: what a predictor foresees, or None.
        plans: what is asked for ahead, by the kind of foresight.
    """

    name: str
    experts_TLK: list[list[list[int]]]
    weights_TLK: Tensor
    p_TPHE: Tensor | None = None
    plans: dict[str, Plan] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.experts_TLK)

    def events(self) -> list[tuple[int, list[int]]]:
        """All calls in order: layer and experts."""
        return [(layer, experts) for token in self.experts_TLK for layer, experts in enumerate(token)]


def choose_windows(data: RoutingDataModule, split: str, count: int, tokens: int) -> list[RoutingBatch]:
    """``count`` windows of a split, spread evenly over those that have ``tokens`` scored tokens.

    Raises:
        ConfigError: if there are not so many, or the data set is held in a device's memory.
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
        raise ConfigError(
            f"data.cache={data.cache} is not for a replay, which reads few windows; leave it out."
        )
    long_W = np.nonzero(dataset.table.length >= tokens)[0]
    if len(long_W) < count:
        longest = int(dataset.table.length.max())
        raise ConfigError(
            f"The {split} split has {len(long_W)} windows of {tokens} tokens (the longest has {longest}), "
            f"and {count} are asked for; choose fewer documents or tokens, or a larger data.window."
        )
    picked = long_W[np.linspace(0, len(long_W) - 1, count).round().astype(int)]
    return [dataset[int(index)] for index in picked]


def document_of(batch: RoutingBatch, tokens: int, name: str) -> tuple[Document, Tensor]:
    """The first ``tokens`` scored tokens of a window, and which tokens of the window they are."""
    keep_T = batch.mask_BT[0].nonzero().flatten()[:tokens]
    experts_TLK = batch.experts_BTLK[0, keep_T]
    return Document(name, experts_TLK.tolist(), batch.weights_BTLK[0, keep_T].float()), keep_T


def renewed_PH(P: int, H: int) -> Tensor:
    """Which horizons a point's forecast is read of, bool ``[P, H]``."""
    point_P1, horizon_H = torch.arange(P)[:, None], torch.arange(1, H + 1)
    return (horizon_H <= NEAR) | (point_P1 % EVERY == 0)


@torch.no_grad()
def foreseen(predictor: Predictor, batch: RoutingBatch, keep_T: Tensor) -> Tensor:
    """A predictor's probabilities at each point of a document: ``[T, P, H, E]``, float16, 0 where none is.

    Far horizons are foreseen where they are renewed (:func:`renewed_PH`), as in mode=simulate.

    Args:
        batch: the window, with its context.
        keep_T: its tokens that are replayed.
    """
    p_TPHE = predictor.probabilities(batch)[0, keep_T].float()
    known_PH = (predictor.kinds != INVALID).to(p_TPHE.device)
    known_PH &= renewed_PH(*known_PH.shape).to(p_TPHE.device)
    return torch.where(known_PH[..., None], p_TPHE.clamp(0, 1), 0.0).nan_to_num(0.0).half().cpu()


def forecast_plan(p_TPHE: Tensor, threshold: float) -> Plan:
    """What is asked for: every expert of at least ``threshold``, nearest horizon first."""
    T, P, _, _ = p_TPHE.shape
    layers = P - 1
    good_TPHE = (p_TPHE >= threshold) & (p_TPHE > 0)
    plan: Plan = [[[] for _ in range(P)] for _ in range(T)]
    found: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    for (t, p, h, e), value in zip(good_TPHE.nonzero().tolist(), p_TPHE[good_TPHE].tolist(), strict=True):
        found.setdefault((t, p, h), []).append((e, value))
    for (t, p, h), wanted in found.items():  # in ascending order of t, p, h
        plan[t][p].append(((p + h) % layers, h + 1, sorted(wanted, key=lambda pair: -pair[1])))
    return plan


def asked_of(plan: Plan, experts: int) -> list[list[Asked | None]]:
    """A plan in arrays, point by point in the same order; None where nothing is asked for."""

    def one(wanted: Wanted) -> Asked | None:
        flat = [(layer * experts + e, p, h) for layer, h, pairs in wanted for e, p in pairs]
        if not flat:
            return None
        blocks, ps, horizons = zip(*flat, strict=True)
        return np.array(blocks, np.uint32), np.array(ps, np.float64), np.array(horizons, np.int64)

    return [[one(wanted) for wanted in points] for points in plan]


def oracle_plan(document: Document, horizons: int) -> Plan:
    """What one asks for who knows the next ``horizons`` calls of the document."""
    events = document.events()
    layers = len(document.experts_TLK[0])
    plan: Plan = []
    for t in range(len(document)):
        points: list[Wanted] = []
        for point in range(layers + 1):
            first = t * layers + point
            coming = events[first : first + horizons]
            points.append(
                [(layer, h, [(e, 1.0) for e in experts]) for h, (layer, experts) in enumerate(coming, 1)]
            )
        plan.append(points)
    return plan


def load_documents(
    data: RoutingDataModule, split: str, count: int, tokens: int, predictor: Predictor | None = None
) -> list[Document]:
    """The documents of a trace, with what a predictor foresees of them.

    Raises:
        ConfigError: see :func:`choose_windows`.
        CheckpointError: if the predictor was made for another trace.
    """
    if predictor is not None:
        check_compatible(predictor, data.spec)
    documents = []
    for batch in choose_windows(data, split, count, tokens):
        document, keep_T = document_of(batch, tokens, data.documents[int(batch.document_B[0])])
        if predictor is not None:
            document.p_TPHE = foreseen(predictor, batch, keep_T)
        documents.append(document)
    return documents


def make_plans(documents: Sequence[Document], horizons: int, thresholds: Mapping[str, float]) -> None:
    """Gives the documents their plans: ``oracle``, and by name those of thresholds of the forecasts."""
    for document in documents:
        document.plans = {"oracle": oracle_plan(document, horizons)}
        for name, threshold in thresholds.items():
            if document.p_TPHE is not None:
                document.plans[name] = forecast_plan(document.p_TPHE, threshold)


def all_events(documents: Sequence[Document]) -> list[tuple[int, list[int]]]:
    """The calls of several documents, one after the other."""
    return [event for document in documents for event in document.events()]
