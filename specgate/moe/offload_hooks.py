"""Watches the stacks of a model: when a call begins, and what enters and leaves each router.

Letters: B sequences, T tokens of a call, N = B * T, E experts of a layer, K experts per token, D hidden size.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specgate.moe.families import MoELayer
from specgate.moe.recorder import switch_outcome


@dataclass
class Start:
    """A call through a stack begins.

    Attributes:
        ids_BT: the tokens' ids.
        past: tokens that the stack's cache holds of each sequence, padding included.
        mask_BT: True where a token is real; None: everywhere.
        decodes: whether it is one more token of each sequence, as in a trace of generation.
    """

    ids_BT: Tensor
    past: int
    mask_BT: Tensor | None
    decodes: bool


@dataclass
class Routed:
    """What a layer routed.

    Shapes:
        hidden_BTD: the residual stream that entered its norm.
        experts_BTK, weights_BTK: in descending order of weight if so asked for; where capacity dropped the
            token, the expert that was meant.
        dropped_BT: whether capacity dropped the token, or None.
    """

    hidden_BTD: Tensor
    experts_BTK: Tensor
    weights_BTK: Tensor
    dropped_BT: Tensor | None


@dataclass
class _Call:
    hidden: Tensor | None = None
    router: tuple[Tensor, Tensor, Tensor] | None = None


class StackWatcher(ABC):
    """Base of what follows a model's calls; a context that leaves no hook behind.

    A subclass says what is done in :meth:`started` and :meth:`passed`. Threads that share a model do not see
    each other's calls.

    Args:
        model: offloaded.
        layers: its MoE layers in running order.

    Attributes:
        in_order: whether :meth:`passed` is given experts in descending order of weight; else as the router
            chose them, which saves a sort.
    """

    in_order = True

    def __init__(self, model: Any, layers: Sequence[MoELayer]) -> None:
        self._model, self._layers = model, list(layers)
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self._stacks: dict[str, list[MoELayer]] = {}
        self._first: dict[str, int] = {}
        for at, layer in enumerate(layers):
            self._first.setdefault(layer.stack, at)
            self._stacks.setdefault(layer.stack, []).append(layer)
        self._handles: list[RemovableHandle] = []
        self._local = threading.local()

    @abstractmethod
    def watched(self) -> Iterable[str]:
        """The stacks to watch."""

    @abstractmethod
    def started(self, stack: str, start: Start | None) -> None:
        """A call through a stack begins; None: one that has no token ids."""

    @abstractmethod
    def passed(self, layer: MoELayer, routed: Routed) -> None:
        """A layer's router has spoken, and its experts are there."""

    def __enter__(self) -> Any:
        try:
            for stack in set(self.watched()):
                start = _quiet(self._start_hook(stack))
                module = self._stack_module(stack)
                self._handles.append(module.register_forward_pre_hook(start, with_kwargs=True))
                for layer in self._stacks[stack]:
                    self._handles.append(layer.norm.register_forward_pre_hook(_quiet(self._norm_hook(stack))))
                    if layer.rule.score == "switch":
                        hook = _quiet(self._router_hook(stack))
                        self._handles.append(layer.router.register_forward_hook(hook))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def routed(self, at: int, routing: Tensor, weights: Tensor) -> None:
        """Layer ``at`` (over all stacks) is about to run: the arguments of its experts module."""
        layer = self._layers[at]
        call = self._call(layer.stack)
        if call.hidden is None:
            return
        B, T = call.hidden.shape[:2]
        if call.router is not None:
            experts, dropped = switch_outcome(*call.router)
        elif not self.in_order:
            experts, dropped = routing.view(B, T, -1), None
        else:
            weights, order = weights.detach().sort(dim=-1, descending=True, stable=True)
            experts, dropped = routing.gather(-1, order).view(B, T, -1), None
        weights_BTK = weights.detach().view(B, T, -1)
        self.passed(layer, Routed(call.hidden, experts, weights_BTK, dropped))

    # ------------------------------------------------------------------ inside

    def _call(self, stack: str) -> _Call:
        calls: dict[str, _Call] = self._local.__dict__.setdefault("calls", {})
        return calls.setdefault(stack, _Call())

    def _stack_module(self, stack: str) -> nn.Module:
        if not self._seq2seq:
            found: nn.Module = self._model.base_model
        else:
            found = self._model.get_encoder() if stack == "encoder" else self._model.get_decoder()
        return found

    def _start_hook(self, stack: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._call(stack)
            call.hidden = call.router = None
            ids_BT = kwargs.get("input_ids", args[0] if args else None)
            if not isinstance(ids_BT, Tensor):
                self.started(stack, None)
                return
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            mask = kwargs.get("attention_mask")
            mask_BT = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids_BT.shape else None
            # An encoder-decoder's decoder begins with one start token, which a trace counts as decoded.
            decodes = ids_BT.shape[1] == 1 and (past > 0 or (self._seq2seq and stack == "decoder"))
            self.started(stack, Start(ids_BT, past, mask_BT, decodes))

        return hook

    def _norm_hook(self, stack: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._call(stack).hidden = args[0].detach()

        return hook

    def _router_hook(self, stack: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
            mask_BTE, weights_BT1, logits_BTE = (t.detach() for t in output)
            self._call(stack).router = (mask_BTE, weights_BT1, logits_BTE)

        return hook


def _quiet(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile leaves alone."""
    quiet: Callable[..., None] = torch.compiler.disable(hook)
    return quiet
