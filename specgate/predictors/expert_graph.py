"""The graph of a host's experts: nodes (layer, expert); edges measured, typed, sparse and then learned.

Letters: B sequences, T tokens, L MoE layers, E experts per layer, R relations (edge types), S (relation,
target layer) pairs that exist, M edges into a node per relation, C channels of an edge, F features of a node,
G flat edges (S * E * M).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv
from torch_geometric.utils import scatter

from specgate.errors import ConfigError
from specgate.predictors.counting import used_BTCE
from specgate.predictors.features import shifted
from specgate.traces.batch import RoutingBatch


class Relation(NamedTuple):
    """An edge type: the source is routed ``tokens`` tokens and ``layers`` MoE layers before the target."""

    tokens: int
    layers: int


def relations_of(horizons: int, phase: str, bidirectional: bool) -> list[Relation]:
    """The edge types whose sources are known when a target has to be foreseen.

    The same token 1..H+1 layers earlier; while decoding also the previous token in the target's own layer and
    the one below; in prefill, where the previous token has not been there yet, its layers as far back as this
    token's; in a bidirectional stack the next token's too.
    """
    found = [Relation(0, d) for d in range(1, horizons + 2)]
    if phase == "decode":
        return [*found, Relation(1, 0), Relation(1, 1)]
    found += [Relation(1, d) for d in range(1, horizons + 1)]
    if bidirectional:
        found += [Relation(-1, d) for d in range(1, horizons + 1)]
    return found


class ExpertGraph(nn.Module):
    """Sparse typed edges between experts, and what is learned on them.

    An edge's weight is its measured lift (by how much the source's use changes the link of the target's
    probability) times a learned gain per relation and channel, plus a learned change of its own. Until
    :meth:`measure` was called it is a ring without any lift.

    Args:
        layers, experts, top_k: of the stack. relations: the edge types. wraps: whether layer 0 of the next
            token follows layer L - 1 (decode).
        edges: at most so many edges into a node per relation, the most significant ones.
        channels: weights per edge. width: F. heads: attention heads of a graph convolution. depth: graph
            convolutions.
        smoothing: pseudo-counts of a measured frequency towards the target's popularity.

    Shapes:
        source_SEM (buffer): ``[S, E, M]`` int64, the source expert of each edge into target expert E.
        lift_SEM (buffer): ``[S, E, M]``. popularity_LE (buffer): link of each expert's frequency.
        measured (buffer): tokens counted, 0 before.

    Raises:
        ConfigError: if ``width`` is not a multiple of ``heads``, or there would be no edge or channel.
    """

    source_SEM: Tensor
    lift_SEM: Tensor
    popularity_LE: Tensor
    measured: Tensor
    relation_S: Tensor
    from_S: Tensor
    into_S: Tensor
    pair_RL: Tensor

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        relations: list[Relation],
        wraps: bool,
        *,
        edges: int = 16,
        channels: int = 2,
        width: int = 64,
        heads: int = 4,
        depth: int = 2,
        smoothing: float = 4.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(
                f"node_dim={width} is not a multiple of graph_heads={heads}: choose one that is"
            )
        if edges < 1 or channels < 1:
            raise ConfigError(f"edges={edges}, channels={channels}: a graph needs at least 1 of each")
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.relations, self.smoothing, self.channels = relations, smoothing, channels
        pairs: list[tuple[int, int, int, int]] = []  # relation, target layer, source layer, token shift
        pair_RL = torch.full((len(relations), layers), -1)
        for r, (tokens, back) in enumerate(relations):
            for target in range(layers):
                wrapped, source = divmod(target - back, layers)
                if wraps or wrapped == 0:
                    pair_RL[r, target] = len(pairs)
                    pairs.append((r, target, source, tokens - wrapped))
        table = torch.tensor(pairs)
        for name, column in (("relation_S", 0), ("into_S", 1), ("from_S", 2)):
            self.register_buffer(name, table[:, column].clone(), persistent=False)
        self.shifts = [pair[3] for pair in pairs]
        self.register_buffer("pair_RL", pair_RL, persistent=False)
        S, E, M = len(pairs), experts, min(edges, experts)
        ring_EM = (torch.arange(E)[:, None] + torch.arange(M)) % E
        self.register_buffer("source_SEM", ring_EM.repeat(S, 1, 1))
        self.register_buffer("lift_SEM", torch.zeros(S, E, M))
        start = self.link(torch.full((layers, E), top_k / experts))
        self.register_buffer("popularity_LE", start)
        self.register_buffer("measured", torch.tensor(0))
        self.gain_RC = nn.Parameter(torch.ones(len(relations), channels))
        self.change_SEMC = nn.Parameter(torch.randn(S, E, M, channels) * 0.05)
        self.node_LEF = nn.Parameter(torch.randn(layers, E, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(depth)])
        self.convolutions = nn.ModuleList(
            [
                GATv2Conv(
                    width,
                    width // heads,
                    heads=heads,
                    edge_dim=len(relations) + 1,
                    add_self_loops=False,
                )
                for _ in range(depth)
            ]
        )

    def link(self, p: Tensor) -> Tensor:
        """Logits of probabilities: log p (K = 1) or logit p."""
        p = p.clamp(1e-6, 1 - 1e-6)
        return p.log() if self.top_k == 1 else torch.logit(p)

    # ------------------------------------------------------------------ measuring

    @torch.no_grad()
    def measure(self, batches: Iterable[RoutingBatch], tokens: int) -> None:
        """Count transitions in ``batches`` until ``tokens`` scored tokens were seen; keep the edges whose
        counts deviate most from independence (largest standardised residual, for or against)."""
        S, L, E = len(self.shifts), self.layers, self.experts
        device = self.lift_SEM.device
        joint_SEE = torch.zeros(S, E, E, device=device)
        source_SE, target_SE = torch.zeros(S, E, device=device), torch.zeros(S, E, device=device)
        seen_S, use_LE = torch.zeros(S, device=device), torch.zeros(L, E, device=device)
        count = 0
        for batch in batches:
            used_BTLE = used_BTCE(batch, E, L)
            use_LE += used_BTLE[batch.mask_BT].sum(0)
            for shift in sorted(set(self.shifts)):
                index_S = torch.tensor([s for s, by in enumerate(self.shifts) if by == shift], device=device)
                both_BT = batch.mask_BT & shifted(batch.valid_BT, shift)
                from_LNE = shifted(used_BTLE, shift)[both_BT].transpose(0, 1)
                into_LNE = used_BTLE[both_BT].transpose(0, 1)
                from_SNE, into_SNE = from_LNE[self.from_S[index_S]], into_LNE[self.into_S[index_S]]
                joint_SEE[index_S] += from_SNE.transpose(1, 2) @ into_SNE
                source_SE[index_S] += from_SNE.sum(1)
                target_SE[index_S] += into_SNE.sum(1)
                seen_S[index_S] += both_BT.sum()
            count += int(batch.mask_BT.sum())
            if count >= tokens:
                break
        if count:
            self._keep(joint_SEE, source_SE, target_SE, seen_S)
            uniform = self.top_k / E
            self.popularity_LE.copy_(
                self.link((use_LE + self.smoothing * uniform) / (count + self.smoothing))
            )
            self.measured.fill_(count)

    def _keep(self, joint_SEE: Tensor, source_SE: Tensor, target_SE: Tensor, seen_S: Tensor) -> None:
        uniform, pseudo = self.top_k / self.experts, self.smoothing
        prior_SE = (target_SE + pseudo * uniform) / (seen_S[:, None] + pseudo)
        expected_SEE = source_SE[:, :, None] * prior_SE[:, None]
        residual_SEE = (joint_SEE - expected_SEE).abs() / (expected_SEE + 1).sqrt()
        p_SEE = (joint_SEE + pseudo * prior_SE[:, None]) / (source_SE[:, :, None] + pseudo)
        lift_SEE = self.link(p_SEE) - self.link(prior_SE)[:, None]
        best_SME = residual_SEE.topk(self.source_SEM.shape[2], dim=1).indices
        self.source_SEM.copy_(best_SME.transpose(1, 2))
        self.lift_SEM.copy_(lift_SEE.gather(1, best_SME).transpose(1, 2))

    # ------------------------------------------------------------------ learning

    def edge_index(self) -> Tensor:
        """Every edge as (source node, target node), nodes counted ``layer * E + expert``: ``[2, G]``."""
        source_SEM = self.from_S[:, None, None] * self.experts + self.source_SEM
        target_E = torch.arange(self.experts, device=source_SEM.device)
        target_SE1 = self.into_S[:, None, None] * self.experts + target_E[:, None]
        return torch.stack([source_SEM.flatten(), target_SE1.expand_as(source_SEM).flatten()])

    def nodes(self) -> Tensor:
        """The experts' states after the graph convolutions: ``[L, E, F]``.

        GATv2 attention (Brody et al., 2022, arXiv:2105.14491) over all incoming edges, its edge features the
        relation (one-hot) and the measured lift. Nothing here depends on a token.
        """
        edge_index = self.edge_index()
        kind_SR = nn.functional.one_hot(self.relation_S, len(self.relations)).to(self.lift_SEM.dtype)
        kind_SEMR = kind_SR[:, None, None].expand(*self.lift_SEM.shape, -1)
        edge_GF = torch.cat([kind_SEMR, self.lift_SEM[..., None]], dim=-1).flatten(0, 2)
        x = self.node_LEF.flatten(0, 1)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = x + nn.functional.gelu(convolution(norm(x), edge_index, edge_GF))
        return x.view(self.layers, self.experts, -1)

    def weights(self) -> Tensor:
        """The edges' weights, lift times gain plus learned change: ``[S, E, M, C]``."""
        gain_SC = self.gain_RC[self.relation_S]
        return self.lift_SEM[..., None] * gain_SC[:, None, None] + self.change_SEMC

    def adjacency(self) -> Tensor:
        """The edges' weights laid out by (source, target) expert, zero where there is no edge, for the many
        tokens that share them: ``[S, E_source, C, E_target]``."""
        S, E = self.source_SEM.shape[:2]
        target_E = torch.arange(E, device=self.source_SEM.device)
        pair_S = torch.arange(S, device=self.source_SEM.device)
        place_SEM = (pair_S[:, None, None] * E + self.source_SEM) * E + target_E[:, None]
        flat = scatter(self.weights().flatten(0, 2), place_SEM.flatten(), dim=0, dim_size=S * E * E)
        return flat.view(S, E, E, self.channels).transpose(2, 3)

    def report(self) -> dict[str, Any]:
        """Size of the graph and strength of each relation, as plain values."""
        strength_S = self.lift_SEM.abs().mean((1, 2))
        rows = []
        for r, (tokens, back) in enumerate(self.relations):
            mine_S = self.relation_S == r
            if not bool(mine_S.any()):
                continue
            rows.append(
                {
                    "tokens_before": tokens,
                    "layers_before": back,
                    "edges": int(mine_S.sum()) * self.source_SEM[0].numel(),
                    "mean_abs_lift": round(float(strength_S[mine_S].mean()), 5),
                    "gain": [round(float(g), 5) for g in self.gain_RC[r].detach()],
                }
            )
        return {"nodes": self.layers * self.experts, "measured_tokens": int(self.measured), "relations": rows}
