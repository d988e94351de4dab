"""Units of the experts that a forecast ranks first: who runs how many, and how strongly.

Letters: P source points, N tokens, D size of the state, E experts, F outputs.
"""

from __future__ import annotations

import pytest
import torch

from specgate.predictors.expert_units import ExpertUnits

P, N, D, E, F = 2, 7, 6, 5, 4


@pytest.mark.parametrize("softmax", [False, True])
def test_it_is_the_plain_loop_over_ranks(softmax: bool) -> None:
    torch.manual_seed(0)
    by_rank = [3, 2]
    module = ExpertUnits(P, D, E, by_rank, F, softmax)
    torch.nn.init.normal_(module.out.weight)
    torch.nn.init.normal_(module.out.bias_P1)
    torch.nn.init.normal_(module.into.bias_P1)
    x_PND, logits_PNE = torch.randn(P, N, D), torch.randn(P, N, E)
    found_PNF = module(x_PND, logits_PNE)
    odds_PNE = logits_PNE.softmax(-1) if softmax else logits_PNE.sigmoid()
    for p in range(P):
        for n in range(N):
            expected_F = module.out.bias_P1[p].clone()
            for rank, expert in enumerate(logits_PNE[p, n].argsort(descending=True)[: len(by_rank)].tolist()):
                for unit in range(by_rank[rank]):
                    i = expert * by_rank[0] + unit
                    into = x_PND[p, n] @ module.into.weight[p, :, i] + module.into.bias_P1[p, i]
                    value = torch.nn.functional.gelu(into) * odds_PNE[p, n, expert]
                    expected_F = expected_F + value * module.out.weight[p, i]
            torch.testing.assert_close(found_PNF[p, n], expected_F, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.at(x_PND[p], logits_PNE[p], p), found_PNF[p], rtol=1e-4, atol=1e-5)


def test_whom_to_run_is_learned_through_the_probability() -> None:
    module = ExpertUnits(P, D, E, [2, 1], F)
    torch.nn.init.normal_(module.out.weight)
    logits_PNE = torch.randn(P, N, E, requires_grad=True)
    (grad_PNE,) = torch.autograd.grad(module(torch.randn(P, N, D), logits_PNE).sum(), logits_PNE)
    first = logits_PNE.topk(2).indices
    assert bool((grad_PNE.gather(-1, first) != 0).all())
    assert int((grad_PNE != 0).sum()) == P * N * 2
