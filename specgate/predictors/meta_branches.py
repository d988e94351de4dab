"""The sub-predictors that ``meta_moe`` chooses among: each sees one kind of evidence and foresees everything.

Letters: B sequences, T tokens, L MoE layers, P = L + 1 source points, H horizons, E experts per layer, D
hidden size, F features, V token ids.

Every branch maps :class:`Seen` to ``[B, T, P, H, E]``, and starts at ``start_PHE`` whatever it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specgate.predictors.features import (
    TOKEN_GAIN,
    at_targets_BTPHE,
    decayed,
    points,
    shift_layer,
    shifted,
)
from specgate.predictors.layers import PointLinear, lookup
from specgate.predictors.mlp import PointMLP
from specgate.traces.batch import RoutingBatch


@dataclass
class Seen:
    """What the branches look at, computed once.

    Shapes:
        features_BTPF, routed_BTPE: of :class:`PointFeatures`. used_BTLE, weighted_BTLE: of
            ``multi_hot_BTLE``. entry_BT1HE: what a table per token id says at p = 0.
    """

    batch: RoutingBatch
    features_BTPF: Tensor
    routed_BTPE: Tensor
    used_BTLE: Tensor
    weighted_BTLE: Tensor
    entry_BT1HE: Tensor


class Branch(nn.Module):
    """Base of the sub-predictors: a linear map per point, zero at the start, onto all horizons' experts.

    Args:
        size: width of what the last map reads. start_PHE: logits at the start.
    """

    def __init__(self, size: int, start_PHE: Tensor) -> None:
        super().__init__()
        self.shape = start_PHE.shape
        self.last = PointLinear(self.shape[0], size, self.shape[1] * self.shape[2], zero=True)
        with torch.no_grad():
            self.last.bias_P1.copy_(start_PHE.flatten(1))

    def out(self, x_BTPF: Tensor) -> Tensor:
        """The last map: ``[B, T, P, F]`` -> ``[B, T, P, H, E]``."""
        B, T, P = x_BTPF.shape[:3]
        y_PNF = self.last(x_BTPF.flatten(0, 1).transpose(0, 1))
        return y_PNF.transpose(0, 1).reshape(B, T, P, *self.shape[1:])

    def forward(self, seen: Seen) -> Tensor:
        """``[B, T, P, H, E]``; subclasses implement it."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


def with_entry(logits_BTPHE: Tensor, seen: Seen) -> Tensor:
    """The logits, those at p = 0 with the table's added."""
    return torch.cat([logits_BTPHE[:, :, :1] + seen.entry_BT1HE, logits_BTPHE[:, :, 1:]], dim=2)


class HiddenBranch(Branch):
    """A low-rank linear map of the normalised residual stream: what the target's router misses is mostly a
    rotation."""

    def __init__(self, hidden: int, rank: int, start_PHE: Tensor) -> None:
        super().__init__(rank, start_PHE)
        self.down = PointLinear(start_PHE.shape[0], hidden, rank)

    def forward(self, seen: Seen) -> Tensor:
        assert seen.batch.hidden_BTLD is not None
        hidden_BTLD = seen.batch.hidden_BTLD.float() * seen.batch.valid_BT[:, :, None, None]
        unit_BTLD = hidden_BTLD * torch.rsqrt(hidden_BTLD.pow(2).mean(-1, keepdim=True) + 1e-6)
        x_PNR = self.down(points(unit_BTLD).flatten(0, 1).transpose(0, 1))
        B, T = unit_BTLD.shape[:2]
        return self.out(x_PNR.transpose(0, 1).reshape(B, T, *x_PNR.shape[::2]))


