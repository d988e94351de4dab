"""Segment recurrence over the tokens: a Transformer-XL reads what has been routed, a head per source point
foresees what comes; a memory makes any segmentation give what the whole gives.

Letters: B sequences, T tokens of a segment, J = M + T keys (M tokens of memory), L MoE layers, P = L + 1
source points, H horizons, E experts, K experts per token, W trunk width, N rows of the trunk (B, or B * P), G
ids of a token and the two before, V token ids.

Dai et al., "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context", 2019, arXiv:1901.02860.
While decoding, a token is one position: its id and a summary of all layers of the token before, so that what
leaves the trunk at t is known before t's first layer. In prefill no token's later layers are known; there the
trunk reads, at every source point, the tokens' states of the layers passed (shared weights, the
points as further rows). Attention reaches ``memory`` tokens back in both cases, and the memory holds as many
inputs of every trunk layer, without gradient, so segments add up to the whole exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specgate.errors import ConfigError, SpecgateError
from specgate.predictors.features import prior_logit, stack_of
from specgate.predictors.layers import PointLinear
from specgate.predictors.mlp import ENTRY_GAIN, PointMLP
from specgate.predictors.recall import GRAMS, Recall
from specgate.predictors.relative import RelativeBlock, visible_TJ
from specgate.predictors.router_prior import RouterPrior
from specgate.predictors.stream import Carry, StreamFeatures, after
from specgate.traces.batch import WITHIN, RoutingBatch, targets


@dataclass(frozen=True)
class Memory:
    """What earlier segments leave behind; of bounded size and without gradient.

    Shapes:
        trunk: per trunk layer, and the trunk's output last, ``[N, m, W]`` with m <= memory. valid_Nm: bool,
            which of them are real. experts_BmLK: int64. grams_BmG: int64, -1 where there is no token.
        carry: name -> ``[B, ...]``, see :class:`StreamFeatures`.
    """

    trunk: list[Tensor]
    valid_Nm: Tensor
    experts_BmLK: Tensor
    grams_BmG: Tensor
    carry: Carry


class TransformerXL(RouterPrior):
    """The ``transformer_xl`` predictor.

    Args:
        memory: tokens that every trunk layer attends back, and that a memory holds.
        trunk_width, trunk_depth, trunk_heads: of the transformer over tokens.
        recall_heads: of the attention that returns earlier tokens' routing (see :class:`Recall`; decode
            only; 0: none).
        width, depth: of the head per source point. dropout: in trunk and head.
        token_dim, state_dim, decays, token_dropout, expert_dropout: see :class:`StreamFeatures`.
        Others: see :class:`RouterPrior`.

    Shapes:
        entry_VF (parameter): ``[V, H * E]``, a token table added at p = 0 (see :class:`MLP`).
        forward: ``RoutingBatch`` -> logits ``[B, T, P, H, E]``, without memory.

    Raises:
        ConfigError: for a trunk width that its heads do not divide, or a memory below 1.
    """

    name: ClassVar[str] = "transformer_xl"

    def __init__(
        self,
        *,
        memory: int = 256,
        trunk_width: int = 128,
        trunk_depth: int = 2,
        trunk_heads: int = 4,
        recall_heads: int = 2,
        width: int = 256,
        depth: int = 1,
        dropout: float = 0.1,
        token_dim: int = 32,
        state_dim: int = 32,
        decays: list[float] | None = None,
        token_dropout: float = 0.05,
        expert_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if trunk_width % (2 * trunk_heads):
            raise ConfigError(
                f"trunk_width={trunk_width} is no multiple of 2 * trunk_heads={2 * trunk_heads}"
            )
        if memory < 1:
            raise ConfigError(f"memory={memory} tokens is no memory: take at least 1")
        L_, H, E = self.layers, self.lookahead, self.experts
        self.memory = memory
        self.features = StreamFeatures(
            **stack_of(self, decays),
            token_dim=token_dim,
            state_dim=state_dim,
            token_dropout=token_dropout,
            expert_dropout=expert_dropout,
        )
        hidden = self.hidden_size or 0
        self.read_ids = nn.Linear(self.features.around, trunk_width)
        if self.phase == "decode":
            self.read_experts_LEW = nn.Parameter(torch.randn(L_, E, trunk_width) * L_**-0.5)
            self.read_hidden = nn.Linear(hidden, trunk_width, bias=False) if hidden else None
        else:
            self.read_state = PointLinear(L_ + 1, E + state_dim + hidden, trunk_width)
        self.trunk = nn.ModuleList(
            [RelativeBlock(trunk_width, trunk_heads, dropout) for _ in range(trunk_depth)]
        )
        self.leave_trunk = nn.LayerNorm(trunk_width)
        size = self.features.size + trunk_width
        self.recall: Recall | None = None
        if recall_heads and self.phase == "decode":
            self.recall = Recall(L_, E, self.top_k, H, trunk_width, recall_heads)
            size += self.recall.size
        bias = prior_logit(self)
        self.head = PointMLP(L_ + 1, size, width, depth, H, E, dropout, bias)
        self.entry_VF = nn.Embedding(self.vocab_size, H * E)
        nn.init.zeros_(self.entry_VF.weight)
        if self.host is not None:
            with torch.no_grad():  # where the router speaks, the correction starts at zero
                self.head.last.bias_P1.view(L_ + 1, H, E)[self.kinds == WITHIN] = 0.0

    def on_fit_start(self) -> None:
        """Start to note which ids training meets; refuse to run without routers."""
        super().on_fit_start()
        self.features.count_ids()

    # ------------------------------------------------------------------ calls

    def forward(self, batch: RoutingBatch) -> Tensor:
        return self._run(batch, None, 0)[0]

    def step(self, batch: RoutingBatch, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """One segment (a single token, for instance), after what ``memory`` remembers.

        Args:
            memory: of the step before; None at the start of the sequences. A sequence that ends within a
                segment (padding) has ended.

        Shapes:
            output: logits ``[B, T, P, H, E]`` and the memory for the next segment.

        Raises:
            SpecgateError: for a bidirectional stack, or a memory of another number of sequences.
        """
        if self.bidirectional:
            raise SpecgateError("a bidirectional stack is read whole: call forward, not step")
        if memory is not None and len(memory.grams_BmG) != len(batch.valid_BT):
            raise SpecgateError(
                f"the memory is of {len(memory.grams_BmG)} sequences, the segment of {len(batch.valid_BT)}:"
                " pass the memory of the same sequences"
            )
        logits_BTPHE, after_it = self._run(batch, memory, 0)
        assert after_it is not None
        return logits_BTPHE, after_it

    def training_loss(self, batch: RoutingBatch) -> Tensor:
        """The summed loss and imitation; context tokens before the first scored one go through the trunk
        alone."""
        scored_T = batch.mask_BT.any(0)
        first = int(scored_T.int().argmax()) if bool(scored_T.any()) else 0
        logits_BTPHE = self._run(batch, None, first)[0]
        rest = after_token(batch, first)
        total = self.loss(logits_BTPHE, *targets(rest, self.lookahead))
        return total + self.imitation_loss(rest, logits_BTPHE)

    # ------------------------------------------------------------------ inside

    def _run(self, batch: RoutingBatch, memory: Memory | None, first: int) -> tuple[Tensor, Memory | None]:
        """Logits of the tokens from ``first`` on, and the memory after the segment."""
        shown_BT = self.features.shown(batch)
        carry = None if memory is None else memory.carry
        x_BTPF, routed_BTPE, around_BTF, used_BTLE, new = self.features(batch, shown_BT, carry)
        if self.phase == "decode":
            start_NTW = self._decode_input(batch, around_BTF, used_BTLE, carry, new)
        else:
            start_NTW = self._prefill_input(batch, around_BTF, x_BTPF, routed_BTPE)
        kept, context_NTW, keys_NJW, valid_NJ = self._through_trunk(start_NTW, batch.valid_BT, memory)
        B, T, P = x_BTPF.shape[:3]
        if self.phase == "decode":
            context_BTPW = context_NTW[:, :, None].expand(-1, -1, P, -1)
        else:
            context_BTPW = context_NTW.view(B, P, T, -1).transpose(1, 2)
        blocks = [x_BTPF[:, first:], context_BTPW[:, first:]]
        grams_BJG, experts_BJLK = self._past(batch, memory)
        direct_BTPHE: Tensor | None = None
        if self.recall is not None:
            used_BJLE = used_BTLE
            if memory is not None:
                old_BmLE = torch.zeros(*memory.experts_BmLK.shape[:3], self.experts, device=used_BTLE.device)
                old_BmLE.scatter_(-1, memory.experts_BmLK, 1.0)
                used_BJLE = torch.cat([old_BmLE * memory.valid_Nm[:, :, None, None], used_BTLE], dim=1)
            share_BPATJ = self.recall.shares(
                context_NTW[:, first:],
                keys_NJW,
                grams_BJG[:, -T:][:, first:],
                grams_BJG,
                used_BTLE[:, first:],
                used_BJLE,
                self.memory,
            )
            found_BTPF, direct_BTPHE = self.recall(share_BPATJ, used_BJLE)
            blocks.append(self.features.drop(found_BTPF))
        logits_BTPHE = self.head(torch.cat(blocks, dim=-1), routed_BTPE[:, first:])
        if direct_BTPHE is not None:
            logits_BTPHE = logits_BTPHE + direct_BTPHE
        entry_BTF = self.entry_VF(batch.token_ids_BT) * (ENTRY_GAIN * shown_BT[..., None])
        entry_BT1HE = entry_BTF[:, first:].view(B, T - first, 1, self.lookahead, self.experts)
        logits_BTPHE = torch.cat([logits_BTPHE[:, :, :1] + entry_BT1HE, logits_BTPHE[:, :, 1:]], dim=2)
        logits_BTPHE = self.corrected(after_token(batch, first), logits_BTPHE)
        if self.bidirectional:
            return logits_BTPHE, None
        after_it = Memory(
            [self._last(x) for x in kept],
            self._last(valid_NJ),
            self._last(experts_BJLK),
            self._last(grams_BJG),
            {name: value.detach() for name, value in new.items()},
        )
        return logits_BTPHE, after_it

    def _last(self, x_NJ: Tensor) -> Tensor:
        return x_NJ[:, -self.memory :].detach()

    def _decode_input(
        self, batch: RoutingBatch, around_BTF: Tensor, used_BTLE: Tensor, old: Carry | None, new: Carry
    ) -> Tensor:
        """This token's id and all that the token before went through: ``[B, T, W]``."""
        summary_BTW = torch.einsum("btle,lew->btw", used_BTLE, self.read_experts_LEW)
        if self.read_hidden is not None:
            assert batch.hidden_BTLD is not None
            last_BTD = batch.hidden_BTLD[:, :, -1].float() * batch.valid_BT[..., None]
            unit_BTD = last_BTD * torch.rsqrt(last_BTD.pow(2).mean(-1, keepdim=True) + 1e-6)
            summary_BTW = summary_BTW + self.read_hidden(unit_BTD)
        new["summary"] = summary_BTW[:, -1]
        earlier_BTW = after(summary_BTW, None if old is None else old["summary"])
        out: Tensor = self.read_ids(around_BTF) + earlier_BTW
        return out

    def _prefill_input(
        self, batch: RoutingBatch, around_BTF: Tensor, x_BTPF: Tensor, routed_BTPE: Tensor
    ) -> Tensor:
        """At every point the token's ids and the layers passed: ``[B * P, T, W]``."""
        B, T, P = x_BTPF.shape[:3]
        at = self.features.around + 2 * self.experts
        seen = [routed_BTPE, x_BTPF[..., at : at + self.features.state_dim]]
        if self.hidden_size is not None:
            at = self.features.size - 3 * self.hidden_size - 1
            seen.append(x_BTPF[..., at : at + self.hidden_size])
        state_PNF = torch.cat(seen, dim=-1).flatten(0, 1).transpose(0, 1)
        state_PBTW = self.read_state(state_PNF).view(P, B, T, -1)
        return (state_PBTW + self.read_ids(around_BTF)).transpose(0, 1).flatten(0, 1)

    def _through_trunk(
        self, x_NTW: Tensor, valid_BT: Tensor, memory: Memory | None
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Every layer's inputs (memory included) and the output's; the output; its keys; which keys are
        real."""
        N, T = x_NTW.shape[:2]
        valid_NJ = valid_BT.repeat_interleave(N // len(valid_BT), dim=0)
        if memory is not None:
            valid_NJ = torch.cat([memory.valid_Nm, valid_NJ], dim=1)
        J = valid_NJ.shape[1]
        seen_TJ = visible_TJ(T, J, self.memory, not self.bidirectional, x_NTW.device)
        seen_NTJ = seen_TJ & valid_NJ[:, None]
        kept: list[Tensor] = []
        for i, block in enumerate([*self.trunk, None]):
            old = None if memory is None else memory.trunk[i]
            if block is None:
                x_NTW = self.leave_trunk(x_NTW)
            kept.append(x_NTW if old is None else torch.cat([old.to(x_NTW.dtype), x_NTW], dim=1))
            if block is not None:
                x_NTW = block(x_NTW, old, seen_NTJ)
        return kept, x_NTW, kept[-1], valid_NJ

    def _past(self, batch: RoutingBatch, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """Ids (each with the two before) and experts, memory and segment: ``[B, J, G]``, ``[B, J, L, K]``."""
        id_BT = batch.token_ids_BT.masked_fill(~batch.valid_BT, -1)
        old_B2 = id_BT.new_full((len(id_BT), GRAMS - 1), -1)
        if memory is not None:
            known = memory.grams_BmG[:, -1, : GRAMS - 1]
            old_B2 = known.flip(1)
        line = torch.cat([old_B2, id_BT], dim=1)
        T = id_BT.shape[1]
        grams_BTG = torch.stack([line[:, GRAMS - 1 - g : GRAMS - 1 - g + T] for g in range(GRAMS)], dim=-1)
        if memory is None:
            return grams_BTG, batch.experts_BTLK
        return (
            torch.cat([memory.grams_BmG, grams_BTG], dim=1),
            torch.cat([memory.experts_BmLK, batch.experts_BTLK], dim=1),
        )


def after_token(batch: RoutingBatch, first: int) -> RoutingBatch:
    """The batch without its first ``first`` tokens (views)."""
    if first == 0:
        return batch
    parts: dict[str, Any] = {
        k: v[:, first:] for k, v in vars(batch).items() if isinstance(v, Tensor) and v.dim() > 1
    }
    return replace(batch, **parts)
