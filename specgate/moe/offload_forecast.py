"""Foresees experts while an offloaded model runs: hands each predictor what it saw in training.

Hooks collect the residual stream before each MoE layer's norm; the experts' modules tell what was routed.
From that a :class:`Window` is made as a trace of the same run would hold it (values rounded as a trace rounds
them), and each new point of it is handed to the predictor of the phase. A forecast moves experts earlier and
changes no value.

Letters: B sequences, T tokens, C tokens of a window, L MoE layers of one stack, H horizons, E experts of a
layer, K experts per token, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from specgate.errors import CheckpointError
from specgate.forecast import Forecast
from specgate.moe.families import MoELayer
from specgate.moe.recorder import switch_outcome
from specgate.traces.batch import INVALID, RoutingBatch


class Foresees(Protocol):
    """What is asked of a predictor."""

    @property
    def name(self) -> str: ...

    layers: int
    experts: int
    top_k: int
    vocab_size: int
    hidden_size: int | None
    phase: str
    bidirectional: bool
    lookahead: int
    kinds: Tensor

    def predict_next_experts(self, state: RoutingBatch, layer: int | None = None) -> Forecast: ...

    def probabilities(self, batch: RoutingBatch) -> Tensor: ...


#: Layer (over all stacks), expert, probability, horizon.
Want = Callable[[int, int, float, int], None]


class Window:
    """The last tokens that a predictor looks at, of which the last is the current one.

    Args:
        predictor: what it wants to know.
        rows: sequences (B).
        most: tokens at most (C).
        dropped: whether the stack's capacity can drop tokens.
        device: of everything.

    Shapes:
        batch: ``T <= C`` tokens, views of what is kept; of the current token the layers run so far, zeros
            beyond.
        pick_BT: int64, which tokens of the call the window holds; None: its last one.
    """

    def __init__(
        self, predictor: Foresees, rows: int, most: int, dropped: bool, device: torch.device
    ) -> None:
        self.pick_BT: Tensor | None = None
        self._most, self._phase, self._filled = most, predictor.phase, 0
        size, cells = (rows, 2 * most), (rows, 2 * most, predictor.layers)
        zeros = partial(torch.zeros, device=device)
        self._kept: dict[str, Tensor] = {
            "experts_BTLK": zeros(*cells, predictor.top_k, dtype=torch.int64),
            "weights_BTLK": zeros(*cells, predictor.top_k),
            "token_ids_BT": zeros(size, dtype=torch.int64),
            "positions_BT": zeros(size, dtype=torch.int64),
            "valid_BT": zeros(size, dtype=torch.bool),
            "mask_BT": zeros(size, dtype=torch.bool),
        }
        if predictor.hidden_size is not None:
            self._kept["hidden_BTLD"] = zeros(*cells, predictor.hidden_size)
        if dropped:
            self._kept["dropped_BTL"] = zeros(cells, dtype=torch.bool)
        self._of_row = {name: zeros(rows, dtype=torch.int64) for name in ("domain_B", "document_B")}

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self._of_row["domain_B"])

    @property
    def batch(self) -> RoutingBatch:
        """What a trace would hold of it."""
        first = max(0, self._filled - self._most)
        seen: dict[str, Any] = {name: x[:, first : self._filled] for name, x in self._kept.items()}
        return RoutingBatch(**seen, **self._of_row, phase=self._phase)

    def append(self, ids_BT: Tensor, positions_BT: Tensor, valid_BT: Tensor) -> None:
        """Further tokens, at most C at once."""
        tokens = ids_BT.shape[1]
        if self._filled + tokens > 2 * self._most:
            start = self._filled - self._most
            for kept in self._kept.values():
                kept[:, : self._most] = kept[:, start : self._filled].clone()
            self._filled = self._most
        new = slice(self._filled, self._filled + tokens)
        for kept in self._kept.values():
            kept[:, new] = 0
        for name, value in (("token_ids_BT", ids_BT), ("positions_BT", positions_BT)):
            self._kept[name][:, new] = value
        for name in ("valid_BT", "mask_BT"):
            self._kept[name][:, new] = valid_BT
        self._filled += tokens

    def know(self, layer: int, **values: Tensor | None) -> None:
        """What a layer of the newest tokens says: name without its shape -> ``[B, T of the call, ...]``."""
        rows_B1 = torch.arange(self.rows, device=self._of_row["domain_B"].device)[:, None]
        for name, value in values.items():
            kept = next((x for full, x in self._kept.items() if full.startswith(f"{name}_")), None)
            if kept is None or value is None:
                continue
            new = value[:, -1:] if self.pick_BT is None else value[rows_B1, self.pick_BT]
            at = slice(self._filled - new.shape[1], self._filled)
            unreal = ~self._kept["valid_BT"][:, at].view(self.rows, -1, *[1] * (new.dim() - 2))
            kept[:, at, layer] = new.to(kept.dtype).masked_fill(unreal, 0)


@dataclass
class _Call:
    """What the current call through a stack has told so far."""

    window: Window | None = None
    hidden: Tensor | None = None
    router: tuple[Tensor, Tensor, Tensor] | None = None
    decoded: Window | None = None


class Forecaster:
    """Watches a model and asks its predictors; a context that leaves no hook behind.

    Args:
        model: offloaded.
        layers: its MoE layers in running order.
        predictors: at most one per stack and phase.
        want: called with every probability that reaches ``threshold``, nearest horizon first.
        threshold: below it an expert is not worth a transfer.
        history: tokens of a window at most (C).

    Raises:
        CheckpointError: if a predictor was made for another model.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[MoELayer],
        predictors: Sequence[Foresees],
        want: Want,
        threshold: float,
        history: int,
    ) -> None:
        self.ignored = 0
        self.asked = 0
        self._want, self._threshold, self._history = want, threshold, history
        self._model = model
        self._layers = list(layers)
        self._seq2seq = bool(self._model.config.is_encoder_decoder)
        self._stacks: dict[str, list[MoELayer]] = {}
        self._first: dict[str, int] = {}
        for at, layer in enumerate(layers):
            self._first.setdefault(layer.stack, at)
            self._stacks.setdefault(layer.stack, []).append(layer)
        self._predictors: dict[tuple[str, str], Foresees] = {}
        for predictor in predictors:
            stack = stack_of(predictor, list(self._stacks))
            check_predictor(predictor, self._stacks[stack], model)
            self._predictors[stack, predictor.phase] = predictor
        self._points = {k: (p.kinds != INVALID).any(1).tolist() for k, p in self._predictors.items()}
        self._handles: list[RemovableHandle] = []
        self._local = threading.local()

    def __enter__(self) -> Forecaster:
        try:
            for stack in {stack for stack, _ in self._predictors}:
                module = self._stack_module(stack)
                self._handles.append(
                    module.register_forward_pre_hook(_quiet(self._start_hook(stack)), with_kwargs=True)
                )
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
        """Layer ``at`` (over all stacks) is about to run these experts: foresee from here."""
        layer = self._layers[at]
        call = self._call(layer.stack)
        window = call.window
        if window is None or call.hidden is None:
            return
        B, T = call.hidden.shape[:2]
        if call.router is not None:
            experts, dropped = switch_outcome(*call.router)
        else:
            weights, order = weights.detach().sort(dim=-1, descending=True, stable=True)
            experts, dropped = routing.gather(-1, order).view(B, T, -1), None
        window.know(
            layer.index,
            experts=experts,
            weights=weights.detach().half().view(B, T, -1),
            dropped=dropped,
            hidden=call.hidden.half(),
        )
        self._ask(layer.stack, window, layer.index)

    # ------------------------------------------------------------------ inside

    def _call(self, stack: str) -> _Call:
        calls: dict[str, _Call] = self._local.__dict__.setdefault("calls", {})
        return calls.setdefault(stack, _Call())

    def _stack_module(self, stack: str) -> nn.Module:
        model: Any = self._model
        if not self._seq2seq:
            found: nn.Module = model.base_model
        else:
            found = model.get_encoder() if stack == "encoder" else model.get_decoder()
        return found

    def _start_hook(self, stack: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._call(stack)
            call.window = call.hidden = call.router = None
            ids_BT = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids_BT, Tensor):
                cache = kwargs.get("past_key_values")
                past = 0 if cache is None else int(cache.get_seq_length())
                self._start(stack, call, ids_BT, past, kwargs.get("attention_mask"))

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

    def _start(self, stack: str, call: _Call, ids_BT: Tensor, past: int, mask: Tensor | None) -> None:
        """A call through the stack begins: a token more in the window, or a new one over a prompt."""
        B, T = ids_BT.shape
        decodes = T == 1 and (past > 0 or (self._seq2seq and stack == "decoder"))
        predictor = self._predictors.get((stack, "decode" if decodes else "prefill"))
        window = call.decoded if decodes and past else None
        call.decoded = None
        if predictor is None or (past and not decodes):
            return
        if window is None or window.rows != B:
            dropped = self._stacks[stack][0].rule.score == "switch"
            most = self._history if decodes else min(self._history, T)
            window = Window(predictor, B, most, dropped, ids_BT.device)
        if decodes:
            position_B1 = torch.full_like(ids_BT, past)
            window.append(ids_BT, position_B1, torch.ones_like(ids_BT, dtype=torch.bool))
            call.decoded = window
        else:
            window.pick_BT, positions_BT, valid_BT = _last_real(ids_BT, mask, self._history)
            window.append(ids_BT.gather(1, window.pick_BT), positions_BT, valid_BT)
        call.window = window
        self._ask(stack, window, -1)

    def _ask(self, stack: str, window: Window, layer: int) -> None:
        batch = window.batch
        predictor = self._predictors[stack, batch.phase]
        if not self._points[stack, batch.phase][layer + 1]:
            return
        self.asked += 1
        with torch.no_grad():
            if predictor.phase == "decode":
                forecast = predictor.predict_next_experts(batch, layer=layer)
                p_HE, target_H, horizon_H = forecast.p_HE, forecast.target_layer_H, forecast.horizon_H
            else:
                p_HE, target_H, horizon_H = _merged(predictor, batch, layer)
        p_HE = p_HE.float().cpu().clamp(max=1.0)
        self.ignored += int(p_HE.isnan().sum())
        targets, horizons = target_H.tolist(), horizon_H.tolist()
        found_N2 = (p_HE >= self._threshold).nonzero().tolist()  # NaN never is
        for horizon, minus_p, target, expert in sorted(
            (horizons[h], -float(p_HE[h, e]), targets[h], e) for h, e in found_N2
        ):
            self._want(self._first[stack] + target, expert, -minus_p, horizon)


