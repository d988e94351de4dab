"""Records what a Mixture-of-Experts model routes where, while it runs.

Hooks sit where a decision takes effect: on the call into the experts module, whose arguments are what
executes (on Switch's router, which alone knows what its capacity dropped). They keep references and
nothing else; everything is put in order once per batch, in :meth:`Recorder.take`. They work in ``forward``
and in ``generate`` alike.

Letters: B sequences, T tokens of one call, N = B * T, C calls, L MoE layers of one stack, h as in ``Lh``
the layers whose hidden states are kept, E experts, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specgate.errors import ConfigError, SpecgateError
from specgate.moe.families import MoELayer, agrees, decide, moe_layers, router_input

HIDDEN = ("none", "fp16", "int8")
FP16_TINY = 2.0**-24


@dataclass
class Routing:
    """What one call through one stack routed. All tensors are on the CPU.

    Shapes:
        experts_BTLK: uint8, or int32 with more than 256 experts, in descending order of weight.
        weights_BTLK: float16.
        dropped_BTL: bool, True where Switch's capacity dropped the token, or None.
        hidden_BTLD: float16 or int8 ``[B, T, Lh, D]`` residual stream entering the MoE layers' norms, or
            None.
        scale_BTL: float16 ``[B, T, Lh]`` of int8 hidden states (x = q * scale), or None.
        agrees_BTL: bool, whether the decision recomputed by hand from the exact hidden state is what
            executed; None without control.

    Attributes:
        step: number of the call since the last ``take()``: in ``generate`` 0 is the prompt, then one per
            new token.
    """

    experts_BTLK: Tensor
    weights_BTLK: Tensor
    dropped_BTL: Tensor | None = None
    hidden_BTLD: Tensor | None = None
    scale_BTL: Tensor | None = None
    agrees_BTL: Tensor | None = None
    step: int = 0

    @property
    def phase(self) -> str:
        """``prefill`` for the first call after ``take()`` (forward, prompt), ``decode`` for later ones."""
        return "prefill" if self.step == 0 else "decode"

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}

    def select(self, mask_BT: Tensor) -> dict[str, Tensor]:
        """The tokens where ``mask_BT`` is True: field name without its shape -> ``[N, ...]``."""
        keep = mask_BT.bool().cpu()
        return {k.partition("_")[0]: v[keep] for k, v in self.tensors().items()}


def join(calls: Sequence[Routing]) -> Routing:
    """One Routing of several calls on the same sequences, joined along T (the steps of a ``generate``)."""
    parts = [c.tensors() for c in calls]
    return Routing(**{k: torch.cat([p[k] for p in parts], dim=1) for k in parts[0]}, step=calls[0].step)


@dataclass
class _Buffer:
    """References kept between two ``take()`` calls for one layer, one entry per call."""

    experts: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    norm_input: Tensor | None = None


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states as int8 with one float16 scale per token (x is close to q * scale).

    Shapes:
        hidden: ``[..., D]`` -> int8 ``[..., D]``, float16 ``[...]``.
    """
    x = hidden.float()
    scale = (x.abs().amax(-1) / 127.0).half()
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    return (x / divisor[..., None]).round().clamp(-127, 127).to(torch.int8), scale


