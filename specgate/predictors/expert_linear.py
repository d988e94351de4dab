"""Linear maps that belong to experts, of which that of each token's heaviest expert runs.

Letters: N tokens, P source points, D size of the state, E experts per layer, F outputs, R = P * N rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.predictors.layer_experts import FEW, Permute
from specgate.predictors.layers import weight_at


class ExpertLinear(nn.Module):
    """What a token's heaviest expert makes of a state, as far as it is linear.

    Every (point, expert) has a full matrix, so that capacity grows E times and the work of a token stays that
    of one product (Shazeer et al., 2017, arXiv:1701.06538; with one expert of each token: Fedus et al.,
    "Switch Transformers", 2022, arXiv:2101.03961). Added to a matrix that all tokens share it costs nothing:
    the sum of both is one matrix again.

    Shapes:
        forward: states ``[P, N, D]``, the heaviest expert ``[P, N]`` int64 -> ``[P, N, F]``.
    """

    def __init__(self, points: int, experts: int, size_in: int, size_out: int) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.zeros(points, experts, size_in, size_out))

    def forward(self, x_PND: Tensor, expert_PN: Tensor) -> Tensor:
        P, N, _ = x_PND.shape
        if P * N <= FEW:
            place_P1 = torch.arange(P, device=x_PND.device)[:, None]
            return (x_PND[..., None, :] @ self.weight[place_P1, expert_PN].to(x_PND.dtype))[..., 0, :]
        half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        if x_PND.is_cuda and not (half and all(size % 8 == 0 for size in self.weight.shape[2:])):
            return self.dense(x_PND, expert_PN)
        return self.grouped(x_PND, expert_PN, torch.bfloat16 if x_PND.is_cuda else x_PND.dtype)

    def at(self, x_ND: Tensor, expert_N: Tensor, point: int) -> Tensor:
        """One point's maps: ``[N, D]``, ``[N]`` -> ``[N, F]``."""
        weight_EDF = weight_at(self, point)
        if x_ND.shape[0] <= 2 * self.experts:
            return (x_ND[:, None] @ weight_EDF[expert_N])[:, 0]
        every_NEF = (x_ND @ weight_EDF.transpose(0, 1).flatten(1)).unflatten(-1, (self.experts, -1))
        return every_NEF[torch.arange(x_ND.shape[0], device=x_ND.device), expert_N]

    def dense(self, x_PND: Tensor, expert_PN: Tensor) -> Tensor:
        """Every expert's map of every token, of which one is kept."""
        every_PNF = torch.bmm(x_PND, self.weight.transpose(1, 2).flatten(2).to(x_PND.dtype))
        every_PNEF = every_PNF.unflatten(-1, (self.experts, -1))
        index_PN1F = expert_PN[..., None, None].expand(-1, -1, 1, every_PNEF.shape[-1])
        return every_PNEF.gather(2, index_PN1F)[:, :, 0]

    def grouped(self, x_PND: Tensor, expert_PN: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens sorted by point and expert, one product for each group."""
        P, N, _ = x_PND.shape
        group_R = (expert_PN + self.experts * torch.arange(P, device=x_PND.device)[:, None]).flatten()
        sorted_R, order_R = group_R.sort()
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(P * N, device=x_PND.device))
        ends = torch.arange(1, P * self.experts + 1, device=x_PND.device)
        ends = torch.searchsorted(sorted_R, ends).to(torch.int32)
        rows_RD = Permute.apply(x_PND.to(dtype).flatten(0, 1), order_R, place_R)
        found_RF = F.grouped_mm(rows_RD, self.weight.flatten(0, 1).to(dtype), offs=ends)
        return Permute.apply(found_RF, place_R, order_R).view(P, N, -1)
