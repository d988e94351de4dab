"""Predictors with random weights and random routing, of any size, for the tests of the speculation kernel.

Letters: B sequences, T tokens, L MoE layers, E experts, K experts per token, D hidden size, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from specgate.calibration.registry import make_calibrator
from specgate.predictors import predictor_class
from specgate.predictors.base import Predictor
from specgate.predictors.counting import CountingPredictor
from specgate.predictors.speculation import speculate_in_torch
from specgate.runtime.speculate import Speculator
from specgate.traces.batch import RoutingBatch

VOCAB = 37
Case = dict[str, Any]
LOOKAHEAD: Case = {"name": "router_lookahead"}
MLP_: Case = {"name": "mlp", "width": 20, "heads": 2}
RESIDUAL: Case = {"name": "router_residual", "width": 20, "heads": 2}
CASES: dict[str, Case] = {
    "lookahead": LOOKAHEAD,
    "lookahead, one expert": LOOKAHEAD | {"K": 1, "calibration": "temperature"},
    "lookahead, corrected choice": LOOKAHEAD | {"corrects": True, "calibration": "vector"},
    "lookahead, past the next token": LOOKAHEAD | {"H": 6, "calibration": "temperature"},
    "lookahead, wide": LOOKAHEAD | {"D": 300, "E": 40, "K": 4, "calibration": "temperature"},
    "lookahead, prefill": LOOKAHEAD | {"phase": "prefill", "calibration": "temperature"},
    "mlp": MLP_,
    "mlp, ids only": MLP_ | {"D": None, "calibration": "temperature"},
    "mlp, ids only, no attention": MLP_ | {"D": None, "heads": 0, "calibration": "vector"},
    "mlp, one expert, deep": MLP_ | {"K": 1, "depth": 3, "calibration": "temperature"},
    "residual": RESIDUAL,
    "residual, ids only": RESIDUAL | {"D": None, "K": 1},
    "residual, past the next token": RESIDUAL | {"H": 5, "depth": 2, "calibration": "temperature"},
    "residual, wide": RESIDUAL | {"D": 300, "E": 40, "K": 4, "width": 136, "calibration": "vector"},
    "residual, no decays": RESIDUAL | {"decays": [], "calibration": "temperature"},
}


def make_routing(
    *, B: int, T: int, L: int, E: int, K: int, D: int | None, phase: str = "decode", seed: int = 0
) -> RoutingBatch:
    """Random routing of whole sequences; with K = 1 some tokens are dropped."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, T, dtype=torch.bool)
    return RoutingBatch(
        experts_BTLK=torch.rand(B, T, L, E, generator=g).topk(K, dim=-1).indices,
        weights_BTLK=torch.rand(B, T, L, K, generator=g).sort(-1, descending=True).values,
        token_ids_BT=torch.randint(0, VOCAB, (B, T), generator=g),
        positions_BT=torch.arange(T).expand(B, T).clone(),
        valid_BT=valid,
        mask_BT=valid.clone(),
        domain_B=torch.zeros(B, dtype=torch.int64),
        document_B=torch.arange(B),
        hidden_BTLD=None if D is None else 3 * torch.randn(B, T, L, D, generator=g),
        dropped_BTL=torch.rand(B, T, L, generator=g) < 0.3 if K == 1 else None,
        phase=phase,
    )


def make_predictor(
    name: str,
    *,
    L: int = 3,
    E: int = 6,
    K: int = 2,
    D: int | None = 8,
    H: int = 3,
    phase: str = "decode",
    calibration: str | None = None,
    corrects: bool = False,
    **options: Any,
) -> Predictor:
    """A predictor with every parameter, count and calibration parameter random."""
    g = torch.Generator().manual_seed(5)
    cls = predictor_class(name)
    if cls.uses_routers and D is not None:
        options["routers"] = {
            layer: {
                "norm_weight": torch.rand(D, generator=g) + 0.5,
                "router_weight": torch.randn(E, D, generator=g) / D**0.5,
                "router_bias": torch.randn(E, generator=g) * 0.1,
            }
            | ({"correction_bias": torch.randn(E, generator=g) * 0.2} if corrects and layer % 2 else {})
            for layer in range(L)
        }
        options["norm_eps"] = 1e-5
    predictor = cls(
        layers=L, experts=E, top_k=K, vocab_size=VOCAB, phase=phase, hidden_size=D, lookahead=H, **options
    )
    with torch.no_grad():
        if isinstance(predictor, CountingPredictor):
            for seed in range(2):  # some ids are never counted
                predictor.count(make_routing(B=2, T=6, L=L, E=E, K=K, D=D, phase=phase, seed=100 + seed))
            predictor.finish()
        for parameter in predictor.parameters():
            spread = 0.3 if parameter.dim() < 3 else 1.5 / parameter.shape[-2] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=g) * spread)
        if calibration is not None:
            predictor.calibrator = make_calibrator(calibration, predictor)
            for buffer_name, buffer in predictor.calibrator.named_buffers():
                if buffer.is_floating_point() and not (K == 1 and buffer_name == "offset_QH"):
                    buffer.copy_(torch.randn(buffer.shape, generator=g) * 0.4)
    return predictor.eval()


