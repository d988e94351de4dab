"""The stand-in for the host's layers is able to become them, and starts as router_lookahead.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts, D hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from specgate.errors import ConfigError
from specgate.metrics.flops import count_flops
from specgate.predictors.attention import FORMS, USUAL, Attention
from specgate.predictors.layer_experts import LayerExperts
from specgate.predictors.rollout import LayerAttention, unit
from specgate.traces.batch import WITHIN
from tests.predictors.support import SMALL, fitted, make_batch, make_predictor

D, E, L = 8, 6, 3


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_untrained_it_says_what_the_router_says(phase: str) -> None:
    batch = make_batch(phase, K=2)
    mine = make_predictor("attention", phase, K=2, **SMALL["attention"]).eval()
    router = fitted("router_lookahead", phase, K=2)
    within_PH = mine.kinds == WITHIN
    with torch.no_grad():
        a, b = mine(batch)[:, :, within_PH], router(batch)[:, :, within_PH]
    torch.testing.assert_close(a[batch.valid_BT], b[batch.valid_BT], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "relu", "gelu"])
def test_experts_equal_a_loop_over_experts(activation: str) -> None:
    torch.manual_seed(0)
    units, N, K = 4, 5, 2
    module = LayerExperts(L, E, K, D, units, activation, 0.0)
    torch.nn.init.normal_(module.out_LEUD)
    x_PND, layer_P = torch.randn(2, N, D, requires_grad=True), torch.tensor([2, 0])
    gates_PNE = torch.zeros(2, N, E).scatter_(-1, torch.rand(2, N, E).topk(K).indices, torch.rand(2, N, K))
    gates_PNE[0, 1] = 0.0  # before the first layer no expert is known
    gates_PNE.requires_grad_()
    want = torch.zeros(2, N, D)
    for p, layer in enumerate(layer_P.tolist()):
        for n in range(N):
            for e in range(E):
                y = x_PND[p, n] @ module.into_LEDM[layer, e]
                if activation == "swiglu":
                    hidden = y[:units] * torch.sigmoid(y[:units]) * y[units:]
                else:
                    hidden = F.relu(y) if activation == "relu" else F.gelu(y)
                want[p, n] += gates_PNE[p, n, e] * hidden @ module.out_LEUD[layer, e]
    places = [*module.parameters(), x_PND]
    mix = torch.randn(2, N, D)
    expected = torch.autograd.grad((want * mix).sum(), [*places, gates_PNE])
    used = gates_PNE != 0
    for way in (module.dense, module.grouped):
        found = way(x_PND, gates_PNE, layer_P)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        *grads, gate_grad = torch.autograd.grad((found * mix).sum(), [*places, gates_PNE])
        torch.testing.assert_close(grads, list(expected[:-1]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gate_grad[used], expected[-1][used], rtol=1e-4, atol=1e-5)


def test_experts_are_sorted_for_many_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LayerExperts(L, E, 2, D, 4, "swiglu", 0.0)
    torch.nn.init.normal_(module.out_LEUD)
    x_PND, gates_PNE, layer_P = torch.randn(2, 8, D), torch.rand(2, 8, E), torch.tensor([2, 0])
    gates_PNE = torch.where(gates_PNE >= gates_PNE.topk(2).values[..., -1:], gates_PNE, 0.0)
    ran = []
    monkeypatch.setattr(module, "grouped", lambda *a: (ran.append("grouped"), module.dense(*a))[1])
    module(x_PND, gates_PNE, layer_P)
    assert ran == []
    monkeypatch.setattr("specgate.predictors.layer_experts.FEW", 8)
    module(x_PND, gates_PNE, layer_P)
    assert ran == ["grouped"]
    with pytest.raises(ConfigError, match="activation='tanh' is unknown"):
        LayerExperts(L, E, 2, D, 4, "tanh", 0.0)


def test_operations_of_sorted_experts_are_those_of_the_chosen_ones() -> None:
    module = LayerExperts(L, E, 2, D, 4, "swiglu", 0.0).requires_grad_(False)
    x_PND, layer_P = torch.randn(2, 8, D), torch.tensor([2, 0])
    gates_PNE = torch.zeros(2, 8, E).scatter_(-1, torch.rand(2, 8, E).topk(2).indices, 0.5)
    each = 2 * 3 * D * 4  # a unit: two maps in, one out
    assert count_flops(lambda: module.dense(x_PND, gates_PNE, layer_P)) == 16 * E * each
    assert count_flops(lambda: module.grouped(x_PND, gates_PNE, layer_P)) == 16 * 2 * each


@pytest.mark.gpu
def test_experts_sorted_on_a_gpu_equal_all_of_them() -> None:
    torch.manual_seed(0)
    module = LayerExperts(4, 32, 4, 128, 48, "swiglu", 0.0).cuda()
    torch.nn.init.normal_(module.out_LEUD, std=0.1)
    x_PND, layer_P = torch.randn(5, 512, 128, device="cuda"), torch.tensor([0, 0, 1, 2, 3], device="cuda")
    gates_PNE = torch.rand(5, 512, 32, device="cuda")
    gates_PNE = torch.where(gates_PNE >= gates_PNE.topk(4).values[..., -1:], gates_PNE, 0.0)
    found = []
    with torch.autocast("cuda", torch.bfloat16):
        assert module._pays(x_PND)
        for way in (module.dense, module.grouped):
            y = way(x_PND, gates_PNE, layer_P)
            found.append([y, *torch.autograd.grad(y.float().square().sum(), list(module.parameters()))])
    for dense, grouped in zip(*found, strict=True):
        error = (dense.float() - grouped.float()).norm() / dense.float().norm()
        assert error < 0.02, "no further apart than bfloat16 rounds"


def test_looking_onto_the_past_equals_a_plain_forward_when_the_past_is_the_same_stream() -> None:
    """Decode with a past that happens to be this very stream is prefill."""
    torch.manual_seed(0)
    B, T = 2, 7
    module = LayerAttention(L, D, 2, 4, span=3, rotary=0.5, qk_norm=True, bidirectional=False)
    torch.nn.init.normal_(module.out_LFD)
    torch.nn.init.normal_(module.bias_LAS)
    positions_BT = torch.arange(T).expand(B, T) + 3
    layers = torch.arange(L)
    x_PND = torch.randn(L, B * T, D)
    plain = module(x_PND, layers, positions_BT, torch.ones(B, T, dtype=torch.bool))
    onto = module.onto_past(x_PND, x_PND, layers, positions_BT)
    torch.testing.assert_close(onto, plain, rtol=1e-4, atol=1e-5)


def test_rotary_attention_depends_on_distance_alone() -> None:
    torch.manual_seed(0)
    module = LayerAttention(1, D, 2, 4, span=0, rotary=1.0, qk_norm=False, bidirectional=False)
    torch.nn.init.normal_(module.out_LFD)
    x, valid, layer = (
        torch.randn(1, 6, D),
        torch.ones(1, 6, dtype=torch.bool),
        torch.zeros(1, dtype=torch.long),
    )
    first = module(x, layer, torch.arange(6)[None], valid)
    later = module(x, layer, torch.arange(6)[None] + 40, valid)
    torch.testing.assert_close(first, later, rtol=1e-4, atol=1e-5)


def test_a_host_of_its_own_form_is_learnt_to_the_last_digit() -> None:
    """A host made of such blocks is foreseen exactly once the weights are its own: horizon by horizon the
    predicted residual stream equals the one that the host would compute."""
    torch.manual_seed(0)
    model = make_predictor("attention", "prefill", K=2, **(SMALL["attention"] | {"width": 8})).eval()
    assert isinstance(model, Attention)
    for weight in (model.moe.out_LEUD, model.mix.out_LFD):
        torch.nn.init.normal_(weight, std=0.3)
    model.size.fill_(1.0)
    assert model.host is not None
    batch = make_batch("prefill", B=2, T=5, K=2, padded=False)
    hidden, experts, weights = [batch.hidden_BTLD[:, :, 0]], [], []
    layer = torch.zeros(1, dtype=torch.long)
    for m in range(L):  # the host: router, experts, next attention, in plain sequence
        scores = model.host.scores(hidden[m][:, :, None, None], torch.tensor([[m]]))[:, :, 0, 0]
        p_BTE = scores.softmax(-1)
        top = p_BTE.topk(2, dim=-1)
        experts.append(top.indices)
        weights.append(top.values)
        gates = torch.zeros_like(p_BTE).scatter_(-1, top.indices, top.values)
        x = hidden[m] + model.moe(unit(hidden[m]).flatten(0, 1)[None], gates.flatten(0, 1)[None], layer + m)[
            0
        ].view(2, 5, D)
        if m + 1 < L:
            mixed = model.mix(unit(x).flatten(0, 1)[None], layer + m + 1, batch.positions_BT, batch.valid_BT)
            hidden.append(x + mixed[0].view(2, 5, D))
    batch.hidden_BTLD, batch.experts_BTLK = torch.stack(hidden, 2), torch.stack(experts, 2)
    batch.weights_BTLK = torch.stack(weights, 2)
    with torch.no_grad():
        found = model.rollout(batch)
    assert found is not None
    ahead, _ = found
    for p in range(1, L):
        size = batch.hidden_BTLD[:, :, p - 1].pow(2).mean(-1, keepdim=True).sqrt()
        for h in range(1, L - p + 1):
            torch.testing.assert_close(
                ahead[:, :, p, h - 1] * size, batch.hidden_BTLD[:, :, p - 1 + h], rtol=1e-3, atol=1e-3
            )


def test_open_form_is_the_hosts() -> None:
    for family, form in [("olmoe", FORMS["olmoe"]), ("mixtral", USUAL)]:
        data = SimpleNamespace(readers=[SimpleNamespace(header=SimpleNamespace(family=family))])
        found = Attention.resolve({"activation": None, "rotary": 0.25, "qk_norm": None, "units": 3}, data)  # type: ignore[arg-type]
        assert found == form | {"rotary": 0.25, "units": 3}
