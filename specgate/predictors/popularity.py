"""How often each expert is used at the target layer, whatever happened before.

Letters: B sequences, T tokens, L MoE layers, P source points, H horizons, E experts per layer.

The frequency baseline of every paper on expert caching, e.g. Eliseev and Mazur, "Fast Inference of
Mixture-of-Experts Language Models with Offloading" (2023, arXiv:2312.17238).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from specgate.predictors.counting import CountingPredictor
from specgate.traces.batch import RoutingBatch


class Popularity(CountingPredictor):
    """The ``popularity`` predictor.

    Shapes:
        popularity_LE (buffer): uses counted over the training tokens. tokens_L (buffer): the tokens.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``, the same at every token (an expanded view).
    """

    name: ClassVar[str] = "popularity"

    def forward(self, batch: RoutingBatch) -> Tensor:
        B, T = batch.valid_BT.shape
        logits_PHE = self.link(self.prior_PHE())
        return logits_PHE.expand(B, T, *logits_PHE.shape)
