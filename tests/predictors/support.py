"""Small routed batches, fitted predictors and a trainer for the tests of predictors.

Letters: B sequences, T tokens, L MoE layers, E experts, K experts per token, D hidden size, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from specgate.predictors import predictor_class, predictor_names
from specgate.predictors.base import Predictor
from specgate.predictors.counting import CountingPredictor
from specgate.traces.batch import RoutingBatch

LAYERS, EXPERTS, HIDDEN, VOCAB = 3, 6, 8, 11
NAMES = [
    "popularity",
    "markov",
    "markov2",
    "previous_token",
    "recency",
    "token_table",
    "router_lookahead",
    "router_mean_expert",
    "mlp",
    "router_residual",
    "gnn",
    "transformer_xl",
    "hierarchical",
    "meta_moe",
    "attention",
    "expert_lowrank",
    "seq2seq",
]
LEARNED = {
    "mlp",
    "router_residual",
    "gnn",
    "transformer_xl",
    "hierarchical",
    "meta_moe",
    "attention",
    "expert_lowrank",
    "seq2seq",
}
#: Not built from a configuration alone (checkpoints, a host model): their own tests hold them to it.
BUILT_FROM_FILES = {"ensemble", "shadow"}
#: Small sizes for :func:`fitted`, where a predictor's defaults are too large for a test.
SMALL: dict[str, dict[str, Any]] = {
    "expert_lowrank": {
        **{"units": 8, "head_width": 8, "value_width": 8, "span": 5},
        **{"foresee": [3, 2], "depth": True, "by_expert": True},
    },
    "attention": {"units": 4, "attention_heads": 2, "head_width": 8, "heads": 2, "width": 32},
    "hierarchical": {"heads": 2, "width": 32, "groups": 2},
    "gnn": {"heads": 2, "width": 32, "node_dim": 16, "graph_heads": 2, "edges": 4, "message_dim": 8},
    "meta_moe": {"heads": 2, "width": 32, "rank": 4, "id_dim": 16, "gate_width": 8},
    "mlp": {"heads": 2, "width": 32},
    "transformer_xl": {"width": 32, "trunk_width": 16, "trunk_heads": 2, "memory": 50},
    "seq2seq": {"heads": 2, "width": 32, "decoder_width": 24},
    "router_residual": {"heads": 2, "width": 32},
}
NEED_HIDDEN = {"router_lookahead", "router_mean_expert"}


def make_batch(
    phase: str = "decode",
    *,
    B: int = 3,
    T: int = 8,
    K: int = 2,
    hidden: bool = True,
    seed: int = 0,
    context: int = 0,
    padded: bool = True,
) -> RoutingBatch:
    """Random routing; the last sequence is shorter than the others if ``padded``."""
    g = torch.Generator().manual_seed(seed)
    experts = torch.rand(B, T, LAYERS, EXPERTS, generator=g).topk(K, dim=-1).indices
    weights = torch.rand(B, T, LAYERS, K, generator=g).sort(-1, descending=True).values
    valid = torch.ones(B, T, dtype=torch.bool)
    if padded:
        valid[-1, T - 3 :] = False
    mask = valid.clone()
    mask[:, :context] = False
    return RoutingBatch(
        experts_BTLK=experts,
        weights_BTLK=weights,
        token_ids_BT=torch.randint(0, VOCAB, (B, T), generator=g),
        positions_BT=torch.arange(T).expand(B, T).clone(),
        valid_BT=valid,
        mask_BT=mask,
        domain_B=torch.zeros(B, dtype=torch.int64),
        document_B=torch.arange(B),
        hidden_BTLD=torch.randn(B, T, LAYERS, HIDDEN, generator=g) if hidden else None,
        dropped_BTL=torch.rand(B, T, LAYERS, generator=g) < 0.3 if K == 1 else None,
        phase=phase,
    )


def make_routers(seed: int = 0) -> dict[int, dict[str, torch.Tensor]]:
    """Random routers of every layer."""
    g = torch.Generator().manual_seed(seed)
    return {
        layer: {
            "norm_weight": torch.rand(HIDDEN, generator=g) + 0.5,
            "router_weight": torch.randn(EXPERTS, HIDDEN, generator=g),
            "router_bias": torch.randn(EXPERTS, generator=g) * 0.1,
        }
        for layer in range(LAYERS)
    }


def make_predictor(
    name: str, phase: str = "decode", *, K: int = 2, hidden: bool = True, **kwargs: Any
) -> Predictor:
    """A fresh predictor for :func:`make_batch`'s stack."""
    if predictor_class(name).uses_routers and hidden and "routers" not in kwargs:
        kwargs["routers"] = make_routers()
    kwargs.setdefault("lookahead", 3)
    kwargs.setdefault("vocab_size", VOCAB)
    return predictor_class(name)(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=K,
        phase=phase,
        hidden_size=HIDDEN if hidden else None,
        **kwargs,
    )


def fitted(name: str, phase: str = "decode", *, K: int = 2, hidden: bool = True, **kwargs: Any) -> Predictor:
    """A predictor with something in it: counted on random batches, or with every parameter random."""
    if name == "recency":
        kwargs.setdefault("mixes", [0.6])  # random routing has no recency to find
    if name in LEARNED:
        kwargs = SMALL.get(name, {}) | kwargs
    predictor = make_predictor(name, phase, K=K, hidden=hidden, **kwargs)
    if isinstance(predictor, CountingPredictor):
        with torch.no_grad():
            for seed in range(4):
                predictor.count(make_batch(phase, K=K, hidden=hidden, seed=100 + seed))
            predictor.finish()
    else:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return predictor.eval()


def loader(batches: Sequence[RoutingBatch]) -> DataLoader[RoutingBatch]:
    """Batches that exist already, as a DataLoader."""
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    """A silent CPU trainer."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(settings | kwargs))


def variants() -> list[tuple[str, str, int, bool]]:
    """(name, phase, K, hidden) of every registered predictor in every mode it has."""
    assert set(NAMES) <= set(predictor_names())
    return [
        (name, phase, K, hidden)
        for name in NAMES
        for phase in ("prefill", "decode")
        for K in (1, 2)
        for hidden in (True, False)
        if hidden or name not in NEED_HIDDEN
    ]