class TransitionBranch(Branch):
    """A learned transition matrix from the experts of this layer and the one before to those of the target: a
    Markov chain of order two over layers."""

    def __init__(self, experts: int, start_PHE: Tensor) -> None:
        super().__init__(4 * experts, start_PHE)

    def forward(self, seen: Seen) -> Tensor:
        now = torch.cat([seen.used_BTLE, seen.weighted_BTLE * seen.used_BTLE.shape[-1] ** 0.5], dim=-1)
        return self.out(torch.cat([points(now), points(shift_layer(now))], dim=-1))


class TokenBranch(Branch):
    """The token ids around t: embeddings, and a table per id where nothing but the id is known (p = 0)."""

    def __init__(self, vocab: int, width: int, offsets: list[int], start_PHE: Tensor) -> None:
        super().__init__(width * len(offsets), start_PHE)
        self.offsets = offsets
        self.token_VF = nn.Embedding(vocab, width)
        nn.init.normal_(self.token_VF.weight, std=0.3 / TOKEN_GAIN)

    def forward(self, seen: Seen) -> Tensor:
        batch = seen.batch
        token_BTF = lookup(self.token_VF, batch.token_ids_BT) * (TOKEN_GAIN * batch.valid_BT[..., None])
        around_BTF = torch.cat([shifted(token_BTF, by) for by in self.offsets], dim=-1)
        y_BTPHE = self.out(around_BTF[:, :, None].expand(-1, -1, self.shape[0], -1))
        return with_entry(y_BTPHE, seen)


class HistoryBranch(Branch):
    """The routing of other tokens.

    While decoding: a matrix on the target layer's experts at its last visit, and a weight per expert on its
    decayed use there. In prefill, where the target layer has not run yet: linear in the decayed means of this
    layer's routing of the tokens before (in a bidirectional stack also of those after).
    """

    def __init__(
        self, experts: int, phase: str, bidirectional: bool, decays: list[float], start_PHE: Tensor
    ) -> None:
        sides = 2 if bidirectional else 1
        size = experts if phase == "decode" else sides * len(decays) * experts
        super().__init__(size, start_PHE)
        self.decode, self.bidirectional, self.decays = phase == "decode", bidirectional, decays
        if self.decode:
            P, H, E = self.shape
            self.visit_PHEE = nn.Parameter(torch.zeros(P, H, E, E))
            self.again_RPHE = nn.Parameter(torch.zeros(len(decays), P, H, E))

    def forward(self, seen: Seen) -> Tensor:
        scale = seen.used_BTLE.shape[-1] ** 0.5
        if self.decode:
            H = self.shape[1]
            last_BTPHE = at_targets_BTPHE(seen.used_BTLE, H)
            y_BTPHE = torch.einsum("btphe,phef->btphf", last_BTPHE, self.visit_PHEE)
            for a, again_PHE in zip(self.decays, self.again_RPHE, strict=True):
                y_BTPHE = y_BTPHE + at_targets_BTPHE(decayed(seen.used_BTLE, a), H) * scale * again_PHE
            before_BTLE = points(shifted(seen.weighted_BTLE) * scale)
            return y_BTPHE + self.out(before_BTLE)
        means = [shifted(decayed(seen.weighted_BTLE, a)) for a in self.decays]
        if self.bidirectional:
            later_BTLE = seen.weighted_BTLE.flip(1)
            means += [shifted(decayed(later_BTLE, a)).flip(1) for a in self.decays]
        return self.out(points(torch.cat(means, dim=-1) * scale))


class DeepBranch(Branch):
    """The MLP of ``mlp`` on everything that :class:`PointFeatures` collects, and the table at p = 0."""

    def __init__(
        self, size: int, width: int, depth: int, experts: int, dropout: float, start_PHE: Tensor
    ) -> None:
        super().__init__(width, start_PHE)
        P, H = start_PHE.shape[:2]
        self.body = PointMLP(P, size, width, depth, H, experts, dropout, 0.0)
        self.body.last = self.last
        del self.last  # it is the body's now

    def forward(self, seen: Seen) -> Tensor:
        return with_entry(self.body(seen.features_BTPF, seen.routed_BTPE), seen)
