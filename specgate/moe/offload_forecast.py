"""Foresees experts while an offloaded model runs: hands each predictor what it saw in training.

From what :mod:`specgate.moe.offload_hooks` sees, a :class:`Window` is made as a trace of the same run would
hold it (values rounded as a trace rounds them), and each new point of it is handed to the predictor of the
phase. A forecast moves experts earlier and changes no value.

Letters: B sequences, T tokens, C tokens of a window, L MoE layers of one stack, H horizons, E experts of a
layer, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from specgate.errors import CheckpointError
from specgate.forecast import Forecast
from specgate.moe.families import MoELayer
from specgate.moe.offload_hooks import Routed, StackWatcher, Start
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


#: Layer (over all stacks), its experts with their probabilities, most probable first, horizon.
Want = Callable[[int, Sequence[tuple[int, float]], int], None]


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


class Forecaster(StackWatcher):
    """Asks predictors at every point of a call.

    Args:
        model: offloaded.
        layers: its MoE layers in running order.
        predictors: at most one per stack and phase.
        want: called with the probabilities that reach ``threshold``, nearest horizon first.
        threshold: below it an expert is not worth a transfer.
        history: tokens of a window at most (C).

    Attributes:
        asked: forecasts so far.
        ignored: probabilities that were no numbers.
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
        super().__init__(model, layers)
        self.asked = self.ignored = 0
        self._want, self._threshold, self._history = want, threshold, history
        stacks = list(self._stacks)
        self._predictors = {(stack_of(p, stacks), p.phase): p for p in predictors}
        self._points = {k: (p.kinds != INVALID).any(1).tolist() for k, p in self._predictors.items()}

    def watched(self) -> list[str]:
        """The predictors' stacks."""
        return [stack for stack, _ in self._predictors]

    def started(self, stack: str, start: Start | None) -> None:
        """A token more in the window, or a new one over a prompt."""
        windows = self._windows()
        decoded = windows.pop((stack, "decode"), None)
        windows.pop((stack, "prefill"), None)
        if start is None:
            return
        phase = "decode" if start.decodes else "prefill"
        predictor = self._predictors.get((stack, phase))
        if predictor is None or (start.past and not start.decodes):
            return
        B, T = start.ids_BT.shape
        window = decoded if start.decodes and start.past else None
        if window is None or window.rows != B:
            dropped = self._stacks[stack][0].rule.score == "switch"
            most = self._history if start.decodes else min(self._history, T)
            window = Window(predictor, B, most, dropped, start.ids_BT.device)
        if start.decodes:
            position_B1 = torch.full_like(start.ids_BT, start.past)
            window.append(start.ids_BT, position_B1, torch.ones_like(start.ids_BT, dtype=torch.bool))
        else:
            window.pick_BT, positions_BT, valid_BT = _last_real(start.ids_BT, start.mask_BT, self._history)
            window.append(start.ids_BT.gather(1, window.pick_BT), positions_BT, valid_BT)
        windows[stack, phase] = window
        self._ask(stack, window, -1)

    def passed(self, layer: MoELayer, routed: Routed) -> None:
        """Foresee from here."""
        windows = self._windows()
        for phase in ("decode", "prefill"):
            window = windows.get((layer.stack, phase))
            if window is not None:
                window.know(
                    layer.index,
                    experts=routed.experts_BTK,
                    weights=routed.weights_BTK.half(),
                    dropped=routed.dropped_BT,
                    hidden=routed.hidden_BTD.half(),
                )
                self._ask(layer.stack, window, layer.index)

    def _windows(self) -> dict[tuple[str, str], Window]:
        """This thread's windows by stack and phase; of a stack at most one is open."""
        found: dict[tuple[str, str], Window] = self._local.__dict__.setdefault("windows", {})
        return found

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
        p_N = p_HE[p_HE >= self._threshold].tolist()
        wanted: dict[int, list[tuple[int, float]]] = {}
        for (h, expert), p in zip(found_N2, p_N, strict=True):
            wanted.setdefault(h, []).append((expert, p))
        for h in sorted(wanted, key=horizons.__getitem__):
            most_probable_first = sorted(wanted[h], key=lambda pair: -pair[1])
            self._want(self._first[stack] + targets[h], most_probable_first, horizons[h])


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


def _last_real(ids_BT: Tensor, real_BT: Tensor | None, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last tokens of each prompt with padding moved to the right, as a trace holds it.

    Returns:
        Which tokens ``[B, C]``, their positions among the real ones, and which of them are real.
    """
    T = ids_BT.shape[1]
    if real_BT is None:
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
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