def until(batch: RoutingBatch, tokens: int) -> RoutingBatch:
    """The first ``tokens`` of every sequence."""
    cut = {
        f.name: x[:, :tokens]
        for f in fields(batch)
        if isinstance(x := getattr(batch, f.name), Tensor) and x.dim() > 1
    }
    return replace(batch, **cut)


def executed(batch: RoutingBatch) -> Tensor:
    """Router weights, 0 where the expert did not run."""
    if batch.dropped_BTL is None:
        return batch.weights_BTLK
    return batch.weights_BTLK * ~batch.dropped_BTL[..., None]


def launch(
    speculator: Speculator, batch: RoutingBatch, t: int, layer: int, dtype: torch.dtype = torch.float32
) -> None:
    """One source point of token ``t`` of every sequence."""
    device = speculator.device
    if layer < 0:
        speculator.launch(-1, token_ids=batch.token_ids_BT[:, t].to(device).contiguous())
        return
    hidden_BD = (
        None if batch.hidden_BTLD is None else batch.hidden_BTLD[:, t, layer].to(device, dtype).contiguous()
    )
    experts_BK = batch.experts_BTLK[:, t, layer].to(device).contiguous()
    speculator.launch(layer, hidden_BD, experts_BK, executed(batch)[:, t, layer].to(device).contiguous())


def decoded(batch: RoutingBatch, layers: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(token, layer) of every launch, in order."""
    for t in range(start, batch.token_ids_BT.shape[1]):
        for layer in range(-1, layers):
            yield t, layer


def routing(predictor: Predictor, B: int, T: int, seed: int = 0) -> RoutingBatch:
    """Random routing of a predictor's stack."""
    sizes: Case = {
        "L": predictor.layers,
        "E": predictor.experts,
        "K": predictor.top_k,
        "D": predictor.hidden_size,
    }
    return make_routing(B=B, T=T, phase=predictor.phase, seed=seed, **sizes)


def rarer(predictor: Predictor) -> Predictor:
    """Small probabilities, so that the merge over many sequences does not come out as one everywhere."""
    if predictor.top_k > 1:
        for name, buffer in predictor.calibrator.named_buffers():
            if "offset" in name:
                buffer -= 5.0
    return predictor


def compare(
    predictor: Predictor,
    speculator: Speculator,
    batch: RoutingBatch,
    start: int = 0,
    atol: float = 1e-5,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Every launch from token ``start`` on against torch on the window so far; returns how many were
    compared."""
    device, count = predictor.device, 0
    for t, layer in decoded(batch, predictor.layers, start):
        launch(speculator, batch, t, layer, dtype)
        if speculator.device.type == "cuda":
            torch.cuda.synchronize()
        found = speculator.poll_forecast()
        expected = speculate_in_torch(predictor, until(batch, t + 1).to(device), layer, 0.0)
        assert found is not None
        assert found.source_layer == layer
        assert [e[:2] + e[3:] for e in found.entries] == [e[:2] + e[3:] for e in expected]
        p_N, expected_N = (torch.tensor([e[2] for e in entries]) for entries in (found.entries, expected))
        torch.testing.assert_close(p_N, expected_N, rtol=0, atol=atol)
        count += len(expected)
    return count


def read(speculator: Speculator, batch: RoutingBatch, tokens: int, valid: torch.Tensor | None = None) -> None:
    """The first tokens as a prompt."""
    speculator.read(-1, token_ids=batch.token_ids_BT[:, :tokens], valid=valid)
    for layer in range(batch.experts_BTLK.shape[2]):
        hidden = None if batch.hidden_BTLD is None else batch.hidden_BTLD[:, :tokens, layer]
        experts, weights = (x[:, :tokens, layer] for x in (batch.experts_BTLK, executed(batch)))
        speculator.read(layer, hidden=hidden, experts=experts, weights=weights)
