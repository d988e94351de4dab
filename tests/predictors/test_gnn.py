"""``gnn``: messages along the edges against loops over tokens; the graph is measured before the first step.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts, C channels.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specgate.predictors.expert_graph import Relation
from specgate.predictors.gnn import GNN
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch
from tests.predictors.support import (
    EXPERTS,
    LAYERS,
    SMALL,
    fitted,
    loader,
    make_batch,
    make_predictor,
    trainer,
)


def make_gnn(phase: str = "decode", **kwargs: Any) -> GNN:
    """A fitted one with a measured graph."""
    predictor = fitted("gnn", phase, **kwargs)
    assert isinstance(predictor, GNN)
    K = predictor.top_k
    predictor.graph.measure([make_batch(phase, K=K, seed=seed) for seed in range(3)], 10**6)
    return predictor


def sent(model: GNN, batch: RoutingBatch, gate: Tensor, b: int, t: int, p: int, h0: int) -> Tensor:
    """What arrives at (t, p, h0), edge by edge from the rule's words: ``[E]``."""
    graph, decode = model.graph, model.phase == "decode"
    total, weights = torch.zeros(EXPERTS), graph.weights()
    column = p + h0
    target, layer = column % LAYERS, p - 1
    wanted: list[tuple[Relation, int, int]] = []  # relation, source token, source layer
    wanted.append((Relation(0, h0 + 1), t, layer))
    wanted.append((Relation(0, h0 + 2), t, layer - 1))
    if not decode:
        wanted.append((Relation(1, h0 + 1), t - 1, layer))
        if model.bidirectional:
            wanted.append((Relation(-1, h0 + 1), t + 1, layer))
    else:
        passed = column >= LAYERS and target <= layer
        visit = t if passed else t - 1
        wanted += [(Relation(1, 0), visit, target), (Relation(1, 1), visit, target - 1)]
    for q, (relation, s, source) in enumerate(wanted):
        if source < 0 or not 0 <= s < batch.valid_BT.shape[1] or not batch.valid_BT[b, s]:
            continue
        pair = int(graph.pair_RL[graph.relations.index(relation), target])
        for k, e in enumerate(batch.experts_BTLK[b, s, source].tolist()):
            dropped = batch.dropped_BTL is not None and bool(batch.dropped_BTL[b, s, source])
            weight = 0.0 if dropped else float(batch.weights_BTLK[b, s, source, k]) * model.top_k
            for f, m in (graph.source_SEM[pair] == e).nonzero().tolist():
                for c in range(graph.channels):
                    value = weight if c % 2 else 1.0
                    total[f] += gate[q * graph.channels + c] * value * weights[pair, f, m, c]
    return total


@pytest.mark.parametrize(
    ("phase", "K", "bidirectional"),
    [("decode", 2, False), ("decode", 1, False), ("prefill", 2, False), ("prefill", 1, True)],
)
def test_messages_are_those_of_the_edges(phase: str, K: int, bidirectional: bool) -> None:
    model = make_gnn(phase, K=K, channels=3, bidirectional=bidirectional)
    batch = make_batch(phase, B=2, T=4, K=K, padded=False)
    gate = torch.randn(2, 4, LAYERS + 1, 3, model.gates)
    with torch.no_grad():
        found = model.propagated(batch, gate)
        for t, p, h0 in [(t, p, h0) for t in range(4) for p in range(LAYERS + 1) for h0 in range(3)]:
            if model.kinds[p, h0] != INVALID:
                expected = sent(model, batch, gate[1, t, p, h0], 1, t, p, h0)
                torch.testing.assert_close(found[1, t, p, h0], expected, rtol=1e-4, atol=1e-5)


def test_tokens_collect_their_experts_states_by_weight() -> None:
    model, batch = make_gnn(), make_batch()
    with torch.no_grad():
        nodes = model.graph.nodes()
        now, sofar = model.collected(batch, nodes)
        b, t, total = 0, 3, torch.zeros(now.shape[-1])
        for layer in range(LAYERS):
            one = torch.zeros(now.shape[-1])
            for k, e in enumerate(batch.experts_BTLK[b, t, layer].tolist()):
                one += batch.weights_BTLK[b, t, layer, k] * model.message(nodes[layer, e])
            total += one
            torch.testing.assert_close(now[b, t, layer + 1], one, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(sofar[b, t, layer + 1], total / (layer + 1), rtol=1e-4, atol=1e-5)
    assert not now[:, :, 0].any()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("K", [1, 2])
def test_at_the_start_it_is_the_router_and_elsewhere_the_measured_chain(phase: str, K: int) -> None:
    model = make_predictor("gnn", phase, K=K, **SMALL["gnn"]).eval()
    assert isinstance(model, GNN)
    batch = make_batch(phase, K=K)
    model.graph.measure([batch], 10**6)
    found, router = model(batch), make_predictor("router_lookahead", phase, K=K)(batch)
    within = model.kinds == WITHIN
    torch.testing.assert_close(found[:, :, within], router[:, :, within])
    entry = model.graph.popularity_LE[:3]
    torch.testing.assert_close(found[0, 0, 0], entry.expand_as(found[0, 0, 0]))  # no previous token, no edge


def test_the_graph_is_measured_on_training_data_before_the_first_step(tmp_path: Path) -> None:
    train, other = [make_batch(seed=s) for s in range(4)], [make_batch(seed=9)]
    model = make_predictor("gnn", measure_tokens=10**6, **SMALL["gnn"])
    assert isinstance(model, GNN)
    expected = make_predictor("gnn", **SMALL["gnn"])
    assert isinstance(expected, GNN)
    expected.graph.measure(train, 10**6)
    seen: list[int] = []
    real = model.training_loss
    model.training_loss = lambda b: (seen.append(int(model.graph.measured)), real(b))[1]  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=1).fit(model, loader(train), loader(other))
    assert seen[0] == sum(int(b.mask_BT.sum()) for b in train)
    torch.testing.assert_close(model.graph.popularity_LE, expected.graph.popularity_LE)
    torch.testing.assert_close(model.graph.lift_SEM, expected.graph.lift_SEM)
    before = model.graph.lift_SEM.clone()
    trainer(tmp_path, max_epochs=1).fit(model, loader(other))  # goes on: measured once
    assert torch.equal(model.graph.lift_SEM, before)
    report = model.report()
    assert report["graph"]["measured_tokens"] == seen[0]
    assert json.loads(json.dumps(report)) == report


def test_a_bidirectional_stack_sees_the_next_token() -> None:
    batch = make_batch("prefill", padded=False)
    other = replace(batch, experts_BTLK=batch.experts_BTLK.clone())
    other.experts_BTLK[:, 5, 0] = (batch.experts_BTLK[:, 5, 0] + 1) % EXPERTS
    for bidirectional in (False, True):
        model = make_gnn("prefill", bidirectional=bidirectional)
        with torch.no_grad():
            same = torch.allclose(model(batch)[:, 4, 1], model(other)[:, 4, 1])
        assert same != bidirectional


def test_it_trains_under_bfloat16() -> None:
    model, batch = make_predictor("gnn", **SMALL["gnn"]), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.training_loss(batch)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == []
