"""A batch of routing sequences, and what is to be foreseen from each point of it.

Letters: B sequences, T tokens, L MoE layers of one stack, P = L + 1 source points, H horizons, E experts per
layer, K experts per token, D hidden size.

A source point p says what is known: p = 0 is "before the first MoE layer" (the token's id is known, none of
its routing), p = l + 1 is "layer l's router input exists" (so layers up to l are known). Horizon h counts MoE
layers ahead of the point: from p the target is MoE layer p - 1 + h of the same token, or, past the last layer
and only while decoding, layer p - 1 + h - L of the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

WITHIN, WRAPPED, ENTRY, INVALID = 0, 1, 2, -1
KINDS = {WITHIN: "within", WRAPPED: "wrapped", ENTRY: "entry"}


@dataclass(frozen=True)
class StackSpec:
    """What a predictor must know of the stack whose routing it foresees (plain values, so that a checkpoint
    keeps it).

    Attributes:
        layers: MoE layers in the stack (L).
        experts: experts per layer (E).
        top_k: experts per token (K).
        hidden_size: width of the recorded residual stream (D), or None for id-only traces.
        vocab_size: number of token ids.
        phase: ``"prefill"`` or ``"decode"``.
        bidirectional: whether a token attends to later ones (an encoder): then, in prefill, the layers
            already run are known of every token, of later ones too.
    """

    layers: int
    experts: int
    top_k: int
    hidden_size: int | None
    vocab_size: int
    phase: str
    bidirectional: bool = False


@dataclass
class RoutingBatch:
    """Windows of routed tokens, padded on the right.

    Shapes:
        experts_BTLK: int64, in rank order (descending weight).
        weights_BTLK: float32 router weights of those experts.
        token_ids_BT: int64.
        positions_BT: int64, absolute position in the host's context.
        valid_BT: bool, True for real tokens (context included), False for padding.
        mask_BT: bool, True for tokens whose forecasts are scored (a subset of ``valid_BT``).
        domain_B, document_B: int64.
        hidden_BTLD: float32 residual stream entering each MoE layer's norm, or None.
        dropped_BTL: bool, True where Switch's capacity dropped the token, or None.
    """

    experts_BTLK: Tensor
    weights_BTLK: Tensor
    token_ids_BT: Tensor
    positions_BT: Tensor
    valid_BT: Tensor
    mask_BT: Tensor
    domain_B: Tensor
    document_B: Tensor
    hidden_BTLD: Tensor | None = None
    dropped_BTL: Tensor | None = None
    phase: str = "prefill"

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RoutingBatch:
        """The same batch with every tensor on ``device``."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RoutingBatch:
        """The same batch in page-locked memory (called by the DataLoader)."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> RoutingBatch:
        """The same batch with ``change`` applied to every tensor."""
        tensors: dict[str, Any] = {
            f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


def batch_chunks(batch: RoutingBatch, sequences: int) -> list[RoutingBatch]:
    """The batch in pieces of at most ``sequences`` sequences (views, nothing is copied)."""
    B = batch.valid_BT.shape[0]
    if sequences >= B:
        return [batch]
    names = [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)]
    return [
        replace(batch, **{name: getattr(batch, name)[i : i + sequences] for name in names})
        for i in range(0, B, sequences)
    ]


def last_valid_B(valid_BT: Tensor) -> Tensor:
    """Index of each sequence's last real token: ``[B]`` int64 (-1 where there is none)."""
    count_T = torch.arange(1, valid_BT.shape[1] + 1, device=valid_BT.device)
    return (valid_BT * count_T).amax(1) - 1


def kind_PH(layers: int, horizons: int, phase: str) -> Tensor:
    """Which of WITHIN, WRAPPED, ENTRY or INVALID each (point, horizon) is.

    Shapes:
        output: ``[P, H]`` int64 with P = ``layers + 1``; column h0 holds horizon h0 + 1.
    """
    point_P1 = torch.arange(layers + 1)[:, None]
    target_PH = point_P1 + torch.arange(horizons)[None, :]  # layer p - 1 + h, h = h0 + 1
    past = WRAPPED if phase == "decode" else INVALID
    kind = torch.where(point_P1 == 0, ENTRY, WITHIN).expand_as(target_PH)
    kind = torch.where(target_PH >= layers, past, kind)
    return torch.where(target_PH >= 2 * layers, INVALID, kind)


def targets(batch: RoutingBatch, horizons: int) -> tuple[Tensor, Tensor]:
    """The experts to foresee from every point, and where there is something to score.

    Shapes:
        experts_BTPHK: ``[B, T, P, H, K]`` int64 in rank order (zeros where invalid).
        valid_BTPH: ``[B, T, P, H]`` bool.
    """
    experts_BTLK = batch.experts_BTLK
    L = experts_BTLK.shape[2]
    kinds = kind_PH(L, horizons, batch.phase).to(experts_BTLK.device)
    # Two tokens' layers side by side: column j < L is this token's layer j, j >= L the next token's j - L.
    next_BTLK = torch.cat([experts_BTLK[:, 1:], torch.zeros_like(experts_BTLK[:, :1])], dim=1)
    next_ok_BT = torch.cat([batch.valid_BT[:, 1:], torch.zeros_like(batch.valid_BT[:, :1])], dim=1)
    both = torch.cat([experts_BTLK, next_BTLK], dim=2)
    index_PH = (torch.arange(L + 1)[:, None] + torch.arange(horizons)[None, :]).clamp(max=2 * L - 1)
    experts_BTPHK = both[:, :, index_PH.to(experts_BTLK.device)]
    scored_BT11 = batch.mask_BT[:, :, None, None]
    valid = (kinds != INVALID) & scored_BT11 & ((kinds != WRAPPED) | next_ok_BT[:, :, None, None])
    return experts_BTPHK * valid[..., None], valid