def window_bytes(predictor: Foresees, rows: int, most: int) -> int:
    """Bytes of a :class:`Window` of ``rows`` sequences and ``most`` tokens."""
    cell = 12 * predictor.top_k + 4 * (predictor.hidden_size or 0)
    return rows * 2 * most * (predictor.layers * cell + 18)


def stack_of(predictor: Foresees, stacks: Sequence[str]) -> str:
    """The stack that a predictor was trained on; a checkpoint does not name it, but says how it reads."""
    if predictor.bidirectional and "encoder" in stacks:
        return "encoder"
    return "decoder" if "decoder" in stacks else stacks[0]


def check_predictor(predictor: Foresees, layers: Sequence[MoELayer], model: Any) -> None:
    """Refuses a predictor of another model.

    Raises:
        CheckpointError: naming the first value that differs.
    """
    config = model.config
    wanted = {"layers": len(layers), "experts": layers[0].num_experts, "top_k": layers[0].top_k}
    if predictor.hidden_size is not None:
        wanted["hidden_size"] = int(config.hidden_size)
    for name, want in wanted.items():
        if getattr(predictor, name) != want:
            raise CheckpointError(
                f"{predictor.name} was trained for {name}={getattr(predictor, name)} and this model's "
                f"{layers[0].stack} has {name}={want}: use one that was trained on traces of this model"
            )
    if predictor.vocab_size < int(config.vocab_size):
        raise CheckpointError(
            f"{predictor.name} was trained for {predictor.vocab_size} token ids and this model has "
            f"{config.vocab_size}: use a predictor that was trained on traces of this model"
        )


