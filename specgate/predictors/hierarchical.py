"""A trunk that all layers share, a sub-model per group of layers (early, middle, late), a head per layer.

Letters: B sequences, T tokens, N = B * T tokens flat, L MoE layers, P = L + 1 source points, H horizons, E
    experts, F features, W width, G groups, A attention heads, C width of a head.

What is the same everywhere (how the residual stream and the text are read) is learnt once from all layers,
what differs with depth by a group of layers together, what is a layer's own (its experts) by the layer: the
sharing of parameters by depth of progressive layered extraction (Tang et al., RecSys 2020,
doi:10.1145/3383313.3412236) applied to MoE layers, whose routing is known to differ in kind between early,
middle and late layers (Jiang et al., "Mixtral of Experts", 2024, arXiv:2401.04088, section 5; Xue et al.,
"OpenMoE", 2024, arXiv:2402.01739). Which layers form a group is given, or found in the training data before
the first step (``grouping.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.features import PointFeatures, prior_logit, stack_of
from specgate.predictors.grouping import check_groups, contrast, equal_groups, routing_similarity, segment
from specgate.predictors.layers import PointLinear, lookup
from specgate.predictors.mlp import ENTRY_GAIN
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import WITHIN, RoutingBatch

log = logging.getLogger(__name__)
HEAD_WIDTH = 16


class SharedAttention(nn.Module):
    """Self-attention over tokens with one set of weights for all source points; a linear penalty on distance
    per head (ALiBi: Press et al., 2022, arXiv:2108.12409).

    Args:
        full: attend to later tokens too (a bidirectional stack); else causal.

    Shapes:
        forward: ``[P, B, T, W]``, valid ``[B, T]`` -> ``[P, B, T, W]``.
    """

    def __init__(self, width: int, heads: int, full: bool) -> None:
        super().__init__()
        self.heads, self.full = heads, full
        self.query_key_value = nn.Linear(width, 3 * heads * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        self.slope_A = nn.Parameter(torch.linspace(-4.0, 0.0, heads))

    def forward(self, x_PBTW: Tensor, valid_BT: Tensor) -> Tensor:
        P, B, T, _ = x_PBTW.shape
        qkv = self.query_key_value(x_PBTW).view(P * B, T, 3, self.heads, HEAD_WIDTH)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        age_TT = torch.arange(T, device=q.device)
        age_TT = age_TT[:, None] - age_TT[None]
        penalty_BATT = (-F.softplus(self.slope_A)[:, None, None] * age_TT.abs())[None]
        if self.full:
            penalty_BATT = penalty_BATT.masked_fill(~valid_BT[:, None, None], -torch.inf)
            shape = (P, B, self.heads, T, T)
            mask = penalty_BATT[None].expand(shape).reshape(P * B, self.heads, T, T)
        else:  # padding is on the right: no valid token sees it
            mask = penalty_BATT.masked_fill(age_TT < 0, -torch.inf).expand(P * B, -1, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return self.out(mixed.transpose(1, 2).reshape(P, B, T, self.heads * HEAD_WIDTH))


class GroupBlock(nn.Module):
    """A residual layer with one set of weights per group of layers.

    Shapes:
        up_GWW, down_GWW (parameters): ``[G, W, W]``; bias_GW: ``[G, W]``.
        forward: ``[P, N, W]``, the group of each point ``[P]`` -> ``[P, N, W]``.
    """

    def __init__(self, groups: int, width: int, dropout: float) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.up_GWW = nn.Parameter(torch.empty(groups, width, width).uniform_(-bound, bound))
        self.down_GWW = nn.Parameter(torch.empty(groups, width, width).uniform_(-bound, bound))
        self.bias_GW = nn.Parameter(torch.zeros(groups, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_PNW: Tensor, group_P: Tensor) -> Tensor:
        z_PNW = F.layer_norm(x_PNW, x_PNW.shape[-1:])
        z_PNW = F.gelu(torch.baddbmm(self.bias_GW[group_P][:, None], z_PNW, self.up_GWW[group_P]))
        return x_PNW + torch.bmm(self.drop(z_PNW), self.down_GWW[group_P])


class Hierarchical(RouterPrior):
    """The ``hierarchical`` predictor.

    Args:
        groups: how many groups of neighbouring layers to find in the training data, or the groups themselves
            as lists of layers. A point p > 0 belongs to the group of the layer it has reached, p = 0 to layer
            0's.
        group_tokens: training tokens that the groups are found on.
        width: of trunk and sub-models. depth: residual layers per sub-model. dropout: on their hidden units.
        heads: of the trunk's attention over tokens (0: none).
        token_dim, state_dim, decays: see :class:`PointFeatures`.
        those of :class:`RouterPrior`.

    Shapes:
        group_P (buffer): int64 group of each source point. similarity_LL (buffer): measured, zero if it was
            not.
        measured (buffer): bool, whether the groups were found in data. All three travel in the checkpoint.
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``.

    Raises:
        ConfigError: if ``groups`` is no partition of the layers, or below 1.
    """

    name: ClassVar[str] = "hierarchical"
    group_P: Tensor
    similarity_LL: Tensor
    measured: Tensor

    def __init__(
        self,
        *,
        groups: int | Sequence[Sequence[int]] = 3,
        group_tokens: int = 8192,
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        heads: int = 2,
        token_dim: int = 32,
        state_dim: int = 32,
        decays: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.given = not isinstance(groups, int)
        if isinstance(groups, int):
            if groups < 1:
                raise ConfigError(f"groups {groups} is below 1: choose how many groups of layers to find")
            found = equal_groups(self.layers, min(groups, self.layers))
        else:
            found = check_groups(groups, self.layers)
        self.group_tokens, G, P = group_tokens, len(found), self.layers + 1
        self.register_buffer("group_P", self._points_of(found))
        self.register_buffer("similarity_LL", torch.zeros(self.layers, self.layers))
        self.register_buffer("measured", torch.tensor(False))
        self.features = PointFeatures(
            **stack_of(self, decays), token_dim=token_dim, state_dim=state_dim, heads=0
        )
        around, used = token_dim * len(self.features.offsets), 2 * self.experts
        past = (
            self.lookahead * self.experts * (1 + len(self.features.decays)) if self.phase == "decode" else 0
        )
        rest = self.features.size - around - used - 3 * state_dim - past
        #: Columns of the features: token, this layer's and the previous one's experts, state, past, hidden.
        self.columns = [around, used, 3 * state_dim, past, rest]
        self.shared = nn.Linear(around + 3 * state_dim + rest, width)
        self.own = PointLinear(P, used + past, width)
        self.gate = PointLinear(P, self.experts, width, bias=1.0)
        nn.init.normal_(self.gate.weight, std=0.5)
        self.attention = SharedAttention(width, heads, self.bidirectional) if heads else None
        self.blocks = nn.ModuleList([GroupBlock(G, width, dropout) for _ in range(depth)])
        self.drop = nn.Dropout(dropout)
        self.entry_VF = nn.Embedding(self.vocab_size, self.lookahead * self.experts)
        nn.init.zeros_(self.entry_VF.weight)
        bias = prior_logit(self)
        self.head = PointLinear(P, width, self.lookahead * self.experts, zero=True, bias=bias)
        if self.host is not None:
            with torch.no_grad():  # where the router speaks, the correction starts at zero
                bias_PHE = self.head.bias_P1.view(P, self.lookahead, self.experts)
                bias_PHE[self.kinds == WITHIN] = 0.0

    def _points_of(self, groups: Sequence[Sequence[int]]) -> Tensor:
        group_P = torch.zeros(self.layers + 1, dtype=torch.int64)
        for number, group in enumerate(groups):
            group_P[torch.tensor(list(group)) + 1] = number
        group_P[0] = group_P[1]
        return group_P

    def grouping(self) -> list[list[int]]:
        """The layers of each group."""
        group_L = self.group_P[1:].tolist()
        return [[i for i, g in enumerate(group_L) if g == number] for number in range(max(group_L) + 1)]

    @torch.no_grad()
    def measure(self, similarity_LL: Tensor) -> None:
        """Cut the layers into as many groups as there are sub-models, by their similarity ``[L, L]``."""
        groups = segment(similarity_LL.cpu(), len(self.grouping()))
        self.group_P.copy_(self._points_of(groups))
        self.similarity_LL.copy_(similarity_LL)
        self.measured.fill_(True)

    def on_fit_start(self) -> None:
        """Find the groups in the training split, unless they are given or come from a checkpoint."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if self.given or bool(self.measured) or data is None:
            return
        loader = data.train_dataloader()
        size = (self.layers, self.experts, self.group_tokens, self.device)
        self.measure(routing_similarity(loader, *size))
        log.info("groups of layers: %s", self.grouping())

    def report(self) -> dict[str, Any]:
        """The groups, where they come from, and (if measured) how alike layers route within and across
        them."""
        origin = "given" if self.given else "measured" if bool(self.measured) else "equal"
        found: dict[str, Any] = {"groups": self.grouping(), "grouping": origin}
        if bool(self.measured):
            similarity_LL = self.similarity_LL.cpu()
            inside, between = contrast(similarity_LL, self.grouping())
            found |= {"similarity_within_groups": inside, "similarity_between_groups": between}
            found["similarity"] = [[round(x, 4) for x in row] for row in similarity_LL.tolist()]
        return found

    def trunk(self, batch: RoutingBatch) -> Tensor:
        """What all layers share, plus the reading of each layer's own experts: ``[P, B, T, W]``."""
        x_BTPF, routed_BTPE = self.features(batch)
        B, T, P = x_BTPF.shape[:3]
        token, used, state, past, hidden = x_BTPF.flatten(0, 1).transpose(0, 1).split(self.columns, dim=-1)
        routed_PNE = routed_BTPE.flatten(0, 1).transpose(0, 1)
        y_PNW = self.shared(torch.cat([token, state, hidden], dim=-1)) + self.own(
            torch.cat([used, past], dim=-1)
        )
        y_PNW = F.gelu(y_PNW) * self.gate(routed_PNE)
        y_PBTW = y_PNW.view(P, B, T, -1)
        if self.attention is not None:
            y_PBTW = y_PBTW + self.attention(F.layer_norm(y_PBTW, y_PBTW.shape[-1:]), batch.valid_BT)
        return y_PBTW

    def forward(self, batch: RoutingBatch) -> Tensor:
        B, T = batch.valid_BT.shape
        y_PNW = self.trunk(batch).flatten(1, 2)
        for block in self.blocks:
            y_PNW = block(y_PNW, self.group_P)
        out_PNF = self.head(self.drop(y_PNW))
        logits_BTPHE = out_PNF.transpose(0, 1).reshape(B, T, self.layers + 1, self.lookahead, self.experts)
        entry_BTF = lookup(self.entry_VF, batch.token_ids_BT) * ENTRY_GAIN
        entry_BT1HE = entry_BTF.view(B, T, 1, self.lookahead, self.experts)
        logits_BTPHE = torch.cat([logits_BTPHE[:, :, :1] + entry_BT1HE, logits_BTPHE[:, :, 1:]], dim=2)
        return self.corrected(batch, logits_BTPHE)
