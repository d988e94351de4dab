"""Experts that run from slots: the family's own class and kernels, on tensors that a store lends.

Nothing is computed here that transformers does not compute: its own ``forward`` runs on a stand-in for the
module (``Face``) whose tensors are views of the store's arena and whose indices are slots. So an
offloaded layer gives what the resident layer gives, bit for bit:

* ``grouped_mm`` and ``batched_mm`` take slots for experts. If one call needs more experts than there are
  slots, they run in waves; every wave has as many rows as the whole call (a kernel may choose its blocking by
  that number), rows of other waves being marked as another rank's experts are in expert parallelism. The rows
  are collected and summed once, as transformers sums them.
* ``eager`` and Switch Transformers add expert after expert, in ascending order; they ask for each expert's
  tensors when they come to it.

Letters: N tokens of a call, K experts per token, D hidden size, E experts of the layer, S slots.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from specgate.errors import ConfigError, StoreError
from specgate.moe.offload_kernels import (
    Face,
    Lookup,
    Rows,
    SwitchFace,
    implementation_of,
    pages_of,
    plain_attributes,
    run_original,
    used_experts,
)
from specgate.moe.offload_slots import Resident, Store, Visits
from specgate.small_tensors import to_device

#: Told of every call once its experts are there: layer, routing, weights (the arguments of the module).
Observer = Callable[[int, Tensor, Tensor], None]
#: Told of every call: layer, its experts in ascending order.
Counter = Callable[[int, Sequence[int]], None]


READ_AHEAD = 64
"""Experts that are read to host memory while others are copied, where all are loaded."""


class OffloadedExperts:
    """Mixed into a family's experts class (:func:`empty_experts`): no tensors of its own."""

    original: type[nn.Module]
    shapes: dict[str, tuple[int, ...]]
    tensor_names: list[str]
    plain: dict[str, Any]
    num_experts: int
    layer: int = -1
    runner: ExpertRunner | None = None
    #: All experts are there for good: the tensors are attributes of the module, as in the original.
    settled: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the original's.

        Raises:
            StoreError: outside the ``with`` block.
            ConfigError: in a backward pass.
        """
        hidden_ND, routing, weights = (*args, *kwargs.values())[:3]
        if self.settled and not torch.is_grad_enabled():
            there: Tensor = self.original.forward(self, hidden_ND, routing, weights)
            return there
        if self.runner is None:
            raise StoreError(
                "This model's experts are not in memory: its offload block was left (or never entered); "
                "use the model inside `with specgate.offload(...) as model`."
            )
        if torch.is_grad_enabled() and (hidden_ND.requires_grad or weights.requires_grad):
            out: Tensor = _NoGradient.apply(hidden_ND, weights, self, routing)
            return out
        return self.runner.run(self, hidden_ND, routing, weights)


class _NoGradient(torch.autograd.Function):
    """The experts in a graph that autograd draws: forward as ever, and an error instead of a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weights: Tensor, module: Any, routing: Tensor) -> Tensor:
        out: Tensor = module.runner.run(module, hidden_ND, routing, weights)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ConfigError(
            "Offloaded experts are for inference, no gradient goes through them; load the model without "
            "specgate.offload to train it."
        )


