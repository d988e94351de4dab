"""All experts of a layer in two grouped matrix products, for training on a GPU.

transformers runs Switch's experts one after another and OLMoE's in float32 when the weights are kept in
float32; here the
tokens are sorted by expert and both products run as one kernel each in bfloat16. The values agree with the
originals up to
rounding (tested).

Letters: N tokens, D hidden size, I expert width, E experts, K experts per token.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def grouped_experts(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    up_EID: Tensor,
    down_EDI: Tensor,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum over a token's experts of weight * down(act(up(x))).

    Shapes:
        x_ND: ``[N, D]``; ids_NK, weights_NK: ``[N, K]``; up_EID: ``[E, I', D]`` (I' = 2 I where ``act``
        gates);
        down_EDI: ``[E, D, I]``; output: ``[N, D]`` in the dtype of ``x_ND``.
    """
    N, K = ids_NK.shape
    E = up_EID.shape[0]
    ids_S, order_S = ids_NK.reshape(-1).sort()
    rows_SD = x_ND[order_S // K].to(torch.bfloat16)
    ends_E = torch.searchsorted(ids_S, torch.arange(E, device=ids_S.device), right=True).to(torch.int32)
    mid_SI = act(torch._grouped_mm(rows_SD, up_EID.to(torch.bfloat16).transpose(-2, -1), offs=ends_E))
    out_SD = torch._grouped_mm(mid_SI, down_EDI.to(torch.bfloat16).transpose(-2, -1), offs=ends_E)
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(N * K, device=order_S.device))
    out_NKD = out_SD[back_S].view(N, K, -1)
    return (out_NKD * weights_NK.unsqueeze(-1).to(out_NKD.dtype)).sum(1).to(x_ND.dtype)


def _switch_forward(self: nn.ModuleDict, hidden_ND: Tensor, mask_N1E: Tensor, weights_N1: Tensor) -> Tensor:
    mask_NE = mask_N1E[:, 0]
    kept_N1 = mask_NE.sum(-1, keepdim=True).to(weights_N1.dtype)  # zero where capacity dropped the token
    experts = [self[f"expert_{e}"] for e in range(mask_NE.shape[-1])]
    up = torch.stack([e.wi.weight for e in experts])  # type: ignore[union-attr, misc]
    down = torch.stack([e.wo.weight for e in experts])  # type: ignore[union-attr, misc]
    act = experts[0].act
    return grouped_experts(hidden_ND, mask_NE.argmax(-1, keepdim=True), weights_N1 * kept_N1, up, down, act)  # type: ignore[arg-type]


def _gated_forward(self: nn.Module, hidden_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    return grouped_experts(hidden_ND, ids_NK, weights_NK, self.gate_up_proj, self.down_proj, self._apply_gate)  # type: ignore[arg-type]


@contextmanager
def grouped(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with``, the experts of ``model`` (Switch or OLMoE) run grouped; afterwards as before."""
    changed: list[nn.Module] = []
    for module in model.modules():
        name = type(module).__name__
        if name in ("SwitchTransformersExperts", "OlmoeExperts"):
            run = _switch_forward if name.startswith("Switch") else _gated_forward
            module.forward = types.MethodType(run, module)
            changed.append(module)
    try:
        yield model
    finally:
        for module in changed:
            del module.forward