class Recorder:
    """Records routing while a model runs inside the ``with`` block; leaving it removes every hook.

    ::

        with Recorder(model, hidden="fp16") as recorder:
            model(**inputs)
            calls = recorder.take()          # {"decoder": [Routing]}
            model.generate(**inputs)
            prompt, *steps = recorder.take()["decoder"]

    Args:
        model: a loaded host of a supported family.
        hidden: keep the residual stream that enters each MoE layer's norm: ``none``, ``fp16`` or ``int8``.
        layers: MoE layers whose hidden states are kept, for all stacks or per stack; all of them when None.
        stacks: stacks to record; all of them when None.
        control: recompute each decision by hand from the exact hidden state (``Routing.agrees_BTL``).

    Raises:
        UnknownArchitectureError: if the model's family has no adapter or is broken.
        ConfigError: for an unknown ``hidden``, layer or stack.
    """

    def __init__(
        self,
        model: nn.Module,
        hidden: str = "none",
        layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        stacks: Sequence[str] | None = None,
        control: bool = False,
    ) -> None:
        if hidden not in HIDDEN:
            raise ConfigError(f"hidden={hidden!r} is not known; choose one of {', '.join(HIDDEN)}.")
        self.hidden, self.control = hidden, control
        self.layers: dict[str, list[MoELayer]] = {}
        for layer in moe_layers(model):
            self.layers.setdefault(layer.stack, []).append(layer)
        if stacks is not None:
            if unknown := sorted(set(stacks) - set(self.layers)):
                raise ConfigError(
                    f"stack {unknown[0]!r} is not in this model; it has {', '.join(self.layers)}."
                )
            self.layers = {name: self.layers[name] for name in self.layers if name in stacks}
        self.hidden_layers = {
            name: self._subset(name, layers) if hidden != "none" else [] for name in self.layers
        }
        self._buffers: dict[str, list[_Buffer]] = {}
        self._handles: list[RemovableHandle] = []
        self.clear()

    def _subset(self, stack: str, layers: Sequence[int] | Mapping[str, Sequence[int]] | None) -> list[int]:
        count = len(self.layers[stack])
        wanted = layers.get(stack) if isinstance(layers, Mapping) else layers
        if wanted is None:
            return list(range(count))
        chosen = sorted({int(i) for i in wanted})
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise ConfigError(
                f"hidden_layers={list(wanted)} does not fit the {stack}; its MoE layers are 0 to {count - 1}."
            )
        return chosen

    def clear(self) -> None:
        """Forgets what was recorded since the last :meth:`take` (after an interrupted forward pass, say)."""
        self._buffers = {name: [_Buffer() for _ in layers] for name, layers in self.layers.items()}

    def __enter__(self) -> Recorder:
        if self._handles:
            raise SpecgateError(
                "This Recorder is already recording; leave its `with` block before entering again."
            )
        self.clear()
        try:
            for name, layers in self.layers.items():
                for layer, buffer in zip(layers, self._buffers[name], strict=True):
                    self._attach(layer, buffer)
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        self.clear()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach(self, layer: MoELayer, buffer: _Buffer) -> None:
        stack, index = layer.stack, layer.index
        of = lambda: self._buffers[stack][index]  # noqa: E731 (the buffer is replaced by every take)
        keep_hidden = index in self.hidden_layers[stack]
        if keep_hidden or self.control:
            self._handles.append(layer.norm.register_forward_pre_hook(self._norm_hook(of, keep_hidden)))
        if index == 0:
            self._handles.append(layer.block.register_forward_pre_hook(_shape_hook(of), with_kwargs=True))
        if layer.rule.score == "switch":
            self._handles.append(layer.router.register_forward_hook(self._switch_hook(layer, of)))
        else:
            hook = self._experts_hook(layer, of)
            self._handles.append(layer.experts.register_forward_pre_hook(hook, with_kwargs=True))

    def _norm_hook(self, of: Callable[[], _Buffer], keep: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            buffer, hidden = of(), args[0].detach()
            if self.control:
                buffer.norm_input = hidden
            if keep and self.hidden == "fp16":
                buffer.hidden.append(hidden.half())
            elif keep:
                quantised, scale = quantise(hidden)
                buffer.hidden.append(quantised)
                buffer.scale.append(scale)

        return hook

    def _experts_hook(self, layer: MoELayer, of: Callable[[], _Buffer]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, experts, weights = (*args, *kwargs.values())[:3]
            buffer = of()
            buffer.experts.append(experts)
            buffer.weights.append(weights.detach())
            if self.control and buffer.norm_input is not None:
                hidden, buffer.norm_input = buffer.norm_input, None
                with torch.no_grad():
                    decision = decide(layer, router_input(layer, hidden).reshape(-1, hidden.shape[-1]))
                    buffer.agrees.append(agrees(decision, experts))

        return hook

    def _switch_hook(self, layer: MoELayer, of: Callable[[], _Buffer]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            one_hot, weights, logits = (t.detach() for t in output)
            buffer = of()
            buffer.experts.append(one_hot)
            buffer.weights.append(weights)
            buffer.logits.append(logits)
            if self.control and buffer.norm_input is not None:
                hidden, buffer.norm_input = buffer.norm_input, None
                with torch.no_grad():
                    decision = decide(layer, router_input(layer, hidden))
                    experts, dropped = switch_outcome(one_hot, weights, logits)
                    buffer.agrees.append(agrees(decision, experts, dropped))

        return hook

    def take(self) -> dict[str, list[Routing]]:
        """What was recorded since the last call, per stack one Routing per call of the stack; then starts
        anew.

        Padding is still in there: :meth:`Routing.select` leaves it out by a mask.

        Raises:
            SpecgateError: if the stack's layers were not all called equally often: something goes past its
                modules.
        """
        taken, self._buffers = self._buffers, {}
        self.clear()
        return {name: self._in_order(name, buffers) for name, buffers in taken.items()}

    def _in_order(self, stack: str, buffers: list[_Buffer]) -> list[Routing]:
        calls = len(buffers[0].shapes)
        for layer, b in zip(self.layers[stack], buffers, strict=True):
            if len(b.experts) != calls:
                raise SpecgateError(
                    f"{layer.name} ran {calls} times but its experts {len(b.experts)} times: a fused kernel "
                    "or an interrupted forward pass went past the modules; load the model without kernels."
                )
        if not calls:
            return []
        shapes = buffers[0].shapes
        if self.layers[stack][0].rule.score == "switch":
            outcome = [
                [switch_outcome(*call) for call in zip(b.experts, b.weights, b.logits, strict=True)]
                for b in buffers
            ]
            experts_LNK = _stack([[experts for experts, _ in layer] for layer in outcome], 1)
            dropped_LN = _stack([[dropped for _, dropped in layer] for layer in outcome], 0)
        else:
            experts_LNK, dropped_LN = _stack([b.experts for b in buffers], 1), None
        weights_LNK = _stack([b.weights for b in buffers], 1)
        if experts_LNK.shape[-1] > 1:
            weights_LNK, order_LNK = weights_LNK.sort(dim=-1, descending=True, stable=True)
            experts_LNK = experts_LNK.gather(-1, order_LNK)
        narrow = torch.uint8 if self.layers[stack][0].num_experts <= 256 else torch.int32
        kept = [buffers[i] for i in self.hidden_layers[stack]]
        whole = {
            "experts_BTLK": experts_LNK.to(narrow),
            "weights_BTLK": weights_LNK.half(),
            "dropped_BTL": dropped_LN,
            "hidden_BTLD": _stack([b.hidden for b in kept], 1) if kept else None,
            "scale_BTL": _stack([b.scale for b in kept], 0) if kept and self.hidden == "int8" else None,
            "agrees_BTL": _stack([b.agrees for b in buffers], 0) if self.control else None,
        }
        found = {k: v.transpose(0, 1).cpu() for k, v in whole.items() if v is not None}
        cuts = [b * t for b, t in shapes]
        pieces = {k: v.split(cuts) for k, v in found.items()}
        return [
            Routing(**{k: v[i].reshape(*shape, *v[i].shape[1:]) for k, v in pieces.items()}, step=i)
            for i, shape in enumerate(shapes)
        ]


def _shape_hook(of: Callable[[], _Buffer]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()))
        of().shapes.append((hidden.shape[0], hidden.shape[1]))

    return hook


def switch_outcome(one_hot_BTE: Tensor, weights_BT1: Tensor, logits_BTE: Tensor) -> tuple[Tensor, Tensor]:
    """The expert each token was meant for ``[B, T, 1]``, and whether capacity dropped it ``[B, T]``.

    A dropped token's dispatch row is all zero, so its expert is the best of the router's probabilities,
    rounded as the router rounds them before it chooses.
    """
    slots_BT, experts_BT = one_hot_BTE.max(-1)
    dropped_BT = slots_BT == 0
    if dropped_BT.any():
        intended_N = logits_BTE[dropped_BT].softmax(-1).to(weights_BT1.dtype).argmax(-1)
        experts_BT = experts_BT.masked_scatter(dropped_BT, intended_N)
    return experts_BT.unsqueeze(-1), dropped_BT


def _stack(layers: list[list[Tensor]], trailing: int) -> Tensor:
    """Calls joined along tokens, layers stacked: ``[L, N, ...]`` with ``trailing`` dimensions after N."""
    flat = [[t.reshape(-1, *t.shape[t.dim() - trailing :]) for t in calls] for calls in layers]
    joined = [calls[0] if len(calls) == 1 else torch.cat(calls) for calls in flat]
    if len({t.device for t in joined}) > 1:  # the layers are spread over several devices
        joined = [t.cpu() for t in joined]
    return torch.stack(joined)
