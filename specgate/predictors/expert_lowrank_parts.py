"""What ``expert_lowrank`` is made of, and what a forecast of it costs (expert_lowrank.py says how it works).

Letters: B sequences, T tokens, N = B * T, L MoE layers, P = L + 1 source points, H horizons, E experts per
layer, K experts per token, D size of the state looked at, R units per expert, A heads, C width of a head, V
width of its values, S width of a token's embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.predictors.expert_linear import ExpertLinear
from specgate.predictors.expert_units import ExpertUnits
from specgate.predictors.features import TOKEN_GAIN, points, prior_logit, shifted
from specgate.predictors.layers import PointLinear, lookup
from specgate.predictors.router_prior import RouterPrior
from specgate.traces.batch import INVALID, WITHIN, RoutingBatch

NGRAMS = (2, 3)
HASH, PRIME = 1_000_003, 2_147_483_647


class ExpertLowRankParts(RouterPrior):
    """Parameters, what ids say, and the operations of a forecast; the arguments are
    :class:`~specgate.predictors.expert_lowrank.ExpertLowRank`'s.

    Shapes:
        linear_PDF (parameter): ``[P, D, H * E]``.
        ngram_BTF: ``RoutingBatch`` -> ``[B, T, S]``. state_PND: -> ``[P, N, D]``.
    """

    limit_K: Tensor

    def __init__(
        self,
        *,
        units: int | list[int] = 12,
        foresee: list[int] | None = None,
        heads: int = 1,
        head_width: int = 16,
        value_width: int = 32,
        span: int | None = None,
        shared: int = 0,
        token_dim: int = 32,
        ngram_rows: int = 0,
        state_dim: int = 32,
        decays: list[float] | None = None,
        dropout: float = 0.0,
        reuse: bool = True,
        shift: bool = True,
        depth: bool = False,
        by_expert: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        by_rank = [units] * self.top_k if isinstance(units, int) else [int(n) for n in units]
        if len(by_rank) != self.top_k or min(by_rank) < 0 or max(by_rank) < 1:
            raise ConfigError(
                f"units={units} is not one number, or {self.top_k} (one per chosen expert): give either"
            )
        self.by_rank, units = by_rank, max(by_rank)
        self.register_buffer("limit_K", torch.tensor(by_rank), persistent=False)
        L, E, H = self.layers, self.experts, self.lookahead
        P, out = L + 1, H * E
        self.units, self.heads, self.head_width, self.value_width = units, heads, head_width, value_width
        self.decays = [0.7, 0.95] if decays is None else [float(a) for a in decays]
        self.offsets = [1, 0] if self.phase == "decode" else [1, 0, -1]
        self.token_VF = nn.Embedding(self.vocab_size, token_dim * len(self.offsets))
        nn.init.normal_(self.token_VF.weight, std=0.3 / TOKEN_GAIN)
        if span is not None and span < 1:
            raise ConfigError(f"span={span} leaves the heads no token to look at: choose at least 1, or null")
        self.span = span
        if ngram_rows < 0:
            raise ConfigError(f"ngram_rows={ngram_rows} is no size of a table: choose 0 for none, or more")
        tables = [nn.Embedding(ngram_rows, token_dim) for _ in NGRAMS if ngram_rows]
        for table in tables:
            nn.init.zeros_(table.weight)
        self.ngrams = nn.ModuleList(tables)
        if self.hidden_size is None:
            self.expert_LEF = nn.Parameter(torch.randn(L, E, state_dim) * 0.5)
            self.start_VF = nn.Embedding(self.vocab_size, state_dim)
        D = self.hidden_size or state_dim
        self.into = PointLinear(P, D, E * units + shared)
        self.shared = shared
        self.out = PointLinear(P, E * units + shared, out, zero=True)
        self.weight_out = PointLinear(P, E + token_dim, out, zero=True)
        self.linear_PDF = nn.Parameter(torch.zeros(P, D, out))
        self.linear_own = ExpertLinear(P, E, D, out) if by_expert else None
        self.value_own = ExpertLinear(P, E, D, heads * value_width) if by_expert and heads else None
        ahead = [int(n) for n in foresee or []] if H > 1 else []
        self.ahead = ExpertUnits(P, D, E, ahead, out - E, self.top_k == 1) if ahead else None
        if heads:
            self.query_key = PointLinear(P, D, (heads + 1) * head_width)  # the heads share their keys
            self.value = PointLinear(P, D, heads * value_width)
            self.mixed_out = PointLinear(P, heads * value_width, out, zero=True)
            self.slope_PA = nn.Parameter(torch.linspace(-4.0, 0.0, heads).repeat(P, 1))
        if self.phase == "decode":
            self.recent_CPHE = nn.Parameter(torch.zeros(1 + len(self.decays), P, H, E))
        self.entry_VF = nn.Embedding(self.vocab_size, out)
        nn.init.zeros_(self.entry_VF.weight)
        self.drop = nn.Dropout(dropout)
        self.shift_2PD = nn.Parameter(torch.zeros(2, P, D)) if shift else None
        self.depth_PD = nn.Parameter(torch.zeros(P, D)) if depth else None
        self.reuse_PHE = nn.Parameter(torch.zeros(P, H, E)) if reuse else None
        bias = prior_logit(self)
        start_PHE = torch.where((self.kinds == WITHIN) & (self.host is not None), 0.0, bias)
        self.bias_PHE = nn.Parameter(start_PHE[..., None].repeat(1, 1, E))

    def state_PND(self, batch: RoutingBatch, used_BTLE: Tensor, weighted_BTLE: Tensor) -> Tensor:
        """What is looked at: the hidden state over its root mean square, or a sum of embeddings."""
        if self.hidden_size is not None:
            assert batch.hidden_BTLD is not None
            hidden = batch.hidden_BTLD.float() * batch.valid_BT[:, :, None, None]
            state = points(hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6))
        else:
            step = torch.einsum("btle,lef->btlf", 0.5 * used_BTLE + weighted_BTLE, self.expert_LEF)
            start = self.start_VF(batch.token_ids_BT)[:, :, None]
            count_P1 = torch.arange(1, self.layers + 2, device=step.device)[:, None]
            state = torch.cat([start, step], dim=2).cumsum(2) * count_P1.rsqrt()
        return state.flatten(0, 1).transpose(0, 1)

    def ngram_BTF(self, batch: RoutingBatch) -> Tensor | float:
        """What the token's id together with the one, and the two, before it say: ``[B, T, S]``."""
        total: Tensor | float = 0.0
        for n, table in zip(NGRAMS, self.ngrams, strict=False):
            assert isinstance(table, nn.Embedding)
            key_BT = torch.zeros_like(batch.token_ids_BT)
            for by in range(n):  # an id of 0 before the first token
                key_BT = (key_BT * HASH + shifted(batch.token_ids_BT + 1, by)) % PRIME
            found_BTF = lookup(table, key_BT % table.num_embeddings)
            total = total + found_BTF * (TOKEN_GAIN * batch.valid_BT[..., None])
        return total

    def flops_per_token_layer(self, context: int) -> float | None:
        """Floating-point operations (a multiply-add is two) of the units that run, the keys and values of
        earlier tokens and the previous point's correction being kept; only where there is something to
        foresee. What is linear in the state (the routers, the shared map, the heaviest expert's own) counts
        as one product, since the sum of matrices is one. Additions per value are left out."""
        E, A, C, V = self.experts, self.heads, self.head_width, self.value_width
        D, token_dim = self.linear_PDF.shape[1], self.weight_out.weight.shape[1] - E
        both_ways = self.bidirectional or self.phase == "decode"
        seen: float = context if both_ways else context / 2
        if self.span is not None and self.span < context:
            sides = 2 if self.bidirectional else 1  # the first tokens see fewer than span
            seen = self.span * sides if both_ways else self.span - self.span**2 / (2 * context)
            seen = min(seen, context)
        running = sum(self.by_rank) + self.shared
        total = 0.0
        for p, targets_H in enumerate((self.kinds != INVALID).tolist()):
            out = sum(targets_H) * E
            if not out:
                continue
            total += token_dim * out + self.top_k * out
            if self.ahead is not None and out > E:
                total += sum(self.ahead.by_rank) * ((D if p else 0) + out - E)
            if p == 0 and self.hidden_size is not None:
                continue  # no state yet: what it adds is a constant
            total += D * out + running * (D + out)
            if A:
                total += D * ((A + 1) * C + A * V) + seen * A * (C + V) + A * V * out
        return 2.0 * total / self.layers