def _quiet(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile leaves alone."""
    quiet: Callable[..., None] = torch.compiler.disable(hook)
    return quiet


def _last_real(ids_BT: Tensor, mask: Tensor | None, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last tokens of each prompt with padding moved to the right, as a trace holds it.

    Returns:
        Which tokens ``[B, C]``, their positions among the real ones, and which of them are real.
    """
    T = ids_BT.shape[1]
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids_BT.shape:
        real_BT = mask.bool()
    count_B1 = real_BT.sum(1, keepdim=True)
    step_C = torch.arange(min(most, T), device=ids_BT.device)
    start_B1 = (count_B1 - len(step_C)).clamp(min=0)
    order_BT = real_BT.int().argsort(dim=1, descending=True, stable=True)
    place_BC = (start_B1 + step_C).clamp(max=T - 1)
    return order_BT.gather(1, place_BC), place_BC, step_C < count_B1 - start_B1


def _merged(predictor: Foresees, batch: RoutingBatch, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """P(any token of any sequence needs the expert), from the same layer of all tokens."""
    p_BTHE = predictor.probabilities(batch)[:, :, layer + 1]
    missed_BTHE = torch.where(batch.valid_BT[..., None, None], 1 - p_BTHE, 1.0)
    there_H = (predictor.kinds[layer + 1] != INVALID).nonzero().flatten().cpu()
    p_HE = 1 - missed_BTHE.flatten(0, 1).prod(0)
    return p_HE[there_H.to(p_HE.device)], layer + 1 + there_H, there_H + 1
