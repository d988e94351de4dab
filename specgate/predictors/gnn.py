"""Message passing over the host's experts: routing flows along measured, learned edges to those to come.

Letters: B sequences, T tokens, N = B * T tokens flat, L MoE layers, P = L + 1 source points, H horizons, E
experts per layer, K experts per token, F features of a node, C channels of an edge, Q message slots, S
(relation, target layer) pairs, W units.

Three kinds of messages, on the graph of :class:`~specgate.predictors.expert_graph.ExpertGraph`:

1. expert to expert, along all edges: graph attention makes of every expert a state that knows its measured
   neighbourhood. No token is involved, so it is computed once per batch, however long that is.
2. expert to token: a token collects the states of the experts it was routed to, by router weight.
3. token to expert: from the experts in use, along the edges of each type, to the target layer's experts;
   gates made from the token's hidden state, id and history say how much each type counts for this token.

A target's logit adds what arrives along (3), the match of the token's query with the expert's state from (1),
and the prior. Relational message passing (Schlichtkrull et al., 2018, arXiv:1703.06103) by PyTorch Geometric
(Fey and Lenssen, 2019, arXiv:1903.02428), attention after Brody et al. (2022, arXiv:2105.14491).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torch_geometric.nn import SimpleConv

from specgate.predictors.expert_graph import ExpertGraph, Relation, relations_of
from specgate.predictors.features import (
    PointFeatures,
    at_targets_BTPHE,
    column_PH,
    multi_hot_BTLE,
    points,
    shift_layer,
    shifted,
    stack_of,
)
from specgate.predictors.layers import PointLinear, lookup
from specgate.predictors.mlp import ENTRY_GAIN, PointMLP
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch


class Slot(NamedTuple):
    """Messages at (point, horizon) from the token ``tokens`` before, layer p - 1 - ``back``."""

    tokens: int
    back: int


OWN, BEFORE, EARLIER, LATER = Slot(0, 0), Slot(0, 1), Slot(1, 0), Slot(-1, 0)
VISITS = [Relation(1, 0), Relation(1, 1)]
"""While decoding: the edges from the last token that was at the target layer."""


class PointTrunk(PointMLP):
    """:class:`PointMLP` with ``outputs`` values per horizon, zero at the start, in place of logits.

    Shapes:
        forward: features ``[B, T, P, F]``, router weights ``[B, T, P, E]`` -> ``[B, T, P, H, outputs]``.
    """

    def __init__(
        self,
        points: int,
        size: int,
        width: int,
        depth: int,
        horizons: int,
        experts: int,
        outputs: int,
        dropout: float,
    ) -> None:
        super().__init__(points, size, width, depth, horizons, experts, dropout, 0.0)
        self.last = PointLinear(points, width, horizons * outputs, zero=True)
        self.experts = outputs


class GNN(RouterPrior):
    """The ``gnn`` predictor.

    Args:
        width, depth, dropout: of the MLP that turns what is known of a token into query and gates.
        token_dim, state_dim, decays, heads: see :class:`PointFeatures`.
        node_dim, graph_heads, graph_depth, edges, channels: see :class:`ExpertGraph`.
        message_dim: width of what a token collects from its experts.
        measure_tokens: training tokens counted for the graph before the first step.

    Shapes:
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.
    """

    name: ClassVar[str] = "gnn"
    pair_QLH: Tensor
    free_PH1: Tensor

    def __init__(
        self,
        *,
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        token_dim: int = 32,
        state_dim: int = 32,
        decays: list[float] | None = None,
        heads: int = 2,
        node_dim: int = 64,
        graph_heads: int = 4,
        graph_depth: int = 2,
        edges: int = 16,
        channels: int = 2,
        message_dim: int = 32,
        measure_tokens: int = 100_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        P, H, decode = self.layers + 1, self.lookahead, self.phase == "decode"
        self.measure_tokens = measure_tokens
        relations = relations_of(H, self.phase, self.bidirectional)
        self.graph = ExpertGraph(
            self.layers,
            self.experts,
            self.top_k,
            relations,
            decode,
            edges=edges,
            channels=channels,
            width=node_dim,
            heads=graph_heads,
            depth=graph_depth,
        )
        self.slots = [OWN, BEFORE] if decode else [OWN, BEFORE, EARLIER]
        if self.bidirectional:
            self.slots.append(LATER)
        self.register_buffer("pair_QLH", self._pairs(relations), persistent=False)
        self.features = PointFeatures(
            **stack_of(self, decays), token_dim=token_dim, state_dim=state_dim, heads=heads
        )
        self.collect = SimpleConv(aggr="sum")
        self.message = nn.Linear(node_dim, message_dim)
        sources = len(self.slots) + (len(VISITS) if decode else 0)
        self.gates = sources * channels
        seen = self.features.size + 2 * message_dim
        outputs = node_dim + self.gates
        self.trunk = PointTrunk(P, seen, width, depth, H, self.experts, outputs, dropout)
        free_PH = (self.kinds != WITHIN) | (self.host is None)
        self.register_buffer("free_PH1", free_PH[..., None].float(), persistent=False)
        gate_PHQC = torch.zeros(P, H, sources, channels)
        gate_PHQC[:, :, 0, 0] = 1.0 if self.top_k == 1 else 0.5  # where no router speaks: a Markov chain
        self.gate_PHG = nn.Parameter(gate_PHQC.flatten(2) * self.free_PH1)
        self.bias_PHE = nn.Parameter(torch.zeros(P, H, self.experts))
        self.entry_VF = nn.Embedding(self.vocab_size, H * self.experts)
        nn.init.zeros_(self.entry_VF.weight)

    def _pairs(self, relations: list[Relation]) -> Tensor:
        """Which (relation, target layer) pair leads from layer l to the target of horizon h in each slot, -1
        if none: ``[Q, L, H]``."""
        found = torch.full((len(self.slots), self.layers, self.lookahead), -1)
        for q, (tokens, back) in enumerate(self.slots):
            for h0 in range(self.lookahead):
                r = relations.index(Relation(tokens, h0 + 1 + back))
                for layer in range(back, self.layers):
                    if self.kinds[layer + 1, h0] != INVALID:
                        found[q, layer, h0] = self.graph.pair_RL[r, (layer + h0 + 1) % self.layers]
        return found

    # ------------------------------------------------------------------ measuring

    def on_train_start(self) -> None:
        """Measure the graph on training batches, in a fixed order, before the first step (once)."""
        if int(self.graph.measured) == 0:
            found = self.trainer.train_dataloader
            loader: Iterable[RoutingBatch] = _fresh(found) if isinstance(found, DataLoader) else found or []
            self.graph.measure((batch.to(self.device) for batch in loader), self.measure_tokens)

    def report(self) -> dict[str, Any]:
        """The graph: its size and the strength of its relations."""
        return {"graph": self.graph.report()}

    # ------------------------------------------------------------------ forecasting

    def forward(self, batch: RoutingBatch) -> Tensor:
        nodes_LEF = self.graph.nodes()
        features_BTPF, routed_BTPE = self.features(batch)
        seen = torch.cat([features_BTPF, *self.collected(batch, nodes_LEF)], dim=-1)
        out_BTPHF = self.trunk(seen, routed_BTPE)
        query_BTPHF, gate_BTPHG = out_BTPHF.split([nodes_LEF.shape[-1], self.gates], dim=-1)
        target = column_PH(self.layers, self.lookahead, nodes_LEF.device) % self.layers
        correction = torch.einsum("btphf,phef->btphe", query_BTPHF, nodes_LEF[target])
        correction = correction + self.propagated(batch, gate_BTPHG + self.gate_PHG)
        correction = correction + self.bias_PHE + self.graph.popularity_LE[target] * self.free_PH1
        entry_BTF = lookup(self.entry_VF, batch.token_ids_BT) * ENTRY_GAIN
        entry_BT1HE = entry_BTF.view(*entry_BTF.shape[:2], 1, self.lookahead, self.experts)
        correction = torch.cat([correction[:, :, :1] + entry_BT1HE, correction[:, :, 1:]], dim=2)
        return self.corrected(batch, correction)

    def collected(self, batch: RoutingBatch, nodes_LEF: Tensor) -> list[Tensor]:
        """Messages from experts to tokens: of the point's own layer, and of all layers so far (mean):
        two of ``[B, T, P, F]``."""
        B, T, L = batch.experts_BTLK.shape[:3]
        weight_BTLK = batch.weights_BTLK.float() * batch.valid_BT[:, :, None, None]
        if batch.dropped_BTL is not None:
            weight_BTLK = weight_BTLK * ~batch.dropped_BTL[..., None]
        layer_L1 = torch.arange(L, device=nodes_LEF.device)[:, None]
        source_BTLK = batch.experts_BTLK + layer_L1 * self.experts
        target_BTL1 = torch.arange(B * T * L, device=nodes_LEF.device).view(B, T, L, 1)
        edges = torch.stack([source_BTLK.flatten(), target_BTL1.expand_as(source_BTLK).flatten()])
        nodes = (self.message(nodes_LEF.flatten(0, 1)), None)
        size = (L * self.experts, B * T * L)
        now_BTLF = self.collect(nodes, edges, weight_BTLK.flatten(), size).view(B, T, L, -1)
        sofar_BTLF = now_BTLF.cumsum(2) / (layer_L1 + 1)
        return [points(now_BTLF), points(sofar_BTLF)]

    def propagated(self, batch: RoutingBatch, gate_BTPHG: Tensor) -> Tensor:
        """What arrives at each target's experts along the edges, gated by slot and channel: ``[B, T, P, H,
        E]``.

        The tokens' many small graphs share one set of edges, so that sending along it is one dense product
        per source layer.
        """
        C, E, H = self.graph.channels, self.experts, self.lookahead
        adjacency_SECE = self.graph.adjacency()
        gate_BTPHQC = gate_BTPHG.unflatten(-1, (-1, C))
        # Even channels carry that an expert is in use, odd ones its router weight (times K).
        used_BTLE = multi_hot_BTLE(batch, E, weighted=False)
        values = [used_BTLE, multi_hot_BTLE(batch, E, weighted=True) * self.top_k][:C]
        total = gate_BTPHG.new_zeros(())
        for q, (tokens, back) in enumerate(self.slots):
            there_LH = self.pair_QLH[q] >= 0
            edges_LHECE = adjacency_SECE[self.pair_QLH[q].clamp(min=0)] * there_LH[..., None, None, None]
            for parity, value_BTLE in enumerate(values):
                source_BTLE = shifted(shift_layer(value_BTLE) if back else value_BTLE, tokens)
                edges_LEX = edges_LHECE[:, :, :, parity::2].transpose(1, 2).flatten(2)
                sent = source_BTLE.flatten(0, 1).transpose(0, 1) @ edges_LEX
                sent_BTLHCE = sent.transpose(0, 1).reshape(*source_BTLE.shape[:3], H, -1, E)
                total = total + (gate_BTPHQC[:, :, 1:, :, q, parity::2, None] * sent_BTLHCE).sum(-2)
        total = points(total)
        if self.phase == "decode":
            for i, relation in enumerate(VISITS):
                total = total + self._visit(
                    values, relation, adjacency_SECE, gate_BTPHQC, len(self.slots) + i
                )
        return total

    def _visit(
        self,
        values: list[Tensor],
        relation: Relation,
        adjacency_SECE: Tensor,
        gate_BTPHQC: Tensor,
        slot: int,
    ) -> Tensor:
        """Messages of the last token known to have been at the target layer (see
        :func:`at_targets_BTPHE`)."""
        pair_L = self.graph.pair_RL[self.graph.relations.index(relation)]
        edges_LECE = adjacency_SECE[pair_L].clone()
        if relation.layers:
            edges_LECE = (
                edges_LECE * (torch.arange(self.layers, device=pair_L.device) > 0)[:, None, None, None]
            )
        total = gate_BTPHQC.new_zeros(())
        for parity, value_BTLE in enumerate(values):
            source_BTLE = shift_layer(value_BTLE) if relation.layers else value_BTLE
            sent_BTLCE = torch.einsum("btle,lecf->btlcf", source_BTLE, edges_LECE[:, :, parity::2])
            sent_BTPHCE = at_targets_BTPHE(sent_BTLCE, self.lookahead)
            total = total + (gate_BTPHQC[..., slot, parity::2, None] * sent_BTPHCE).sum(-2)
        return total


def _fresh(loader: DataLoader[RoutingBatch]) -> DataLoader[RoutingBatch]:
    """The same windows in a fixed random order, read here, so that the loader in use is left alone."""
    dataset: Any = loader.dataset
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    return DataLoader(dataset, batch_size=loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)
