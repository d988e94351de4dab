"""The host's own layers, run on whole windows from recorded hidden states, at reduced precision.

Letters: B sequences, T tokens, N = B * T, L MoE layers, E experts per layer, K experts per token, D hidden
size, I width of an expert, A attention heads, C width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.moe.decision import RoutingRule, decide, normalise
from specgate.predictors.quantize import GROUP, fake_quantise, group_of

EXACT = ("embedding", "attention_norm", "norm", "query_norm", "key_norm", "router", "bias")
"""Kept at full precision: tables that are looked up, norms, and the routers, whose choice is what is asked
for."""


class ShadowHost(nn.Module):
    """Attention blocks and experts of one stack.

    Args:
        plain, shapes: what :func:`specgate.moe.anatomy.anatomy` says of the host, and its tensors' shapes.
        tensors: its tensors; None leaves zeros to be filled by a checkpoint.
        bits: of the weights: 16 (as they are), 8 or 4. experts: which of the K experts run, ``all``, ``one``
        (the heaviest) or ``none``. bidirectional: an encoder. capacity: whether full experts drop tokens
        (prefill).
    """

    def __init__(
        self,
        plain: Mapping[str, Any],
        shapes: Mapping[str, list[int]],
        tensors: Mapping[str, Tensor] | None,
        *,
        bits: int,
        experts: str,
        bidirectional: bool,
        capacity: bool,
    ) -> None:
        super().__init__()
        self.plain, self.experts, self.bidirectional = dict(plain), experts, bidirectional
        self.rule = RoutingRule(**plain["rule"])
        if not capacity:
            self.rule = replace(self.rule, capacity=None)
        self.heads, self.gated = plain["heads"], plain["family"] == "olmoe"
        self.repeats = plain["heads"] // plain["key_heads"]
        for name, shape in shapes.items():
            value = torch.zeros(*shape) if tensors is None else tensors[name].float()
            if tensors is not None and bits < 16 and name not in EXACT:
                value = fake_quantise(value, bits, -1, group_of(bits, GROUP, value.shape[-1]))
            self.register_buffer(name, value)

    def get(self, name: str, layer: int) -> Tensor:
        """One layer's part of a stacked tensor."""
        found: Tensor = getattr(self, name)[layer]
        return found

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The residual stream before the first layer: ``[B, T, D]``."""
        table: Tensor = self.embedding  # type: ignore[assignment]
        return table[ids_BT]

    # ------------------------------------------------------------------ experts

    def add_experts(
        self, x_BTD: Tensor, layer: int, routed: tuple[Tensor, Tensor, Tensor | None] | None = None
    ) -> Tensor:
        """The residual stream after a layer's experts: ``[B, T, D]``.

        Args:
            x_BTD: the stream entering the layer's norm.
            routed: experts, weights ``[B, T, K]`` and dropped ``[B, T]`` where they are known; None: the
                layer's own router decides.
        """
        if self.experts == "none":
            return x_BTD
        normed_BTD = self.normed(x_BTD, layer)
        if routed is None:
            choice = decide(self.rule, {"router_weight": self.get("router", layer)}, normed_BTD)
            routed = choice.experts, choice.weights, choice.dropped
        experts_BTK, weights_BTK, dropped_BT = routed
        if self.experts == "one":
            experts_BTK, weights_BTK = experts_BTK[..., :1], weights_BTK[..., :1]
        weights_BTK = weights_BTK.float()
        if dropped_BT is not None:
            weights_BTK = weights_BTK * ~dropped_BT[..., None]
        return x_BTD + self.run_experts(normed_BTD, layer, experts_BTK, weights_BTK)

    def run_experts(self, normed_BTD: Tensor, layer: int, experts_BTK: Tensor, weights_BTK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs: ``[B, T, D]``. All experts are computed and the others
        weighted 0: an upper reference is not built for speed."""
        up_EID, down_EDI = self.get("up", layer), self.get("down", layer)
        weight_BTE = weights_BTK.new_zeros(*experts_BTK.shape[:2], len(up_EID))
        weight_BTE.scatter_add_(-1, experts_BTK, weights_BTK)
        y_NEI = (normed_BTD.flatten(0, 1) @ up_EID.flatten(0, 1).T).unflatten(-1, up_EID.shape[:2])
        if self.gated:
            gate, y_NEI = y_NEI.chunk(2, dim=-1)
            y_NEI = F.silu(gate) * y_NEI
        else:
            y_NEI = F.relu(y_NEI)
        y_NEI = y_NEI * weight_BTE.flatten(0, 1)[..., None]
        return (y_NEI.flatten(1) @ down_EDI.mT.flatten(0, 1)).view_as(normed_BTD)

    def normed(self, x_BTD: Tensor, layer: int) -> Tensor:
        """What the layer's router and experts read."""
        return normalise(self.rule, self.get("norm", layer), x_BTD)

    # ------------------------------------------------------------------ attention

    def add_attention(
        self, x_BTD: Tensor, layer: int, place: Place, past_BTD: Tensor | None = None
    ) -> Tensor:
        """The residual stream after a layer's attention block: ``[B, T, D]``.

        Args:
            past_BTD: what entered the block at each token when it was run for real; then earlier tokens are
                seen as they were (decode), and a token sees only itself as ``x_BTD`` has it.
        """
        q_BATC, k_BATC, v_BATC = self._heads(x_BTD, layer, place)
        bias = place.bias_A1TT
        if past_BTD is None:
            scores = q_BATC @ k_BATC.mT * place.scale + bias
            mixed_BATC = scores.masked_fill(~place.seen_B1TT, -torch.inf).softmax(-1) @ v_BATC
        else:
            _, pastk_BATC, pastv_BATC = self._heads(past_BTD, layer, place)
            scores = q_BATC @ pastk_BATC.mT * place.scale + bias
            own_BAT = (q_BATC * k_BATC).sum(-1) * place.scale + bias.diagonal(dim1=-2, dim2=-1)
            eye_TT = torch.eye(x_BTD.shape[1], dtype=torch.bool, device=x_BTD.device)
            scores = torch.where(eye_TT, own_BAT[..., None], scores)
            share = scores.masked_fill(~place.seen_B1TT, -torch.inf).softmax(-1)
            own_BAT = share.diagonal(dim1=-2, dim2=-1)
            mixed_BATC = share.masked_fill(eye_TT, 0.0) @ pastv_BATC + own_BAT[..., None] * v_BATC
        return x_BTD + mixed_BATC.transpose(1, 2).flatten(2) @ self.get("output", layer).T

    def _heads(self, x_BTD: Tensor, layer: int, place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head."""
        normed_BTD = normalise(self.rule, self.get("attention_norm", layer), x_BTD)
        q, k, v = (normed_BTD @ self.get(name, layer).T for name in ("query", "key", "value"))
        if self.gated:
            q, k = self._unit(q, "query_norm", layer), self._unit(k, "key_norm", layer)
            if self.plain["clip"] is not None:
                q, k, v = (x.clamp(-self.plain["clip"], self.plain["clip"]) for x in (q, k, v))
        width = q.shape[-1] // self.heads
        q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
        if place.cosine_B1TC is not None:
            q, k = place.turned(q), place.turned(k)
        return q, k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)

    def _unit(self, x: Tensor, name: str, layer: int) -> Tensor:
        return normalise(replace(self.rule, norm_eps=self.plain["eps"]), self.get(name, layer), x)

    def place(self, positions_BT: Tensor, valid_BT: Tensor) -> Place:
        """Where the tokens of a batch stand, for all layers."""
        return Place(self, positions_BT, valid_BT)


class Place:
    """Masks, rotations and biases of a batch's positions.

    Shapes:
        seen_B1TT: bool, which tokens (last axis) each token attends to; a padded token attends to itself
        alone. bias_A1TT: relative position bias (zero for rotary hosts).
        cosine_B1TC, sine_B1TC: rotation of queries and keys, or None.
    """

    def __init__(self, host: ShadowHost, positions_BT: Tensor, valid_BT: Tensor) -> None:
        plain, device = host.plain, positions_BT.device
        T = positions_BT.shape[1]
        order_TT = torch.ones(T, T, dtype=torch.bool, device=device)
        if not host.bidirectional:
            order_TT = order_TT.tril()
        eye_TT = torch.eye(T, dtype=torch.bool, device=device)
        self.seen_B1TT = ((order_TT & valid_BT[:, None, :]) | eye_TT)[:, None]
        self.cosine_B1TC: Tensor | None = None
        self.sine_B1TC: Tensor | None = None
        query: Tensor = host.query  # type: ignore[assignment]
        width = query.shape[1] // host.heads
        if host.gated:
            self.scale = width**-0.5
            self.bias_A1TT = torch.zeros(1, T, T, device=device)
            powers_C = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
            angle_BTC = positions_BT[..., None].float() / plain["theta"] ** powers_C
            angle_B1TC = torch.cat([angle_BTC, angle_BTC], dim=-1)[:, None]
            self.cosine_B1TC, self.sine_B1TC = angle_B1TC.cos(), angle_B1TC.sin()
        else:
            self.scale = 1.0
            index_T = torch.arange(T, device=device)
            table_RA: Tensor = host.bias  # type: ignore[assignment]
            distance_TT = index_T[None] - index_T[:, None]
            buckets_TT = bucket(distance_TT, host.bidirectional, plain["buckets"], plain["max_distance"])
            self.bias_A1TT = table_RA[buckets_TT].permute(2, 0, 1)

    def turned(self, x_BATC: Tensor) -> Tensor:
        """Rotated by position (Su et al., 2021, arXiv:2104.09864)."""
        assert self.cosine_B1TC is not None
        assert self.sine_B1TC is not None
        first, second = x_BATC.chunk(2, dim=-1)
        return x_BATC * self.cosine_B1TC + torch.cat([-second, first], dim=-1) * self.sine_B1TC


def bucket(distance: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """Row of T5's table for key position minus query position (Raffel et al., 2020, arXiv:1910.10683): half
    the buckets one position each, the rest growing logarithmically; later positions have buckets of their
    own if ``bidirectional``."""
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)
