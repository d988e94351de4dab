"""A token's heaviest expert's map: sorted, dense and gathered ways agree, on a GPU too.

Letters: P source points, N tokens, D size of the state, E experts, F outputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specgate.predictors import expert_linear
from specgate.predictors.expert_linear import ExpertLinear

P, N, D, E, F = 3, 40, 8, 5, 16


def made(device: str = "cpu") -> tuple[ExpertLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    module = ExpertLinear(P, E, D, F)
    torch.nn.init.normal_(module.weight)
    x_PND, expert_PN = torch.randn(P, N, D, requires_grad=True), torch.randint(0, E - 1, (P, N))
    return module.to(device), x_PND.to(device), expert_PN.to(device)  # nobody chose the last expert


def test_every_way_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x_PND, expert_PN = made()
    expected = torch.stack(
        [torch.stack([x_PND[p, n] @ module.weight[p, expert_PN[p, n]] for n in range(N)]) for p in range(P)]
    )
    wanted = torch.autograd.grad(expected.square().sum(), [x_PND, module.weight])
    gathered = module(x_PND, expert_PN)
    monkeypatch.setattr(expert_linear, "FEW", 0)
    for found in (
        gathered,
        module(x_PND, expert_PN),
        module.grouped(x_PND, expert_PN, torch.float32),
        module.dense(x_PND, expert_PN),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(
            torch.autograd.grad(found.square().sum(), [x_PND, module.weight]), wanted, strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    for p in range(P):
        torch.testing.assert_close(module.at(x_PND[p], expert_PN[p], p), expected[p], rtol=1e-5, atol=1e-5)


def test_untrained_it_adds_nothing() -> None:
    module = ExpertLinear(P, E, D, F)
    assert not module(torch.randn(P, N, D), torch.zeros(P, N, dtype=torch.int64)).any()


@pytest.mark.gpu
def test_sorted_on_a_gpu_it_equals_every_experts_map() -> None:
    module, x_PND, expert_PN = made("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = module.grouped(x_PND, expert_PN, torch.bfloat16).float()
        expected = module.dense(x_PND, expert_PN).float()
    assert (found - expected).norm() / expected.norm() < 0.02
