"""A family's own kernels on the tensors of slots: stand-ins for an experts module, and calls in portions.

transformers' ``forward`` of the family runs on a :class:`Face`, which has views of an arena for tensors. See
:mod:`specgate.moe.offload_experts` for why that gives the resident model's values.

Letters: N tokens of a call, K experts per token, M = N * K rows, D hidden size, E experts of the layer, S
slots, G slots of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.small_tensors import to_device

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
MAX_GROUPS = 1023  # groups of one grouped matrix product (torch: fewer than 1024)
FEW = 256  # indices that are mapped to slots on the host rather than on the device
MANY = 4096  # indices from which on the device says which experts there are


class Face:
    """Stands in for a module while its class's own ``forward`` runs: some attributes are its own, all others
    the module's.

    Args:
        module: the module.
        own: the face's attributes, and ``more``.
        plain: attributes of the module that never change, copied since that is faster than asking for them.
    """

    def __init__(
        self, module: Any, own: Mapping[str, Any], plain: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        self.__dict__.update(plain or {}, **own, **more, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a :class:`Face` may copy of an experts module: sizes, flags, configuration, activation."""
    found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    found.pop("training")
    return found | dict(module._modules)


class SwitchFace(Face):
    """The same for a dictionary of expert modules."""

    def __init__(self, module: Any, arenas: Mapping[str, Tensor], slot: Callable[[int], int]) -> None:
        super().__init__(module, {}, _arenas=arenas, _slot=slot)

    def __getitem__(self, key: str) -> Callable[[Tensor], Tensor]:
        slot = self._slot(int(key.removeprefix("expert_")))
        (template,) = self._module.template
        face = Face(template, {name: Linear(arena[slot]) for name, arena in self._arenas.items()})
        return partial(type(template).forward, face)


class Linear:
    """What a loop over expert modules asks of ``nn.Linear``."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class Lookup:
    """A stacked tensor of which a loop takes one expert's part after another."""

    def __init__(self, arena: Tensor, slot: Callable[[int], int]) -> None:
        self._arena, self._slot = arena, slot

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._arena[self._slot(int(expert))]


class Rows:
    """The rows (token, k) of one call through the indexed kernels.

    Args:
        module: the experts' module. arenas: views of all slots, by name.
        hidden_ND, index_NK, weights_NK: what it is called with.
        flat: ``index_NK`` as a list, where there is one.
    """

    def __init__(
        self,
        module: Any,
        arenas: dict[str, Tensor],
        hidden_ND: Tensor,
        index_NK: Tensor,
        weights_NK: Tensor,
        flat: list[int] | None,
    ) -> None:
        self._flat = flat
        self._module, self._arenas = module, arenas
        self._hidden_ND, self._index_NK, self._weights_NK = hidden_ND, index_NK, weights_NK
        self._dtype = next(iter(arenas.values())).dtype
        self._repeated_MD: Tensor | None = None
        self._rows_MD: Tensor | None = None

    def whole(self, experts: list[int], slots: list[int], base: int, width: int) -> Tensor:
        """The call as it is, with slots for experts."""
        index_NK = self._slot_of(experts, slots, base, 0)
        face = Face(self._module, self._page(base, width), self._module.plain, num_experts=width)
        return run_original(self._module, face, self._hidden_ND, index_NK, self._weights_NK)

    def add(self, experts: list[int], slots: list[int], base: int, width: int) -> None:
        """The rows of some experts, unweighted; the kernels see all M rows and are told to leave the others.

        With one expert per row and weight 1, what they return is the down projection itself.
        """
        slot_M = self._slot_of(experts, slots, base, width).flatten()
        if self._repeated_MD is None:
            self._repeated_MD = self._hidden_ND.repeat_interleave(self._index_NK.shape[1], dim=0)
        one_M1 = torch.ones(len(slot_M), 1, dtype=self._dtype, device=slot_M.device)
        more = {"num_experts": width, "_is_expert_parallel": True}
        face = Face(self._module, self._page(base, width), self._module.plain, **more)
        rows_MD = run_original(self._module, face, self._repeated_MD, slot_M[:, None], one_M1)
        if self._rows_MD is not None:
            rows_MD = torch.where((slot_M < width)[:, None], rows_MD, self._rows_MD)
        self._rows_MD = rows_MD

    def total(self) -> Tensor:
        """Weighted and summed over the experts of each token, as transformers does it."""
        assert self._rows_MD is not None
        weighted_MD = self._rows_MD.to(self._dtype) * self._weights_NK.reshape(-1, 1)
        N, K = self._index_NK.shape
        return weighted_MD.view(N, K, -1).sum(dim=1).to(self._hidden_ND.dtype)

    def _page(self, base: int, width: int) -> dict[str, Tensor]:
        return {name: arena[base : base + width] for name, arena in self._arenas.items()}

    def _slot_of(self, experts: list[int], slots: list[int], base: int, other: int) -> Tensor:
        """The indices ``[N, K]`` with slots, counted from ``base``, for experts."""
        if self._flat is not None:
            place = dict(zip(experts, slots, strict=True))
            flat = [place[e] - base if e in place else other for e in self._flat]
            return to_device(flat, self._index_NK.device).view_as(self._index_NK)
        table_E = [other] * self._module.num_experts
        for expert, slot in zip(experts, slots, strict=True):
            table_E[expert] = slot - base
        return to_device(table_E, self._index_NK.device)[self._index_NK]


def pages_of(
    experts: list[int], slots: list[int], num_slots: int, implementation: str
) -> Iterator[tuple[list[int], list[int], int, int]]:
    """The experts by the stretch of the arena in which they lie: experts, slots, first slot and width.

    A grouped product takes at most :data:`MAX_GROUPS` slots side by side and costs something for each; an
    indexed one takes the whole arena.
    """
    if implementation != "grouped_mm":
        yield experts, slots, 0, num_slots
        return
    order = sorted(range(len(slots)), key=slots.__getitem__)
    while order:
        base = min(slots[order[0]], max(num_slots - 2, 0))
        page = [i for i in order if slots[i] < base + MAX_GROUPS]
        order = order[len(page) :]
        width = max(slots[page[-1]] - base + 1, 2)
        yield [experts[i] for i in page], [slots[i] for i in page], base, width


def run_original(module: Any, face: Face, hidden_ND: Tensor, routing: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = module.original.forward(face, hidden_ND, routing, weights)
    return out


def implementation_of(module: Any) -> str:
    chosen: str = module.config._experts_implementation or "eager"
    if chosen not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts_implementation={chosen!r} cannot run from slots; choose one of "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    return chosen


def used_experts(routing: Tensor, mask: bool) -> tuple[list[int], list[int] | None]:
    """The experts that a call needs, ascending, and its indices as a list if they are few.

    The host waits for the router here.
    """
    if mask:
        return torch.where(routing.flatten(0, 1).any(0))[0].tolist(), None
    flat = routing.flatten()
    if len(flat) > MANY:
        return flat.unique().tolist(), None
    listed = flat.tolist()
    return sorted(set(listed)), listed if len(listed) <= FEW else None
