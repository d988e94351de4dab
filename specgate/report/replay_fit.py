"""What a replay's policies learn from training documents, small enough to travel with the script.

Letters: L MoE layers, E experts of a layer, C slots of a layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from specgate.policy.distances import miss_curves_LC
from specgate.policy.reuse import fit_reuse
from specgate.policy.workload import join
from specgate.report.simulate_trace import documents_of
from specgate.runtime.store import ExpertStore
from specgate.traces.datamodule import RoutingDataModule

DOCUMENTS = 100
"""Of the training split, that are read at most."""


@dataclass(frozen=True)
class Fitted:
    """Reuse of experts in training documents.

    Attributes:
        half_life, intercept, slope: see :class:`specgate.policy.reuse.Reuse`.
        top_k: experts per token. events: calls that were counted.
        misses_C: of LRU caches with so many slots in each layer, 0 to E, over all layers.
        uses_LE: calls that used each expert.
    """

    half_life: float
    intercept: float
    slope: float
    top_k: int
    events: int
    misses_C: list[int]
    uses_LE: list[list[int]]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def discount(self, slots: int) -> float:
        """Of value per event: the share of slots that an event does not hand over, with so many in all."""
        layers, experts = len(self.uses_LE), len(self.misses_C) - 1
        per_layer = min(max(slots // layers, self.top_k), experts)
        handed_over = self.misses_C[per_layer] if per_layer < experts else 0
        return min(max(1.0 - handed_over / max(self.events * per_layer * layers, 1), 0.0), 1.0)

    def tell(self, store: ExpertStore, eviction: str) -> None:
        """Hands a store what its eviction needs."""
        if eviction == "static":
            store.set_weights(torch.tensor(self.uses_LE))
        if eviction == "priced":
            store.set_reuse(self.half_life, self.discount(store.num_slots), self.intercept, self.slope)


def fit(data: RoutingDataModule) -> Fitted:
    """Reads the training documents of a trace.

    Raises:
        ConfigError: there are none.
    """
    train = join(documents_of(data, "train", DOCUMENTS)["none"])
    reuse = fit_reuse(train, train.layers * train.experts)
    return Fitted(
        reuse.half_life,
        reuse.intercept,
        reuse.slope,
        train.top_k,
        train.events,
        [int(n) for n in miss_curves_LC(train).sum(0)],
        train.use_counts_LE().tolist(),
    )
