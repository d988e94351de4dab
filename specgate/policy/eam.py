"""Expert activation matrices: past sequences whose use of experts resembles the running one tell what comes.

Letters: L MoE layers, E experts of a layer, R matrices of the library, N events, P points, H horizons.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.policy.base import ForecastSource, Policy, check_depth, check_slots
from specgate.policy.costs import Costs
from specgate.policy.rules import Rules
from specgate.policy.workload import Forecasts, Workload

Floats = NDArray[np.float64]


class ExpertActivationMatrices(Policy):
    """The ``eam`` policy (MoE-Infinity: Xue et al., 2024, arXiv:2401.14361).

    The library holds one matrix ``[L, E]`` of use counts per training document, thinned to ``capacity`` by
    k-means as in the paper. While a document runs, its own matrix so far is matched to the library by cosine;
    the nearest one's shares of steps are the forecast, and priority falls with the distance in layers. The
    cache evicts what the matched matrix says least of.

    Args:
        capacity: matrices kept.
        depth: horizons that are fetched ahead.
        foresight: horizons that the eviction looks at (more than one step are of no use).
        width: experts fetched of each horizon; None: as many as a token uses (K).
        least: shares below this are not forecast.
        seed: of the first choice of matrices.
    """

    name: ClassVar[str] = "eam"
    forecast_source: ClassVar[ForecastSource] = "eam"

    def __init__(
        self,
        capacity: int = 100,
        depth: int = 3,
        foresight: int = 12,
        width: int | None = None,
        least: float = 0.05,
        seed: int = 0,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity={capacity} keeps no matrix; choose 1 or more.")
        if width is not None and width < 1:
            raise ConfigError(f"width={width} fetches nothing; choose 1 or more, or null for K experts.")
        if not 0 <= least <= 1:
            raise ConfigError(f"least={least} is no share of steps; choose 0 to 1.")
        self.depth = check_depth(self.name, depth)
        self.foresight = max(check_depth(self.name, foresight, "foresight"), self.depth)
        self.capacity, self.width, self.least, self.seed = capacity, width, least, seed

    @property
    def horizons(self) -> int:
        return self.foresight

    def fit(self, train: Workload, costs: Costs, slots: int) -> Rules:
        check_slots(train, slots)
        width = self.width or train.top_k
        return Rules(eviction="forecast", prefetch="top", width=width, depth=self.depth)

    def foresee(self, train: Workload, workload: Workload) -> Forecasts:
        """What the nearest matrices of the training documents say, at every point of every document."""
        library_RLE = thin(matrices_of(train), self.capacity, self.seed)
        nearest_P = match(library_RLE, workload)
        L, H = workload.layers, self.foresight
        p_PHE = np.zeros((workload.points, H, workload.experts), dtype=np.float32)
        point_P = np.arange(workload.points) % (L + 1)
        step_P = np.arange(workload.points) // (L + 1)
        last_S = np.searchsorted(workload.document_S, workload.document_S, side="right") - 1
        for h in range(H):
            target_P = point_P + h
            decay = max(1.0 - h / L, 0.0)
            inside_P = step_P + target_P // L <= last_S[step_P]
            p_PHE[:, h] = library_RLE[nearest_P, target_P % L] * decay * inside_P[:, None]
        return Forecasts.from_dense(p_PHE.clip(0, 1), self.least)


def matrices_of(train: Workload) -> Floats:
    """Of each document, the share of its steps that use each expert: ``[documents, L, E]``."""
    L, E = train.layers, train.experts
    document_M = np.repeat(np.repeat(train.document_S, L), np.diff(train.event_start_N1)).astype(np.int64)
    counts = np.zeros((train.documents, L, E))
    np.add.at(counts, (document_M, train.event_layers_M(), train.expert_M), 1.0)
    return counts / np.bincount(train.document_S)[:, None, None]


def thin(matrices_RLE: Floats, capacity: int, seed: int, rounds: int = 20) -> Floats:
    """At most ``capacity`` matrices: the nearest to each centre of spherical k-means, as in the paper."""
    R = len(matrices_RLE)
    if capacity >= R:
        return matrices_RLE
    flat = matrices_RLE.reshape(R, -1)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    centre = unit[np.sort(np.random.default_rng(seed).permutation(R)[:capacity])]
    for _ in range(rounds):
        of_R = (unit @ centre.T).argmax(1)
        moved = np.zeros_like(centre)
        np.add.at(moved, of_R, unit)
        empty = np.linalg.norm(moved, axis=1) == 0
        moved[empty] = centre[empty]
        moved /= np.linalg.norm(moved, axis=1, keepdims=True)
        if np.allclose(moved, centre):
            break
        centre = moved
    return matrices_RLE[np.unique((unit @ centre.T).argmax(0))]


def match(library_RLE: Floats, workload: Workload) -> NDArray[np.int64]:
    """The library's matrix nearest by cosine to the document's own so far, at every point: int64 ``[P]``.

    Before a document has used any expert it is the matrix nearest to the library's mean. Scores are sums over
    the events so far, so that a point costs as little as one event's experts.
    """
    R, L, E = library_RLE.shape
    flat = library_RLE.reshape(R, L * E)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    block_M = workload.event_layers_M().astype(np.int64) * E + workload.expert_M
    start = int((unit @ flat.mean(0)).argmax())
    nearest_P = np.empty(workload.points, dtype=np.int64)
    for d in range(workload.documents):
        steps = np.nonzero(workload.document_S == d)[0]
        first, last = int(steps[0]), int(steps[-1]) + 1
        bounds = workload.event_start_N1[first * L : last * L + 1]
        score_MR = unit[:, block_M[bounds[0] : bounds[-1]]].T.cumsum(axis=0)
        after_NR = score_MR[bounds[1:] - bounds[0] - 1]  # of every event of the document
        best_N = np.concatenate([[start], after_NR.argmax(1)])
        point = np.arange((last - first) * (L + 1))
        nearest_P[first * (L + 1) : last * (L + 1)] = best_N[(point // (L + 1)) * L + point % (L + 1)]
    return nearest_P
