"""What earlier tokens leave behind for a speculation launch: its buffers, and how a prompt fills them.

Letters: B sequences, T tokens of a prompt, L MoE layers, P = L + 1 source points, E experts per layer, K
experts per token, D hidden size, C decay rates, S running state, A attention heads, N tokens that attention
looks back on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Sizes = Mapping[str, int | float]


def state_buffers(sizes: Sizes, batch: int, context: int, device: torch.device) -> dict[str, Tensor]:
    """The buffers of ``SpeculationState`` (csrc/speculate.h) for fresh sequences, by name.

    Shapes:
        ids ``[B, 3]``, count, live ``[B]``, experts, weights ``[B, L, K]``, use ``[B, L, C, E]``, run ``[B,
        S]``, means ``[B, 2, S]``, unit ``[B, D]``, slow ``[B, L, D]``, memory ``[B, P, N, 2 A head_width]``;
        those that the predictor does not use are left out.
    """
    B, L, E, K = batch, int(sizes["layers"]), int(sizes["experts"]), int(sizes["top_k"])
    none, yes = torch.int32, torch.uint8
    buffers = {
        "ids": torch.full((B, 3), -1, dtype=none, device=device),
        "count": torch.zeros(B, dtype=none, device=device),
        "live": torch.ones(B, dtype=yes, device=device),
    }
    if not sizes.get("width"):
        return buffers
    D, S, C = int(sizes["hidden"]), int(sizes["state_dim"]), int(sizes["decays"])
    width = int(sizes["heads"]) * int(sizes["head_width"])
    buffers["experts"] = torch.full((B, L, K), -1, dtype=none, device=device)
    shapes: dict[str, tuple[int, ...]] = {"weights": (B, L, K), "run": (B, S), "means": (B, 2, S)}
    if C:
        shapes["use"] = (B, L, C, E)
    if D:
        shapes |= {"unit": (B, D), "slow": (B, L, D)}
    if width:
        shapes["memory"] = (B, L + 1, context, 2 * width)
    return buffers | {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}


def clear_rows(state: Mapping[str, Tensor], rows: Tensor | slice) -> None:
    """Make sequences fresh."""
    for name, buffer in state.items():
        buffer[rows] = -1 if name in ("ids", "experts") else 1 if name == "live" else 0


class Prompt:
    """Tokens that were read, not decoded: brings fresh state to where decoding goes on.

    Call :meth:`layer` once for every source point, in order. The same sums as a launch keeps running, as
    weighted sums over tokens; on the state's device, off the decode path.

    Args:
        state, sizes, tensors: of the Speculator.

    Shapes:
        token_ids_BT: integers. valid_BT: bool, False for padding, which may be on either side.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        sizes: Sizes,
        tensors: Mapping[str, Tensor],
        token_ids_BT: Tensor,
        valid_BT: Tensor | None,
    ) -> None:
        self.state, self.sizes, self.tensors = state, sizes, tensors
        device = state["ids"].device
        ids_BT = token_ids_BT.to(device)
        self.B, self.T = ids_BT.shape
        valid_BT = (
            torch.ones_like(ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT.to(device, torch.bool)
        )
        self.valid_BT = valid_BT & (ids_BT >= 0) & (ids_BT < int(sizes["vocab"]))
        order_BT = self.valid_BT.cumsum(1)
        self.age_BT = (order_BT[:, -1:] - order_BT).masked_fill(~self.valid_BT, self.T + 3)
        self.place_BT = (order_BT - 1).masked_fill(~self.valid_BT, -1)
        clear_rows(state, slice(0, self.B))
        state["count"][: self.B] = order_BT[:, -1].int()
        for back in range(3):
            state["ids"][: self.B, back] = self._newest(ids_BT + 1, back).int() - 1
        if sizes.get("width"):
            token_BTF = tensors["token"][ids_BT.clamp(0, int(sizes["vocab"]) - 1)]
            self.token_BTF = token_BTF * self.valid_BT[..., None]
            self.run_BTS = torch.zeros(self.B, self.T, int(sizes["state_dim"]), device=device)
            self._pass(-1, self.token_BTF @ tensors["start"].T, None)

    def layer(self, layer: int, hidden_BTD: Tensor | None, experts_BTK: Tensor, weights_BTK: Tensor) -> None:
        """The prompt has passed MoE layer ``layer``: its router's inputs, choices and weights (0 where
        dropped)."""
        if not self.sizes.get("width"):
            return
        state, B, E = self.state, self.B, int(self.sizes["experts"])
        experts_BTK = experts_BTK.to(self.valid_BT.device).clamp(0, E - 1)  # padding may hold anything
        weights_BTK = weights_BTK.to(self.valid_BT.device).float() * self.valid_BT[..., None]
        state["experts"][:B, layer] = self._newest(experts_BTK + 1, 0).int() - 1
        state["weights"][:B, layer] = self._newest(weights_BTK, 0)
        for c, decay in enumerate(self.tensors["decay"].tolist() if "decay" in self.tensors else []):
            share_BTK = self._decayed(decay, 0)[..., None].expand_as(weights_BTK)
            use_BE = torch.zeros(B, E, device=share_BTK.device)
            state["use"][:B, layer, c] = use_BE.scatter_add(1, experts_BTK.flatten(1), share_BTK.flatten(1))
        value_BTK1 = (weights_BTK + 0.5 * self.valid_BT[..., None])[..., None]
        step_BTS = (self.tensors["expert"][layer][experts_BTK] * value_BTK1).sum(2)
        unit_BTD = None
        if self.sizes["hidden"]:
            assert hidden_BTD is not None
            unit_BTD = self._unit(hidden_BTD.to(self.valid_BT.device).float())
            state["unit"][:B] = self._newest(unit_BTD, 0)
            share_BT1 = self._decayed(float(self.sizes["slow"]), 0)[..., None]
            state["slow"][:B, layer] = (unit_BTD * share_BT1).sum(1)
        self._pass(layer, step_BTS, unit_BTD)

    def _unit(self, hidden_BTD: Tensor) -> Tensor:
        mean_BT1 = hidden_BTD.pow(2).mean(-1, keepdim=True)
        good_BT1 = mean_BT1.isfinite() & self.valid_BT[..., None]
        unit_BTD = hidden_BTD / (mean_BT1 + float(self.sizes["unit_eps"])).sqrt()
        return torch.where(good_BT1, unit_BTD, 0.0)

    def _newest(self, x_BT: Tensor, back: int) -> Tensor:
        """The value of the token ``back`` before the last, 0 where there is none: ``[B, ...]``."""
        there_BT = self.age_BT == back
        return (x_BT * there_BT.view(*there_BT.shape, *[1] * (x_BT.dim() - 2))).sum(1)

    def _decayed(self, decay: float, lag: int) -> Tensor:
        """Weights of a decayed mean as it stands ``lag`` tokens before the last: ``[B, T]``."""
        age_BT = self.age_BT - lag
        weight_BT = (1 - decay) * decay ** age_BT.clamp(min=0).float()
        return weight_BT * ((age_BT >= 0) & self.valid_BT)

    def _pass(self, layer: int, step_BTS: Tensor, unit_BTD: Tensor | None) -> None:
        """Running state, its means, and the attention's memory at the point after ``layer``."""
        state, B = self.state, self.B
        self.run_BTS = self.run_BTS + step_BTS
        state["run"][:B] += self._newest(step_BTS, 0)
        for c in range(2):
            share_BT1 = self._decayed(float(self.sizes[f"mean_{c}"]), 1)[..., None]
            state["means"][:B, c] += (step_BTS * share_BT1).sum(1)
        if "memory" not in state:
            return
        if not self.sizes["hidden"]:
            seen_BTX = self.run_BTS / (layer + 2) ** 0.5
        elif unit_BTD is None:
            seen_BTX = torch.zeros(B, self.T, int(self.sizes["hidden"]), device=step_BTS.device)
        else:
            seen_BTX = unit_BTD
        width = int(self.sizes["heads"]) * int(self.sizes["head_width"])
        matrix_FX = self.tensors["attend"][layer + 1][:, width : 3 * width].float()
        keys_BTX = torch.cat([self.token_BTF, seen_BTX], dim=-1) @ matrix_FX
        keys_BTX = keys_BTX + self.tensors["attend_bias"][layer + 1, width : 3 * width]
        N = state["memory"].shape[2]
        row_N, time_N = (self.valid_BT & (self.age_BT < N)).nonzero(as_tuple=True)
        state["memory"][row_N, layer + 1, self.place_BT[row_N, time_N] % N] = keys_BTX[row_N, time_N]
