"""The recorder itself: what it keeps, what it lets go, and what it refuses.

Letters: B sequences, T tokens, L MoE layers, D hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from specgate.errors import ConfigError, SpecgateError
from specgate.moe.families import moe_layers
from specgate.moe.recorder import Recorder, join, quantise
from specgate.traces.arrays import quantise_int8


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def ids(vocab: int, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, vocab, (rows, length), generator=torch.Generator().manual_seed(3))


def run(model: Any, name: str, vocab: int) -> None:
    if name == "switch_transformers":
        model(input_ids=ids(vocab), decoder_input_ids=ids(vocab, length=6))
    else:
        model(input_ids=ids(vocab))


@pytest.mark.parametrize("name", ["olmoe", "switch_transformers"])
def test_every_hook_is_gone_afterwards(name: str, tiny: SimpleNamespace) -> None:
    model = tiny.host(name)
    with Recorder(model, hidden="int8", control=True):
        assert hooks_of(model) > 0
        run(model, name, tiny.vocab)
    assert hooks_of(model) == 0


def test_hooks_are_gone_after_an_exception_and_the_recorder_can_be_used_again(tiny: SimpleNamespace) -> None:
    model = tiny.host("olmoe")
    recorder = Recorder(model)
    last = moe_layers(model)[-1].block

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise ValueError("out of memory, say")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="out of memory"), recorder:
        run(model, "olmoe", tiny.vocab)
    handle.remove()
    assert hooks_of(model) == 0
    with recorder:
        run(model, "olmoe", tiny.vocab)
        (routing,) = recorder.take()["decoder"]
    assert routing.experts_BTLK.shape == (2, 9, 3, 2)


def test_an_interrupted_pass_is_noticed_unless_cleared(tiny: SimpleNamespace) -> None:
    model = tiny.host("olmoe")
    with Recorder(model) as recorder:
        handle = moe_layers(model)[1].router.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, "olmoe", tiny.vocab)
        handle.remove()
        with pytest.raises(SpecgateError, match=r"model.layers.0.mlp ran 1 times|experts 0 times"):
            recorder.take()
        run(model, "olmoe", tiny.vocab)
        assert len(recorder.take()["decoder"]) == 1


def test_experts_that_are_bypassed_are_an_error_not_an_empty_trace(tiny: SimpleNamespace) -> None:
    """As a fused kernel does it: the block computes its output without calling its experts module."""
    model = tiny.host("olmoe")
    block = moe_layers(model)[2].block
    block.forward = lambda hidden: hidden * 0.0
    with Recorder(model) as recorder:
        run(model, "olmoe", tiny.vocab)
        with pytest.raises(SpecgateError, match=r"layers.2.mlp ran 1 times but its experts 0 times.*kernels"):
            recorder.take()


def test_recording_changes_no_value(tiny: SimpleNamespace) -> None:
    for name in tiny.families:
        model = tiny.host(name)
        inputs = {"input_ids": ids(tiny.vocab)}
        if name == "switch_transformers":
            inputs["decoder_input_ids"] = ids(tiny.vocab, length=5)
        bare = model(**inputs).logits
        with Recorder(model, hidden="fp16", control=True):
            recorded = model(**inputs).logits
        assert torch.equal(bare, recorded), name


@pytest.mark.parametrize("name", ["olmoe", "switch_transformers"])
def test_hidden_states_are_the_norms_inputs(name: str, tiny: SimpleNamespace) -> None:
    model = tiny.host(name)
    seen: dict[str, Tensor] = {}
    handles = [
        layer.norm.register_forward_pre_hook(
            lambda m, args, key=layer.name: seen.update({key: args[0].clone()})
        )
        for layer in moe_layers(model)
    ]
    taken = {}
    for hidden in ("fp16", "int8"):
        with Recorder(model, hidden=hidden) as recorder:
            run(model, name, tiny.vocab)
            taken[hidden] = recorder.take()
    for layer in moe_layers(model):
        truth_BTD = seen[layer.name]
        half = taken["fp16"][layer.stack][0]
        assert torch.equal(half.hidden_BTLD[:, :, layer.index], truth_BTD.half())
        coarse = taken["int8"][layer.stack][0]
        scale_BT = coarse.scale_BTL[:, :, layer.index].float()
        back = coarse.hidden_BTLD[:, :, layer.index].float() * scale_BT[..., None]
        assert ((back - truth_BTD).abs() <= 0.51 * scale_BT[..., None] + 1e-3 * truth_BTD.abs()).all()
        assert half.hidden_BTLD.dtype == torch.float16
        assert coarse.hidden_BTLD.dtype == torch.int8
    for handle in handles:
        handle.remove()


def test_hidden_states_of_some_layers_and_some_stacks(tiny: SimpleNamespace) -> None:
    model = tiny.host("switch_transformers")
    with Recorder(model, hidden="fp16", layers={"decoder": [3, 1], "encoder": [0]}) as recorder:
        run(model, "switch_transformers", tiny.vocab)
        taken = recorder.take()
    assert recorder.hidden_layers == {"encoder": [0], "decoder": [1, 3]}
    assert taken["decoder"][0].hidden_BTLD.shape == (2, 6, 2, 32)
    assert taken["encoder"][0].hidden_BTLD.shape == (2, 9, 1, 32)
    with Recorder(model, hidden="fp16") as full:
        run(model, "switch_transformers", tiny.vocab)
        whole = full.take()["decoder"][0].hidden_BTLD
    assert torch.equal(taken["decoder"][0].hidden_BTLD, whole[:, :, [1, 3]])
    with Recorder(model, stacks=["decoder"]) as recorder:
        run(model, "switch_transformers", tiny.vocab)
        assert list(recorder.take()) == ["decoder"]


def test_mistakes_in_the_arguments_are_named(tiny: SimpleNamespace) -> None:
    model = tiny.host("switch_transformers")
    with pytest.raises(ConfigError, match=r"hidden='fp8' is not known; choose one of none, fp16, int8"):
        Recorder(model, hidden="fp8")
    with pytest.raises(ConfigError, match=r"hidden_layers=\[0, 2\] does not fit the encoder.* 0 to 1"):
        Recorder(model, hidden="fp16", layers=[0, 2])
    with pytest.raises(ConfigError, match="stack 'middle' is not in this model; it has encoder, decoder"):
        Recorder(model, stacks=["middle"])
    with Recorder(model) as recorder, pytest.raises(SpecgateError, match="already recording"):
        recorder.__enter__()
    assert hooks_of(model) == 0


def test_padding_is_left_out_by_the_mask(tiny: SimpleNamespace) -> None:
    model = tiny.host("olmoe")
    mask_BT = torch.ones(2, 9, dtype=torch.bool)
    mask_BT[0, 6:] = False
    with Recorder(model, hidden="fp16") as recorder:
        model(input_ids=ids(tiny.vocab), attention_mask=mask_BT.long())
        (routing,) = recorder.take()["decoder"]
        model(input_ids=ids(tiny.vocab)[:1, :6])
        (alone,) = recorder.take()["decoder"]
    kept = routing.select(mask_BT)
    assert {k: v.shape[0] for k, v in kept.items()} == {"experts": 15, "weights": 15, "hidden": 15}
    assert torch.equal(kept["experts"][:6], alone.experts_BTLK[0])  # padding on the right changes nothing


def test_steps_join_to_what_one_forward_pass_routes(tiny: SimpleNamespace) -> None:
    """Teacher forcing the generated text through one forward pass gives the same routing, step by step."""
    for name in ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        model = tiny.host(name)
        prompt = ids(tiny.vocab, length=5)
        with Recorder(model) as recorder:
            out = model.generate(prompt, max_new_tokens=7, min_new_tokens=7, do_sample=False)
            generated = join(recorder.take()["decoder"])
            model(input_ids=out[:, :-1])
            (read,) = recorder.take()["decoder"]
        assert generated.experts_BTLK.shape[1] == 11
        same = (generated.experts_BTLK == read.experts_BTLK).float().mean()
        assert same > 0.98, name  # other matrix shapes round differently: a rare near-tie may flip


def test_many_experts_need_wider_numbers(tiny: SimpleNamespace) -> None:
    model = tiny.host("olmoe", num_experts=300, num_hidden_layers=1)
    with Recorder(model, control=True) as recorder:
        run(model, "olmoe", tiny.vocab)
        (routing,) = recorder.take()["decoder"]
    assert routing.experts_BTLK.dtype == torch.int32
    assert int(routing.experts_BTLK.max()) > 255
    assert routing.agrees_BTL.all()


def test_control_notices_a_router_that_decides_otherwise(tiny: SimpleNamespace) -> None:
    model = tiny.host("olmoe")
    router = moe_layers(model)[1].router
    original = router.forward

    def second_best(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, experts = original(hidden)
        experts = experts.clone()
        experts[4, 0] = next(e for e in range(8) if e not in experts[4].tolist())
        return logits, weights, experts

    router.forward = second_best
    with Recorder(model, control=True) as recorder:
        run(model, "olmoe", tiny.vocab)
        (routing,) = recorder.take()["decoder"]
    assert (~routing.agrees_BTL).nonzero().tolist() == [[0, 4, 1]]


def test_dropped_tokens_keep_the_expert_they_were_meant_for(tiny: SimpleNamespace) -> None:
    """In a half-precision host too, where the router rounds its probabilities before it chooses."""
    for dtype in (torch.float32, torch.bfloat16):
        tight = tiny.host("switch_transformers", expert_capacity=1).to(dtype)
        roomy = tiny.host("switch_transformers", expert_capacity=64).to(dtype)
        found = []
        for model in (tight, roomy):
            with Recorder(model, stacks=["encoder"]) as recorder:
                model.get_encoder()(input_ids=ids(tiny.vocab, length=20))
                found.append(recorder.take()["encoder"][0])
        first_layer = [f.experts_BTLK[:, :, 0] for f in found]  # later layers see what was dropped before
        assert torch.equal(*first_layer)
        assert found[0].dropped_BTL[:, :, 0].any()
        assert not found[1].dropped_BTL.any()


def test_quantise_agrees_with_the_traces_own() -> None:
    x = (
        torch.randn(20, 3, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 4, 20)[:, None, None]
    )
    x[4, 1] = 0.0
    q, scale = quantise(x)
    expected_q, expected_scale = quantise_int8(x.numpy())
    np.testing.assert_array_equal(q.numpy(), expected_q)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
