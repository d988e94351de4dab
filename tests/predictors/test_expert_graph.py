"""The graph of experts: what is measured, against a count by loops; what flows along its edges.

Letters: S (relation, target layer) pairs, L MoE layers, E experts, M edges into a node, C channels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch_geometric.nn import SimpleConv

from specgate.errors import ConfigError
from specgate.predictors.expert_graph import ExpertGraph, Relation, relations_of
from specgate.traces.batch import RoutingBatch
from tests.predictors.support import EXPERTS, LAYERS, make_batch

PSEUDO = 4.0


def make_graph(phase: str, K: int = 2, bidirectional: bool = False, **kwargs: int) -> ExpertGraph:
    """A graph of the tests' stack, for three horizons."""
    relations = relations_of(3, phase, bidirectional)
    settings = {"width": 8, "heads": 2} | kwargs
    return ExpertGraph(LAYERS, EXPERTS, K, relations, phase == "decode", **settings)


def link(p: float, K: int) -> float:
    return math.log(p) if K == 1 else math.log(p / (1 - p))


def counted(
    batches: list[RoutingBatch], relation: Relation, target: int, K: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Residual and lift of every (source, target) expert, by loops over tokens."""
    joint = [[0] * EXPERTS for _ in range(EXPERTS)]
    sources, uses, n = [0] * EXPERTS, [0] * EXPERTS, 0
    source, back = target - relation.layers, relation.tokens
    while source < 0:
        source, back = source + LAYERS, back + 1
    for batch in batches:
        for b in range(batch.mask_BT.shape[0]):
            for t in range(batch.mask_BT.shape[1]):
                s = t - back
                if not (0 <= s < batch.mask_BT.shape[1] and batch.mask_BT[b, t] and batch.valid_BT[b, s]):
                    continue
                n += 1
                for e in batch.experts_BTLK[b, s, source].tolist():
                    sources[e] += 1
                    for f in batch.experts_BTLK[b, t, target].tolist():
                        joint[e][f] += 1
                for f in batch.experts_BTLK[b, t, target].tolist():
                    uses[f] += 1
    prior = [(u + PSEUDO * K / EXPERTS) / (n + PSEUDO) for u in uses]
    residual = [
        [
            abs(joint[e][f] - sources[e] * prior[f]) / math.sqrt(sources[e] * prior[f] + 1)
            for f in range(EXPERTS)
        ]
        for e in range(EXPERTS)
    ]
    lift = [
        [
            link((joint[e][f] + PSEUDO * prior[f]) / (sources[e] + PSEUDO), K) - link(prior[f], K)
            for f in range(EXPERTS)
        ]
        for e in range(EXPERTS)
    ]
    return residual, lift


@pytest.mark.parametrize(
    ("phase", "K", "bidirectional"),
    [("decode", 2, False), ("prefill", 1, False), ("prefill", 2, True)],
)
def test_measured_edges_are_the_most_significant_of_a_plain_count(
    phase: str, K: int, bidirectional: bool
) -> None:
    batches = [make_batch(phase, K=K, seed=seed, context=2) for seed in range(2)]
    graph = make_graph(phase, K, bidirectional, edges=3)
    graph.measure(batches, tokens=10**6)
    assert int(graph.measured) == sum(int(batch.mask_BT.sum()) for batch in batches)
    for r, relation in enumerate(graph.relations):
        for target in range(LAYERS):
            s = int(graph.pair_RL[r, target])
            assert (s >= 0) == (phase == "decode" or target - relation.layers >= 0)
            if s < 0:
                continue
            residual, lift = counted(batches, relation, target, K)
            for f in range(EXPERTS):
                kept = graph.source_SEM[s, f].tolist()
                assert len(set(kept)) == 3
                weakest = min(residual[e][f] for e in kept)
                rest = [residual[e][f] for e in range(EXPERTS) if e not in kept]
                assert weakest >= max(rest) - 1e-4
                expected = torch.tensor([lift[e][f] for e in kept])
                torch.testing.assert_close(graph.lift_SEM[s, f], expected, rtol=1e-3, atol=1e-4)


def test_measuring_stops_at_its_budget_and_ignores_what_comes_after() -> None:
    first, second = make_batch("decode", seed=0), make_batch("decode", seed=1)
    a, b = make_graph("decode"), make_graph("decode")
    a.measure([first], tokens=10**6)
    b.measure([first, second], tokens=1)
    assert torch.equal(a.lift_SEM, b.lift_SEM)
    assert torch.equal(a.popularity_LE, b.popularity_LE)


def test_nothing_measured_leaves_the_ring() -> None:
    graph = make_graph("decode", edges=2)
    ring = graph.source_SEM.clone()
    nothing = replace(make_batch("decode"), mask_BT=torch.zeros(3, 8, dtype=torch.bool))
    graph.measure([nothing], tokens=100)
    assert int(graph.measured) == 0
    assert torch.equal(graph.source_SEM, ring)
    assert ring[0, 2].tolist() == [2, 3]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_adjacency_sends_what_message_passing_on_the_edges_sends(phase: str) -> None:
    graph = make_graph(phase, edges=4, channels=2)
    graph.measure([make_batch(phase, seed=seed) for seed in range(3)], tokens=10**6)
    x_LE = torch.rand(LAYERS, EXPERTS)
    pairs, M = graph.source_SEM.shape[0], 4
    edges_2SG = graph.edge_index().view(2, pairs, EXPERTS * M)
    weight_SGC = graph.weights().flatten(1, 2)
    dense_SECE = graph.adjacency()
    for s in range(pairs):
        into = int(graph.into_S[s])
        for c in range(2):
            arrived = SimpleConv(aggr="sum")(x_LE.view(-1, 1), edges_2SG[:, s], weight_SGC[s, :, c])
            sent_E = x_LE[graph.from_S[s]] @ dense_SECE[s, :, c]
            torch.testing.assert_close(sent_E, arrived.view(LAYERS, EXPERTS)[into])


def test_a_node_knows_its_neighbourhood_and_nothing_further() -> None:
    graph = make_graph("prefill", edges=2, depth=1)
    graph.measure([make_batch("prefill", seed=seed) for seed in range(3)], tokens=10**6)
    sources, targets = graph.edge_index()
    node = (LAYERS - 1) * EXPERTS + 1
    graph.nodes()[-1, 1].square().sum().backward()
    reached = graph.node_LEF.grad.abs().sum(-1).flatten() > 0  # type: ignore[union-attr]
    assert set(reached.nonzero().flatten().tolist()) == {node, *sources[targets == node].tolist()}


def test_layers_and_phases_that_edges_must_not_cross() -> None:
    graph = make_graph("prefill", edges=2)
    sources, targets = graph.edge_index()
    assert bool((sources // EXPERTS < targets // EXPERTS).all())
    assert Relation(-1, 1) in relations_of(2, "prefill", True)
    assert all(relation.tokens >= 0 for relation in relations_of(2, "prefill", False))
    assert Relation(1, 0) not in relations_of(2, "prefill", False)


def test_it_stays_small_at_48_layers_of_128_experts() -> None:
    relations = relations_of(3, "decode", False)
    graph = ExpertGraph(48, 128, 8, relations, True, edges=16, width=16, heads=2)
    edges = graph.edge_index().shape[1]
    assert edges == len(relations) * 48 * 128 * 16
    assert sum(p.numel() for p in graph.parameters()) < 2_000_000


def test_report_counts_every_edge_once() -> None:
    graph = make_graph("prefill", edges=2)
    report = graph.report()
    assert report["nodes"] == LAYERS * EXPERTS
    assert sum(row["edges"] for row in report["relations"]) == graph.edge_index().shape[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"width": 9}, "node_dim=9"), ({"edges": 0}, "edges=0"), ({"channels": 0}, "channels=0")],
)
def test_senseless_sizes_are_refused(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_graph("decode", **kwargs)
