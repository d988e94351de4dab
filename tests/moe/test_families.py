"""Every family's recorded routing against decisions computed token by token in plain Python.

Letters: B sequences, T tokens, N flat tokens, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from specgate.moe.families import (
    FAMILIES,
    MoELayer,
    agrees,
    decide,
    moe_layers,
    router_input,
    router_tensors,
)
from specgate.moe.recorder import Recorder

ALL = list(FAMILIES)
DECODER_ONLY = [name for name in ALL if name != "switch_transformers"]
EXPECTED_LAYERS = {  # module paths of the tiny configurations' MoE layers, written down by hand
    "switch_transformers": ["encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp"]
    + [f"decoder.block.{i}.layer.2.mlp" for i in range(4)],
    "mixtral": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "olmoe": [f"model.layers.{i}.mlp" for i in range(3)],
    "qwen2_moe": ["model.layers.0.mlp", "model.layers.2.mlp"],
    "qwen3_moe": ["model.layers.1.mlp", "model.layers.3.mlp"],
    "deepseek_v2": ["model.layers.1.mlp", "model.layers.2.mlp"],
    "deepseek_v3": ["model.layers.1.mlp", "model.layers.2.mlp"],
    "gpt_oss": ["model.layers.0.mlp", "model.layers.1.mlp"],
}


def _softmax(values: list[float]) -> list[float]:
    peak = max(values)
    powers = [math.exp(v - peak) for v in values]
    return [p / sum(powers) for p in powers]


def _best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def oracle(layer: MoELayer, config: Any, x_D: np.ndarray) -> dict[int, float]:
    """Expert -> weight of one token, from the router's parameters and the text of the papers."""
    linear = getattr(layer.router, "classifier", layer.router)
    weight_ED = linear.weight.double().numpy()
    logits = [float(row @ x_D) for row in weight_ED]
    kind, k = layer.family.name, getattr(config, "num_experts_per_tok", 1)
    if kind == "gpt_oss":
        logits = [z + float(b) for z, b in zip(logits, linear.bias.double(), strict=True)]
        chosen = _best(logits, k)
        return dict(zip(chosen, _softmax([logits[e] for e in chosen]), strict=True))
    if kind == "deepseek_v3":
        score = [1 / (1 + math.exp(-z)) for z in logits]
        biased = [s + float(b) for s, b in zip(score, layer.router.e_score_correction_bias, strict=True)]
        size = len(score) // config.n_group
        groups = [biased[g * size : (g + 1) * size] for g in range(config.n_group)]
        kept = _best([sum(sorted(g)[-2:]) for g in groups], config.topk_group)
        chosen = _best([b if e // size in kept else -math.inf for e, b in enumerate(biased)], k)
        total = sum(score[e] for e in chosen) if config.norm_topk_prob else 1.0
        return {e: score[e] / total * config.routed_scaling_factor for e in chosen}
    probability = _softmax(logits)
    if kind == "deepseek_v2":
        allowed = probability
        if config.topk_method == "group_limited_greedy":
            size = len(probability) // config.n_group
            groups = [probability[g * size : (g + 1) * size] for g in range(config.n_group)]
            kept = _best([max(g) for g in groups], config.topk_group)
            allowed = [p if e // size in kept else 0.0 for e, p in enumerate(probability)]
        return {e: probability[e] * config.routed_scaling_factor for e in _best(allowed, k)}
    chosen = _best(probability, k)
    renormalise = kind == "mixtral" or getattr(config, "norm_topk_prob", False)
    total = sum(probability[e] for e in chosen) if renormalise else 1.0
    return {e: probability[e] / total for e in chosen}


@contextmanager
def router_inputs(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What enters each MoE block (the norm's output), seen by hooks of the test's own."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in moe_layers(model)}
    handles = [
        layer.block.register_forward_pre_hook(
            lambda module, args, name=layer.name: seen[name].append(args[0].detach().clone())
        )
        for layer in moe_layers(model)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def batch(vocab: int, rows: int = 3, length: int = 12, left: bool = False) -> dict[str, Tensor]:
    """Random ids with padding: the second row is five tokens short."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, vocab, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    where = slice(0, 5) if left else slice(length - 5, length)
    mask[1, where] = 0
    ids[1, where] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(name: str, vocab: int) -> dict[str, Tensor]:
    inputs = batch(vocab)
    if name == "switch_transformers":
        inputs["decoder_input_ids"] = batch(vocab, length=9)["input_ids"]
    return inputs


@pytest.mark.parametrize("name", ALL)
def test_layers_are_found_and_numbered_per_stack(name: str, tiny: SimpleNamespace) -> None:
    layers = moe_layers(tiny.host(name))
    assert [layer.name for layer in layers] == EXPECTED_LAYERS[name]
    for stack in ("encoder", "decoder"):
        assert [x.index for x in layers if x.stack == stack] == list(
            range(sum(x.stack == stack for x in layers))
        )
    assert {layer.stack for layer in layers} == set(FAMILIES[name].stacks)
    assert all(layer.num_experts == 8 for layer in layers)
    shapes = {k: tuple(v.shape) for k, v in router_tensors(layers[0]).items()}
    expected = {"norm_weight": (32,), "router_weight": (8, 32)}
    expected |= {"router_bias": (8,)} if name == "gpt_oss" else {}
    expected |= {"correction_bias": (8,)} if name == "deepseek_v3" else {}
    assert shapes == expected


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_forward_and_generate_match_a_hand_computed_decision(name: str, tiny: SimpleNamespace) -> None:
    model = tiny.host(name)
    layers = moe_layers(model)
    forward = batch(tiny.vocab)
    prompt = batch(tiny.vocab, left=True)
    with router_inputs(model) as seen, Recorder(model, hidden="fp16", control=True) as recorder:
        model(**forward)
        (read,) = recorder.take()["decoder"]
        model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        steps = recorder.take()["decoder"]
    assert len(steps) == 6
    assert [s.phase for s in steps] == ["prefill"] + ["decode"] * 5
    assert steps[0].experts_BTLK.shape[:2] == prompt["input_ids"].shape
    assert all(s.experts_BTLK.shape[:2] == (3, 1) for s in steps[1:])
    masks = [forward["attention_mask"], prompt["attention_mask"]] + [torch.ones(3, 1)] * 5
    checked = 0
    executed: set[int] = set()
    for call, (routing, mask_BT) in enumerate(zip([read, *steps], masks, strict=True)):
        assert routing.agrees_BTL is not None
        assert routing.agrees_BTL.all()
        for layer in layers:
            x_BTD = seen[layer.name][call].double().numpy()
            for b, t in mask_BT.nonzero().tolist():
                truth = oracle(layer, model.config, x_BTD[b, t])
                experts = routing.experts_BTLK[b, t, layer.index].tolist()
                weights = routing.weights_BTLK[b, t, layer.index].tolist()
                assert set(experts) == set(truth), (layer.name, call, b, t)
                assert weights == pytest.approx([truth[e] for e in experts], rel=2e-3)
                assert weights == sorted(weights, reverse=True)  # rank order, also where topk was unsorted
                executed |= set(experts)
                checked += 1
    assert checked == len(layers) * (31 + 31 + 15)
    assert len(executed) > 2


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_switch_matches_a_loop_and_drops_over_capacity(capacity: int, tiny: SimpleNamespace) -> None:
    model = tiny.host("switch_transformers", expert_capacity=capacity)
    inputs = inputs_of("switch_transformers", tiny.vocab)
    with router_inputs(model) as seen, Recorder(model, control=True) as recorder:
        model(**inputs)
        taken = recorder.take()
    assert list(taken) == ["encoder", "decoder"]
    total_dropped = 0
    for layer in moe_layers(model):
        (routing,) = taken[layer.stack]
        x_BTD = seen[layer.name][0].double().numpy()
        for b in range(x_BTD.shape[0]):
            used = [0] * layer.num_experts  # per sequence, in token order, padding included
            for t in range(x_BTD.shape[1]):
                ((expert, weight),) = oracle(layer, model.config, x_BTD[b, t]).items()
                used[expert] += 1
                assert routing.experts_BTLK[b, t, layer.index].tolist() == [expert]
                assert float(routing.weights_BTLK[b, t, layer.index, 0]) == pytest.approx(weight, rel=2e-3)
                assert bool(routing.dropped_BTL[b, t, layer.index]) == (used[expert] > capacity)
                total_dropped += used[expert] > capacity
        assert routing.agrees_BTL.all()
    assert (total_dropped > 0) == (capacity < 64)


def test_switch_generate_records_every_step(tiny: SimpleNamespace) -> None:
    model = tiny.host("switch_transformers")
    inputs = batch(tiny.vocab)
    with router_inputs(model) as seen, Recorder(model, control=True) as recorder:
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        taken = recorder.take()
    assert [c.experts_BTLK.shape for c in taken["encoder"]] == [(3, 12, 2, 1)]
    assert [c.experts_BTLK.shape for c in taken["decoder"]] == [(3, 1, 4, 1)] * 5
    for layer in moe_layers(model):
        for routing, x_BTD in zip(taken[layer.stack], seen[layer.name], strict=True):
            assert routing.agrees_BTL.all()
            for b in range(3):
                (expert,) = oracle(layer, model.config, x_BTD[b, -1].double().numpy())
                assert int(routing.experts_BTLK[b, -1, layer.index, 0]) == expert


def test_switch_router_output_is_what_the_experts_execute(tiny: SimpleNamespace) -> None:
    """The recorder listens at Switch's router; here at the experts themselves."""
    model = tiny.host("switch_transformers", expert_capacity=2)
    calls: dict[tuple[str, int], int] = {}
    handles = []
    for layer in moe_layers(model):
        for e in range(layer.num_experts):

            def count(module: nn.Module, args: tuple[Tensor], key: tuple[str, int] = (layer.name, e)) -> None:
                calls[key] = calls.get(key, 0) + args[0].shape[0]

            handles.append(layer.experts[f"expert_{e}"].register_forward_pre_hook(count))
    with Recorder(model) as recorder:
        model(**inputs_of("switch_transformers", tiny.vocab))
        taken = recorder.take()
    for layer in moe_layers(model):
        (routing,) = taken[layer.stack]
        experts_N = routing.experts_BTLK[:, :, layer.index, 0][~routing.dropped_BTL[:, :, layer.index]]
        for e in range(layer.num_experts):
            assert int((experts_N == e).sum()) == calls.get((layer.name, e), 0)
    assert len({e for _, e in calls}) > 2
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_recorded_experts_are_the_ones_that_execute(name: str, tiny: SimpleNamespace) -> None:
    """Silencing one expert's weights changes the block's output for exactly the tokens recorded with it."""
    model = tiny.host(name)
    layer = moe_layers(model)[-1]
    outputs: list[Tensor] = []
    handle = layer.experts.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    inputs = batch(tiny.vocab)
    with Recorder(model) as recorder:
        model(**inputs)
        experts_NK = recorder.take()["decoder"][0].experts_BTLK[:, :, layer.index].flatten(0, 1)
    used = experts_NK.unique().tolist()
    assert len(used) > 2
    for e in used[:3]:
        kept = layer.experts.down_proj[e].clone()
        layer.experts.down_proj[e] = kept + 0.5
        outputs.clear()
        model(**inputs)
        layer.experts.down_proj[e] = kept
        model(**inputs)
        changed_N = (outputs[0] - outputs[1]).abs().amax(-1) > 0
        assert torch.equal(changed_N, (experts_NK == e).any(-1))
    handle.remove()


@pytest.mark.parametrize("name", ALL)
def test_router_logits_are_raw(name: str, tiny: SimpleNamespace) -> None:
    """Guards the transformers range: other versions return probabilities or scattered scores here."""
    out = tiny.host(name)(**inputs_of(name, tiny.vocab), output_router_logits=True)
    logits = out.encoder_router_logits if name == "switch_transformers" else out.router_logits
    assert len(logits) == sum(
        x.stack == moe_layers(tiny.host(name))[0].stack for x in moe_layers(tiny.host(name))
    )
    for entry in logits:
        assert ((entry.float().sum(-1) - 1).abs() > 1e-3).float().mean() > 0.9
        assert (entry < 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_router_input_and_decision_repeat_the_host_bit_by_bit(
    name: str, dtype: torch.dtype, tiny: SimpleNamespace
) -> None:
    model = tiny.host(name).to(dtype)
    layers = moe_layers(model)
    residual: dict[str, Tensor] = {}
    handles = [
        x.norm.register_forward_pre_hook(lambda m, args, key=x.name: residual.update({key: args[0].clone()}))
        for x in layers
    ]
    with router_inputs(model) as seen, Recorder(model, control=True) as recorder:
        model(**inputs_of(name, tiny.vocab))
        taken = recorder.take()
    for layer in layers:
        normed = router_input(layer, residual[layer.name])
        assert torch.equal(normed, seen[layer.name][0])
        (routing,) = taken[layer.stack]
        assert routing.agrees_BTL[:, :, layer.index].all()
        decision = decide(layer, normed)
        weights = routing.weights_BTLK[:, :, layer.index].float()
        rtol = 5e-3 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(decision.weights.float(), weights, rtol=rtol, atol=1e-3)
    for handle in handles:
        handle.remove()


def test_deepseek_v3_bias_decides_and_weights_ignore_it(tiny: SimpleNamespace) -> None:
    model = tiny.host("deepseek_v3", n_group=1, topk_group=1)
    layer = moe_layers(model)[0]
    x_ND = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    with_bias = decide(layer, x_ND)
    executed = layer.router(x_ND)[2]
    assert agrees(with_bias, executed).all()
    layer.router.e_score_correction_bias.zero_()
    without = decide(layer, x_ND)
    changed = (with_bias.experts.sort(-1).values != without.experts.sort(-1).values).any(-1)
    assert changed.float().mean() > 0.2  # a choice by the raw logits would be wrong this often
    assert not agrees(without, executed)[changed].any()
    assert torch.allclose(with_bias.weights.sum(-1), torch.tensor(2.5))


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_deepseek_groups_limit_the_choice(name: str, tiny: SimpleNamespace) -> None:
    layer = moe_layers(tiny.host(name))[0]
    x_ND = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))
    decision = decide(layer, x_ND)
    assert agrees(decision, layer.router(x_ND)[2]).all()
    groups = decision.experts // 2  # 8 experts in 4 groups, 2 of which are kept
    assert max(len(set(row)) for row in groups.tolist()) == 2
    free = moe_layers(tiny.host(name, **{"n_group": 1, "topk_group": 1}))[0]
    assert max(len(set(row)) for row in (decide(free, x_ND).experts // 2).tolist()) == 3


def test_deepseek_v2_greedy_has_no_groups(tiny: SimpleNamespace) -> None:
    layer = moe_layers(tiny.host("deepseek_v2", topk_method="greedy"))[0]
    assert layer.rule.groups is None
    x_ND = torch.randn(100, 32, generator=torch.Generator().manual_seed(2))
    assert agrees(decide(layer, x_ND), layer.router(x_ND)[2]).all()


def test_gpt_oss_bias_is_part_of_the_decision(tiny: SimpleNamespace) -> None:
    layer = moe_layers(tiny.host("gpt_oss"))[0]
    x_ND = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    before = decide(layer, x_ND)
    assert agrees(before, layer.router(x_ND)[2]).all()
    layer.router.bias.zero_()
    assert not agrees(before, decide(layer, x_ND).experts).all()


def test_agreement_notices_one_wrong_expert_and_one_wrong_drop(tiny: SimpleNamespace) -> None:
    layer = moe_layers(tiny.host("olmoe"))[0]
    x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(4))
    decision = decide(layer, x_ND)
    wrong = decision.experts.clone()
    wrong[17, 1] = next(e for e in range(8) if e not in decision.experts[17].tolist())
    assert (~agrees(decision, wrong)).nonzero().flatten().tolist() == [17]
    swapped = decision.experts.flip(-1)  # order is no part of the decision
    assert agrees(decision, swapped).all()
    switch = moe_layers(tiny.host("switch_transformers", expert_capacity=2))[0]
    decision = decide(switch, x_ND[None])
    dropped = decision.dropped.clone()
    dropped[0, 3] = ~dropped[0, 3]
    assert (~agrees(decision, decision.experts, dropped))[0].nonzero().flatten().tolist() == [3]
