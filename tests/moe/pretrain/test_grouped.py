"""Grouped experts compute what transformers' own loops compute."""

import pytest
import torch
from torch.nn import functional as F

from specgate.moe.pretrain.grouped import grouped
from specgate.moe.pretrain.module import balance_loss, build, load_entropy, router_logits

SWITCH = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2,
    "num_decoder_layers": 2, "num_experts": 4,
    "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "expert_capacity": 3, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "router_jitter_noise": 0.0,
}  # fmt: skip
OLMOE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_experts": 8,
    "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("family", ["switch", "olmoe"])
def test_same_as_the_original(family: str) -> None:
    torch.manual_seed(0)
    model = build(family, SWITCH if family == "switch" else OLMOE).eval()
    layers = [
        m
        for m in model.modules()
        if type(m).__name__ in ("SwitchTransformersSparseMLP", "OlmoeSparseMoeBlock")
    ]
    hidden = torch.randn(3, 20, 16)
    with torch.no_grad():
        want = [layer(hidden) for layer in layers]
        with grouped(model):
            got = [layer(hidden) for layer in layers]
        again = [layer(hidden) for layer in layers]
    assert len(layers) == (4 if family == "switch" else 2)
    for one, two, three in zip(want, got, again, strict=True):
        assert (two - one).norm() / one.norm() < 2e-2  # bfloat16 products
        assert not torch.equal(two, one)  # the grouped path really ran
        assert torch.equal(three, one)  # and left nothing behind


def test_router_logits_of_every_layer() -> None:
    model = build("switch", SWITCH).eval()
    ids = torch.randint(2, 64, (3, 20))
    with torch.no_grad(), router_logits(model) as seen:
        model(input_ids=ids, decoder_input_ids=ids[:, :10])
    assert [tuple(x.shape) for x in seen] == [(60, 4)] * 2 + [(30, 4)] * 2


def test_gradients_reach_every_expert() -> None:
    torch.manual_seed(0)
    model = build("switch", SWITCH | {"expert_capacity": 64})
    ids = torch.randint(2, 64, (8, 20))
    with grouped(model):
        F.cross_entropy(
            model(input_ids=ids, decoder_input_ids=ids).logits.flatten(0, 1), ids.flatten()
        ).backward()
    experts = model.encoder.block[0].layer[1].mlp.experts
    assert all(experts[f"expert_{e}"].wi.weight.grad.abs().sum() > 0 for e in range(4))


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed() -> None:
    E = 8
    balanced = torch.eye(E).repeat(4, 1) * 30
    assert balance_loss(balanced, 1).item() == pytest.approx(1, rel=1e-4)
    collapsed = torch.zeros(32, E)
    collapsed[:, 3] = 30
    assert balance_loss(collapsed, 1).item() == pytest.approx(E, rel=1e-4)


def test_load_entropy() -> None:
    assert load_entropy(torch.ones(8)) == pytest.approx(1)
    assert load_entropy(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(0)
    assert load_entropy(torch.tensor([1.0, 1, 0, 0])) == pytest.approx(0.5)
