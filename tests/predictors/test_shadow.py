"""The shadow runs the host's own layers: exactly, it foresees exactly; with less, less.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts, K experts per
    token, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from specgate import load_predictor, training
from specgate.errors import ConfigError, SpecgateError
from specgate.moe import hosts
from specgate.predictors.shadow import Shadow
from specgate.traces.batch import ENTRY, INVALID, WITHIN, RoutingBatch, targets
from specgate.traces.datamodule import RoutingDataModule
from tests.predictors.support import EXPERTS, HIDDEN, LAYERS, VOCAB, make_batch, make_routers
from tests.predictors.test_causality import T, known, scrambled

SIZES = {"heads": 2, "key_heads": 1, "width": 4, "inner": 5}


def data_of(trace: Path, stack: str) -> RoutingDataModule:
    return RoutingDataModule(trace, stack=stack, phase="prefill", batch_size=16, verify=False)


def make_shadow(data: RoutingDataModule, host: Path, **values: Any) -> Shadow:
    """As train.py builds it."""
    cfg = OmegaConf.create({"_target_": "specgate.predictors.shadow.Shadow", "host": str(host), **values})
    predictor = training.build_predictor(cfg, data, 3)
    assert isinstance(predictor, Shadow)
    return predictor.eval()


def recall(predictor: Shadow, batch: RoutingBatch, kind: int = WITHIN) -> float:
    """Share of experts used among the K most probable, over all targets of a kind."""
    experts_BTPHK, valid_BTPH = targets(batch, predictor.lookahead)
    with torch.no_grad():
        found_BTPH = predictor.hits(predictor(batch), experts_BTPHK) / predictor.top_k
    return float(found_BTPH[valid_BTPH & (predictor.kinds == kind)].mean())


def first_batch(data: RoutingDataModule) -> RoutingBatch:
    batch: RoutingBatch = next(iter(data.val_dataloader()))
    return batch


@pytest.fixture(scope="module")
def olmoe(tiny_traces: dict[str, Path]) -> RoutingDataModule:
    return data_of(tiny_traces["olmoe"], "decoder")


@pytest.fixture(scope="module")
def switch(tiny_traces: dict[str, Path]) -> RoutingDataModule:
    return data_of(tiny_traces["switch"], "encoder")


def test_at_full_precision_it_is_the_host(
    olmoe: RoutingDataModule, switch: RoutingDataModule, tiny_olmoe: Path, tiny_switch: Path
) -> None:
    for data, host in ((olmoe, tiny_olmoe), (switch, tiny_switch)):
        batch = first_batch(data)
        shadow = make_shadow(data, host, bits=16)
        assert recall(shadow, batch) > 0.995, "apart from the fp16 of the recorded states"
        assert recall(shadow, batch, ENTRY) > 0.999, "embeddings are not rounded"
    assert batch.dropped_BTL is not None
    assert batch.dropped_BTL.any(), "capacity was followed"


def test_without_capacity_an_encoder_is_not_followed(switch: RoutingDataModule, tiny_switch: Path) -> None:
    batch = first_batch(switch)
    shadow = make_shadow(switch, tiny_switch, bits=16)
    with torch.no_grad():
        exact = shadow(batch)
        shadow.shadow.rule = replace(shadow.shadow.rule, capacity=None)
        endless = shadow(batch)
    assert torch.equal(exact[:, :, :, 0], endless[:, :, :, 0]), "at N+1 drops are recorded"
    assert not torch.allclose(exact[:, :, 0, 1], endless[:, :, 0, 1])


def test_decode_sees_earlier_tokens_as_they_were(olmoe: RoutingDataModule, tiny_olmoe: Path) -> None:
    """A causal host routes a text alike, read whole or token by token."""
    batch = replace(first_batch(olmoe), phase="decode")
    shadow = make_shadow(olmoe, tiny_olmoe, bits=16)
    decoding = Shadow(
        **{**dict(shadow.hparams), "phase": "decode", "experts_run": "none"},
        tensors=dict(shadow.shadow.named_buffers()),
        routers=olmoe.routers,
    ).eval()
    decoding.shadow.experts = "all"
    assert recall(decoding, batch) > 0.995
    assert recall(decoding, batch, ENTRY) > 0.999
    alone = replace(batch, valid_BT=batch.valid_BT.clone())
    alone.valid_BT[:, :-1] = False
    with torch.no_grad():
        assert not torch.allclose(decoding(alone)[:, -1], decoding(batch)[:, -1], atol=1e-3)


def test_less_of_the_host_foresees_less(olmoe: RoutingDataModule, tiny_olmoe: Path) -> None:
    batch = first_batch(olmoe)
    scores = {
        (bits, run): recall(make_shadow(olmoe, tiny_olmoe, bits=bits, experts_run=run), batch)
        for bits, run in ((16, "all"), (8, "all"), (4, "all"), (16, "one"), (16, "none"))
    }
    assert scores[16, "all"] > scores[8, "all"] > scores[4, "all"] > 0.5
    assert scores[16, "all"] > scores[16, "one"] > scores[16, "none"]


def test_int4_weights_have_sixteen_values_per_group(olmoe: RoutingDataModule, tiny_olmoe: Path) -> None:
    four, exact = (make_shadow(olmoe, tiny_olmoe, bits=bits).shadow for bits in (4, 16))
    buffers = dict(exact.named_buffers())
    for name, value in four.named_buffers():
        if name in ("query", "key", "value", "output", "up", "down"):
            groups = value.flatten(0, -2)  # rows of 32 inputs: a group each
            assert max(len(row.unique()) for row in groups) <= 16
            step = buffers[name].flatten(0, -2).abs().amax(1, keepdim=True) / 7
            assert ((groups - buffers[name].flatten(0, -2)).abs() <= 0.51 * step).all()
        else:
            assert torch.equal(value, buffers[name])


def test_checkpoint_needs_no_host(
    olmoe: RoutingDataModule, tiny_olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow, batch = make_shadow(olmoe, tiny_olmoe), first_batch(olmoe)
    file = training.save_predictor(shadow, tmp_path / "predictor.ckpt")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a host was loaded")

    monkeypatch.setattr(hosts, "load_host", refuse)
    loaded = load_predictor(file)
    with torch.no_grad():
        assert torch.equal(loaded(batch), shadow(batch))


def random_shadow(phase: str, K: int, bidirectional: bool = False) -> Shadow:
    """Random weights of a host with the stack of :func:`make_batch`: gated and rotary for K > 1, else
    T5-like."""
    gated, (A, C) = K > 1, (8, 4 if K > 1 else 8)
    rule = {"score": "softmax" if gated else "switch", "top_k": K, "norm": "rms" if gated else "t5"}
    plain: dict[str, Any] = {"family": "olmoe" if gated else "switch_transformers", "rule": rule, "heads": 2}
    plain["key_heads"] = 1 if gated else 2
    plain |= {"eps": 1e-6, "theta": 100.0, "clip": 2.0, "buckets": 8, "max_distance": 16}
    if not gated:
        rule["capacity"] = 2
    shapes = {
        "embedding": [VOCAB, HIDDEN],
        "attention_norm": [LAYERS, HIDDEN],
        "query": [LAYERS, A, HIDDEN],
        "key": [LAYERS, C, HIDDEN],
        "value": [LAYERS, C, HIDDEN],
        "output": [LAYERS, HIDDEN, A],
        "norm": [LAYERS, HIDDEN],
        "router": [LAYERS, EXPERTS, HIDDEN],
        "up": [LAYERS, EXPERTS, 10 if gated else 5, HIDDEN],
        "down": [LAYERS, EXPERTS, HIDDEN, 5],
        **({"query_norm": [LAYERS, A], "key_norm": [LAYERS, C]} if gated else {"bias": [8, 2]}),
    }
    g = torch.Generator().manual_seed(3)
    return Shadow(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=K,
        vocab_size=VOCAB,
        phase=phase,
        hidden_size=HIDDEN,
        bidirectional=bidirectional,
        bits=16,
        anatomy=plain,
        shapes=shapes,
        tensors={name: torch.randn(*shape, generator=g) for name, shape in shapes.items()},
        routers=make_routers(),
    ).eval()


@pytest.mark.parametrize(
    ("phase", "K", "bidirectional"),
    [
        ("prefill", 2, False),
        ("prefill", 1, True),
        ("prefill", 1, False),
        ("decode", 2, False),
        ("decode", 1, False),
    ],
)
def test_logits_depend_on_nothing_unknown(phase: str, K: int, bidirectional: bool) -> None:
    shadow = random_shadow(phase, K, bidirectional)
    batch = make_batch(phase, B=2, T=T, K=K, padded=False)
    with torch.no_grad():
        logits = shadow(batch)
        for t in [0] if bidirectional else range(T):
            for p in range(LAYERS + 1):
                other = scrambled(batch, *known(phase, t, p, bidirectional), seed=1000 + 10 * t + p)
                there_H = shadow.kinds[p] != INVALID
                tokens = slice(None) if bidirectional else slice(t, t + 1)
                found, expected = (x[:, tokens, p][:, :, there_H] for x in (shadow(other), logits))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_uses_earlier_tokens_the_current_layer_and_the_id(phase: str) -> None:
    shadow, batch = random_shadow(phase, 2), make_batch(phase, B=2, T=T, padded=False)
    ids_T, routing_TL = torch.ones(T, dtype=torch.bool), torch.ones(T, LAYERS, dtype=torch.bool)

    def changed(p: int, ids: list[int], routing: list[int]) -> bool:
        keep_ids, keep_routing = ids_T.clone(), routing_TL.clone()
        keep_ids[ids], keep_routing[routing] = False, False
        with torch.no_grad():
            before: Tensor = shadow(batch)[:, 3, p, 0]
            return not torch.allclose(before, shadow(scrambled(batch, keep_ids, keep_routing, 5))[:, 3, p, 0])

    assert changed(1, [], [3])
    assert changed(1, [], [2])
    assert changed(0, [3], [])
    assert changed(0, [2], [])


def test_what_makes_no_sense_is_refused(
    olmoe: RoutingDataModule, tiny_olmoe: Path, tiny_switch: Path
) -> None:
    for values, words in (
        ({"bits": 3}, "bits=3"),
        ({"experts_run": "two"}, "experts_run='two'"),
        ({"host": str(tiny_switch)}, "name the host that was traced"),
        ({"host": "no_such_model"}, "no_such_model"),
    ):
        with pytest.raises(SpecgateError, match=words):
            make_shadow(olmoe, **{"host": tiny_olmoe, **values})
    with pytest.raises(ConfigError, match="no host"):
        Shadow(layers=3, experts=6, top_k=2, vocab_size=11, phase="prefill", hidden_size=8)
