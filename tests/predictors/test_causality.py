"""The honesty rule: the logits at (token t, point p) depend on nothing that is not known there.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points (p = l + 1: layers up to l are known),
    E, K experts.

decode:  all of tokens < t; the ids of tokens <= t; the layers <= l of token t.
prefill: the ids of all tokens; the layers <= l of tokens <= t, of all tokens in a bidirectional stack.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from specgate.predictors.registry import _BUILT_IN
from specgate.traces.batch import INVALID, RoutingBatch
from tests.predictors.support import BUILT_FROM_FILES, LAYERS, NAMES, fitted, make_batch, variants

T = 6


def known(phase: str, t: int, p: int, bidirectional: bool = False) -> tuple[Tensor, Tensor]:
    """What is known at (t, p): ``(ids_T, routing_TL)``, bool, written as loops from the rule's words."""
    ids_T = torch.zeros(T, dtype=torch.bool)
    routing_TL = torch.zeros(T, LAYERS, dtype=torch.bool)
    for s in range(T):
        ids_T[s] = phase == "prefill" or s <= t
        for layer in range(LAYERS):
            if phase == "decode":
                routing_TL[s, layer] = s < t or (s == t and layer <= p - 1)
            else:
                routing_TL[s, layer] = (s <= t or bidirectional) and layer <= p - 1
    return ids_T, routing_TL


def scrambled(batch: RoutingBatch, keep_ids_T: Tensor, keep_routing_TL: Tensor, seed: int) -> RoutingBatch:
    """The batch with everything replaced by another batch's values except what is kept."""
    other = make_batch(batch.phase, B=2, T=T, K=batch.experts_BTLK.shape[-1], seed=seed, padded=False)
    keep_TL1 = keep_routing_TL[..., None]
    hidden, dropped = batch.hidden_BTLD, batch.dropped_BTL
    return replace(
        batch,
        token_ids_BT=torch.where(keep_ids_T, batch.token_ids_BT, other.token_ids_BT),
        experts_BTLK=torch.where(keep_TL1, batch.experts_BTLK, other.experts_BTLK),
        weights_BTLK=torch.where(keep_TL1, batch.weights_BTLK, other.weights_BTLK),
        hidden_BTLD=None if hidden is None else torch.where(keep_TL1, hidden, other.hidden_BTLD),
        dropped_BTL=None if dropped is None else torch.where(keep_routing_TL, dropped, other.dropped_BTL),
    )


def test_every_built_in_predictor_is_tested() -> None:
    assert set(_BUILT_IN) == set(NAMES) | BUILT_FROM_FILES


@pytest.mark.parametrize(("name", "phase", "K", "hidden"), variants())
def test_logits_depend_on_nothing_unknown(name: str, phase: str, K: int, hidden: bool) -> None:
    predictor = fitted(name, phase, K=K, hidden=hidden)
    batch = make_batch(phase, B=2, T=T, K=K, hidden=hidden, padded=False)
    with torch.no_grad():
        logits = predictor(batch)
        for t in range(T):
            for p in range(LAYERS + 1):
                other = scrambled(batch, *known(phase, t, p), seed=1000 + 10 * t + p)
                if phase == "decode":  # nor is it known whether another token comes
                    valid_BT = other.valid_BT.clone()
                    valid_BT[:, t + 1 :] = torch.rand(2, T - t - 1) < 0.5
                    other = replace(other, valid_BT=valid_BT)
                there_H = predictor.kinds[p] != INVALID
                torch.testing.assert_close(
                    predictor(other)[:, t, p][:, there_H],
                    logits[:, t, p][:, there_H],
                    rtol=1e-4,
                    atol=1e-5,
                    msg=lambda m, t=t, p=p: f"{name} looks ahead at token {t}, point {p}: {m}",
                )


@pytest.mark.parametrize(
    ("name", "K", "hidden"), [(n, k, h) for n, phase, k, h in variants() if phase == "prefill"]
)
def test_bidirectional_logits_depend_on_nothing_unknown(name: str, K: int, hidden: bool) -> None:
    predictor = fitted(name, "prefill", K=K, hidden=hidden, bidirectional=True)
    batch = make_batch("prefill", B=2, T=T, K=K, hidden=hidden, padded=False)
    with torch.no_grad():
        logits = predictor(batch)
        for p in range(LAYERS + 1):
            there_H = predictor.kinds[p] != INVALID
            other = scrambled(batch, *known("prefill", 0, p, bidirectional=True), seed=2000 + p)
            found = predictor(other)[:, :, p][:, :, there_H]
            torch.testing.assert_close(found, logits[:, :, p][:, :, there_H], rtol=1e-4, atol=1e-5)


# Which known inputs a predictor must react to: the current token's id, the current layer's routing, an
# earlier token's.
USES = {
    "popularity": set(),
    "markov": {"routing"},
    "markov2": {"routing", "past"},
    "previous_token": {"past"},
    "recency": {"past"},
    "token_table": {"id"},
    "router_lookahead": {"routing"},
    "router_mean_expert": {"routing"},
    "mlp": {"id", "routing", "past"},
    "router_residual": {"id", "routing", "past"},
    "gnn": {"id", "routing", "past"},
    "transformer_xl": {"id", "routing", "past"},
    "hierarchical": {"id", "routing", "past"},
    "meta_moe": {"id", "routing", "past"},
    "attention": {"id", "routing", "past"},
    "expert_lowrank": {"id", "routing", "past"},
    "seq2seq": {"id", "routing", "past"},
}


@pytest.mark.parametrize(("name", "phase", "K", "hidden"), variants())
def test_predictor_is_not_constant(name: str, phase: str, K: int, hidden: bool) -> None:
    predictor = fitted(name, phase, K=K, hidden=hidden)
    batch = make_batch(phase, B=2, T=T, K=K, hidden=hidden, padded=False)
    t, p = 3, LAYERS - 1  # one layer of this token is still to come
    everything = (torch.ones(T, dtype=torch.bool), torch.ones(T, LAYERS, dtype=torch.bool))
    parts = {
        "id": (everything[0].clone().index_fill_(0, torch.tensor([t]), False), everything[1]),
        "routing": (everything[0], everything[1].clone().index_fill_(0, torch.tensor([t]), False)),
        "past": (everything[0], everything[1].clone().index_fill_(0, torch.tensor([t - 1]), False)),
    }
    with torch.no_grad():
        logits_HE = predictor(batch)[0, t, p, :1]
        assert float(logits_HE.std()) > 0, "all experts are foreseen alike"
        changed = {
            part
            for part, keep in parts.items()
            if not torch.allclose(
                predictor(scrambled(batch, *keep, seed=5))[0, t, p, :1], logits_HE, atol=1e-6
            )
        }
    expected = USES[name] - (
        {"past"} if phase == "prefill" and name in ("markov2", "previous_token", "recency") else set()
    )
    assert changed == expected