def empty_experts(module: nn.Module) -> None:
    """Takes the tensors out of an experts module and makes it run from slots.

    It stays an instance of its class, under the same name; ``shapes`` are those of one expert's tensors and
    ``tensor_names`` those that the module had.
    """
    experts: Any = module
    original = type(module)
    if isinstance(module, nn.ModuleDict):
        template = module["expert_0"].eval()
        shapes = {n.removesuffix(".weight"): tuple(p.shape) for n, p in template.named_parameters()}
        names = [name for name, _ in module.named_parameters()]
        module.clear()
        experts.template = (template,)  # in a tuple, so that it is no submodule
    else:
        shapes = {name: tuple(p.shape[1:]) for name, p in module.named_parameters()}
        names = list(shapes)
        for name in names:
            del module._parameters[name]
        experts.plain = plain_attributes(module)
    module.__class__ = _offloaded_class(original)
    experts.shapes, experts.tensor_names = shapes, names


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _offloaded_class(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _CLASSES:
        same = {"__module__": original.__module__, "__qualname__": original.__qualname__}
        # Compiled models go around it: what it does depends on what lies where.
        forward = torch.compiler.disable(OffloadedExperts.forward)
        members = {"original": original, "forward": forward, "__doc__": original.__doc__, **same}
        _CLASSES[original] = type(original.__name__, (OffloadedExperts, original), members)
    return _CLASSES[original]


class ExpertRunner:
    """Runs the experts of all layers of one model from one store.

    Calls are taken one at a time, so that several threads may use the model.

    Args:
        store: where the experts are.
        modules: the emptied experts modules in running order; ``layer`` is set on each.

    Attributes:
        observer: told of every call once its experts are there.
        counter: told which experts every call uses, once it has run.
        clock: calls so far, the time that deadlines are in.
        follows: the store takes its time from forecasts that it follows; then the clock here is not its.
    """

    def __init__(self, store: Store, modules: Sequence[nn.Module]) -> None:
        self.store = store
        self.observer: Observer | None = None
        self.counter: Counter | None = None
        self.clock = 0
        self.follows = False
        self._lock = threading.RLock()
        self._modules: list[Any] = list(modules)
        self._arenas: dict[str, Tensor] = {name: store.arena(name) for name in self._modules[0].shapes}
        self._resident: list[Resident] | None = None
        self._faces: dict[int, Face] = {}
        for layer, module in enumerate(self._modules):
            module.layer, module.runner = layer, self

    def close(self) -> None:
        """Leaves the modules without a store."""
        with self._lock:
            for module in self._modules:
                module.runner = None
                if module.settled:
                    module.settled = False
                    for name in module.shapes:
                        del module.__dict__[name]
            self._arenas, self._resident, self._faces = {}, None, {}

    def load_all(self) -> bool:
        """Loads every expert for good; from then on a call asks nothing of the store.

        Returns:
            Whether each layer's experts lie side by side, in whatever order, as they must for that.
        """
        found = []
        for layer, module in enumerate(self._modules):
            experts = list(range(module.num_experts))
            slots = self._acquire_in_order(layer, experts)
            first = min(slots)
            if sorted(slots) != list(range(first, first + len(slots))):
                for earlier in range(layer + 1):
                    self.store.release(earlier, experts)
                return False
            views = {name: arena[first : first + len(slots)] for name, arena in self._arenas.items()}
            found.append(Resident(views, [slot - first for slot in slots]))
        self._resident = found
        for module, here in zip(self._modules, found, strict=True):
            if here.in_order and not isinstance(module, nn.ModuleDict):
                module.__dict__.update(here.views)
                module.settled = True
        return True

    def _acquire_in_order(self, layer: int, experts: list[int]) -> list[int]:
        """Slots in the order of the experts. Those that pass through host memory take one when they are
        copied, in whatever order the disk gives them, unless they are asked for one by one.
        """
        room = int(getattr(self.store, "host_slots", 0))
        if not room:
            return self.store.acquire(layer, experts)
        slots: list[int] = []
        ahead, every = min(room // 2, READ_AHEAD), len(experts)
        for expert in range(every):
            begin = 1 if layer or expert else 0  # the first call asks for all that are to be read ahead of it
            for step in range(begin * ahead, ahead + 1):
                at, later = divmod(expert + step, every)
                if layer + at < len(self._modules):
                    self.store.prefetch(layer + at, later, 1.0, host=True)
            slots += self.store.acquire(layer, [expert])
        return slots

    def prefetch(self, layer: int, wanted: Sequence[tuple[int, float]], horizon: int) -> None:
        """Experts (and probabilities) that may be needed ``horizon`` MoE layers after the last call."""
        with self._lock:
            due, store = self.clock + horizon, cast(Any, self.store)
            if hasattr(store, "foresee"):
                first, count = layer * store.experts, len(wanted)
                store.foresee(
                    np.fromiter((first + expert for expert, _ in wanted), np.uint32, count),
                    np.fromiter((p for _, p in wanted), np.float64, count),
                    np.full(count, due, np.int64),
                )
                return
            for expert, p in wanted:
                self.store.prefetch(layer, expert, p, due)

    def run(self, module: Any, hidden_ND: Tensor, routing: Tensor, weights: Tensor) -> Tensor:
        """One call of one layer's experts.

        Args:
            routing, weights: as the module is called: indices and weights ``[N, K]``; in Switch Transformers
                a mask ``[N, 1, E]`` and probabilities ``[N, 1]``.
        """
        with self._lock:
            self.clock += 1
            if self._resident is not None:
                return self._run_resident(module, self._resident[module.layer], hidden_ND, routing, weights)
            if not self.follows:
                self.store.advance(self.clock)
            experts, flat = used_experts(routing, mask=isinstance(module, nn.ModuleDict))
            if not experts:
                return torch.zeros_like(hidden_ND)
            kernels = "loop" if isinstance(module, nn.ModuleDict) else implementation_of(module)
            if kernels in ("loop", "eager"):
                out = self._run_in_order(module, experts, hidden_ND, routing, weights)
            elif kernels == "batched_mm" and flat is not None and len(experts) <= self.store.num_slots:
                out = self._run_few(module, experts, flat, hidden_ND, routing, weights)
            else:
                rows = Rows(module, self._arenas, hidden_ND, routing, weights, flat)
                out = self._run_by_index(module, experts, rows, kernels, routing, weights)
            if self.counter is not None:
                self.counter(module.layer, experts)
            return out

    def _due(self) -> int | None:
        """When the next wave of this call is wanted."""
        return None if self.follows else self.clock

    def _observe(self, module: Any, routing: Tensor, weights: Tensor) -> None:
        if self.observer is not None:
            self.observer(module.layer, routing, weights)

    def _waves(self, experts: list[int]) -> list[list[int]]:
        """The experts in portions that fit; half the slots each, so that the next one can come meanwhile."""
        room = self.store.num_slots
        if len(experts) <= room:
            return [experts]
        room = max(1, room // 2)
        return [experts[i : i + room] for i in range(0, len(experts), room)]

    def _run_resident(
        self, module: Any, here: Resident, hidden_ND: Tensor, routing: Tensor, weights: Tensor
    ) -> Tensor:
        """From the layer's own stretch of the arena; the host waits for nothing."""
        if isinstance(module, nn.ModuleDict):
            face: Face = SwitchFace(module, here.views, here.places.__getitem__)
        elif here.in_order:
            face = here.face_of(module)
        elif implementation_of(module) == "eager":
            lookups = {name: Lookup(view, here.places.__getitem__) for name, view in here.views.items()}
            face = Face(module, lookups, module.plain)
        else:
            face = here.face_of(module)
            routing = here.table_on(routing.device)[routing]
        return run_original(module, face, hidden_ND, routing, weights)

    def _run_in_order(
        self, module: Any, experts: list[int], hidden_ND: Tensor, routing: Tensor, weights: Tensor
    ) -> Tensor:
        """The family's own loop, which comes to the experts in ascending order."""
        with Visits(self.store, module.layer, self._waves(experts), self._due()) as visits:
            self._observe(module, routing, weights)
            if isinstance(module, nn.ModuleDict):
                face: Face = SwitchFace(module, self._arenas, visits.slot)
            else:
                lookups = {name: Lookup(arena, visits.slot) for name, arena in self._arenas.items()}
                face = Face(module, lookups, module.plain)
            return run_original(module, face, hidden_ND, routing, weights)

    def _run_few(
        self,
        module: Any,
        experts: list[int],
        flat: list[int],
        hidden_ND: Tensor,
        routing: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """A decoded token: :meth:`_run_by_index` in one wave, with little to do before the kernels."""
        layer, store = module.layer, self.store
        slots = store.acquire(layer, experts)
        try:
            place = dict(zip(experts, slots, strict=True))
            index_NK = to_device([place[e] for e in flat], routing.device).view_as(routing)
            self._observe(module, routing, weights)
            return run_original(module, self._face_of(module), hidden_ND, index_NK, weights)
        finally:
            store.release(layer, experts)

    def _face_of(self, module: Any) -> Face:
        """The module's face with all slots, made once."""
        face = self._faces.get(module.layer)
        if face is None:
            more = {"num_experts": self.store.num_slots}
            face = self._faces[module.layer] = Face(module, self._arenas, module.plain | more)
        return face

    def _run_by_index(
        self, module: Any, experts: list[int], rows: Rows, kernels: str, routing: Tensor, weights: Tensor
    ) -> Tensor:
        """All experts at once by their slots, or in waves."""
        waves = self._waves(experts)
        with Visits(self.store, module.layer, waves, self._due()) as visits:
            self._observe(module, routing, weights)
            for wave in waves:
                slots = [visits.slot(expert) for expert in wave]
                pages = list(pages_of(wave, slots, self.store.num_slots, kernels))
                if len(waves) == len(pages) == 1:
                    return rows.whole(*pages[0])
                for page in pages:
                    rows.add(*page)
            return rows.total()
