"""The host's own routers, kept as buffers, so that a predictor can ask "what would layer m choose on this
hidden state?".

Letters: L MoE layers, E experts per layer, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specgate.errors import ConfigError


class HostRouters(nn.Module):
    """Norm and router of every MoE layer, applied to any residual stream.

    Root-mean-square norms only (every family in ``specgate/moe/families.py`` has one): x / sqrt(mean(x^2) +
    eps) * weight.

    Args:
        layers, experts, top_k, hidden_size: of the stack. eps: of the norm.
        routers: layer -> ``norm_weight [D]``, ``router_weight [E, D]``, optionally ``router_bias [E]``,
            ``correction_bias [E]`` (DeepSeek-V3: added to the sigmoid scores for the choice); None leaves
            zeros to be filled by a checkpoint.

    Shapes:
        weight_LED (buffer): router weight times norm weight. bias_LE, correction_LE, corrected_L, known:
            buffers.

    Raises:
        ConfigError: if the routers do not fit the stack.
    """

    weight_LED: Tensor
    bias_LE: Tensor
    correction_LE: Tensor
    corrected_L: Tensor
    known: Tensor

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        hidden_size: int,
        eps: float,
        routers: Mapping[int, Mapping[str, Tensor]] | None,
    ) -> None:
        super().__init__()
        self.top_k, self.eps = top_k, eps
        self.register_buffer("weight_LED", torch.zeros(layers, experts, hidden_size))
        self.register_buffer("bias_LE", torch.zeros(layers, experts))
        self.register_buffer("correction_LE", torch.zeros(layers, experts))
        self.register_buffer("corrected_L", torch.zeros(layers, dtype=torch.bool))
        self.register_buffer("known", torch.tensor(False))
        self.corrects = False  # corrected_L.any(), kept here so that asking does not wait for the device
        self.register_load_state_dict_post_hook(HostRouters._loaded)
        if routers is not None:
            self.fill(routers)

    def fill(self, routers: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Takes the routers, as the constructor does.

        Raises:
            ConfigError: if they do not fit the stack.
        """
        L, E, D = self.weight_LED.shape
        if sorted(routers) != list(range(L)):
            raise ConfigError(
                f"the trace has routers of MoE layers {sorted(routers)}, the stack has {L}: collect it again"
            )
        for layer, parts in routers.items():
            if tuple(parts["router_weight"].shape) != (E, D) or tuple(parts["norm_weight"].shape) != (D,):
                raise ConfigError(
                    f"router {layer} is {tuple(parts['router_weight'].shape)}, the stack needs ({E}, {D}):"
                    " collect it again"
                )
            self.weight_LED[layer] = parts["router_weight"].float() * parts["norm_weight"].float()
            if "router_bias" in parts:
                self.bias_LE[layer] = parts["router_bias"].float()
            if "correction_bias" in parts:
                self.correction_LE[layer] = parts["correction_bias"].float()
                self.corrected_L[layer] = True
        self.known.fill_(True)
        self._loaded()

    def _loaded(self, *_: object) -> None:
        self.corrects = bool(self.corrected_L.any())

    def scores(self, hidden: Tensor, layer: Tensor, centre: bool = True) -> Tensor:
        """What the routers of ``layer`` choose by, if the residual stream entering them were ``hidden``.

        Shapes:
            hidden: ``[B, T, L, D]`` (axis 2: where it was taken) or ``[B, T, L, H, D]`` (one per horizon
            too). layer: ``[L, H]`` int64, the router to apply.
            output: ``[B, T, L, H, E]``, centred by :meth:`centred` unless ``centre`` is False.
        """
        equation = "btld,lhed->btlhe" if hidden.dim() == 4 else "btlhd,lhed->btlhe"
        with torch.autocast(hidden.device.type, enabled=False):  # near ties are decided by the last digits
            hidden = hidden.float()
            unit = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
            logits = torch.einsum(equation, unit, self.weight_LED[layer]) + self.bias_LE[layer]
            return self._chosen_by(logits, layer, centre)

    def scores_at(self, hidden: Tensor, first: int) -> Tensor:
        """:meth:`scores` of routers ``first``, ``first + 1``, ..., one for each row of axis 1: ``[B, C, D]``
        -> ``[B, C, E]``."""
        unit = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        layer = slice(first, first + hidden.shape[1])
        logits = (unit[:, :, None] @ self.weight_LED[layer].mT)[:, :, 0] + self.bias_LE[layer]
        return self._chosen_by(logits, layer)

    def _chosen_by(self, logits: Tensor, layer: Tensor | slice, centre: bool = True) -> Tensor:
        if self.corrects:
            chosen_by = logits.sigmoid() + self.correction_LE[layer]
            logits = torch.where(self.corrected_L[layer][..., None], chosen_by, logits)
        return self.centred(logits) if centre else logits

    def centred(self, logits: Tensor) -> Tensor:
        """K > 1: shifted so that 0 lies midway between the K-th and the next largest, the threshold of
        membership."""
        if self.top_k == 1 or self.top_k >= logits.shape[-1]:
            return logits
        top = logits.detach().topk(self.top_k + 1, dim=-1).values
        return logits - 0.5 * (top[..., -1:] + top[..., -2:-1])
