"""What the tests of mode=replay share: a small decode trace, a shape that fits it, a predictor of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specgate.predictors.registry import predictor_class
from specgate.report.replay_settings import ReplaySettings
from specgate.report.replay_shape import ModelShape
from specgate.traces.datamodule import RoutingDataModule
from tests.traces.helpers import header_for, stack_info, write_trace

L, E, K = 4, 8, 2
CONFIG: dict[str, Any] = {
    "model_type": "olmoe",
    "num_hidden_layers": L,
    "num_experts": E,
    "num_experts_per_tok": K,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_hidden_layers": L,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}


def shape(dtype: str = "float32", **changes: Any) -> ModelShape:
    return ModelShape("tiny", CONFIG | changes, dtype)


def write_decode_trace(folder: Path) -> Path:
    """40 sequences of 12 tokens, decoded, ids only; a few experts are busier than the others."""
    stack = {"decoder": stack_info(L=L, E=E, K=K, D=None, hidden="none")}
    header = header_for(stack, documents=40, phases=["decode"])
    write_trace(folder, stack, shards=[[12] * 40], header=header, phases=(1,), routers=False)
    return folder


def data_of(folder: Path) -> RoutingDataModule:
    return RoutingDataModule(folder, phase="decode", window=12, batch_size=8)


def save_predictor(data: RoutingDataModule, path: Path, lookahead: int = 2) -> Path:
    """A predictor that was never trained: its forecasts are wrong more often than not."""
    torch.manual_seed(0)
    predictor = predictor_class("mlp")(**vars(data.spec), lookahead=lookahead)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": predictor.state_dict(), "hyper_parameters": dict(predictor.hparams)}, path)
    return path


def quick(**changes: Any) -> ReplaySettings:
    """Settings that take a second."""
    values: dict[str, Any] = {
        "residency": [0.25, 1.0],
        "documents": 1,
        "tokens": 6,
        "warmup": 1,
        "repeats": 1,
        "timeline_tokens": 2,
        "device": "cpu",
    }
    return ReplaySettings(**(values | changes))
