"""Counts what torch is asked to do: the operations that are not views of what is there already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Views that say of themselves that they are none.
_VIEWS = ("aten.reshape.", "aten.to.", "aten.detach")


class Counter(TorchDispatchMode):
    """Keeps the names of the operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not str(func).startswith(_VIEWS):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], object]) -> int:
    """How many operations a call makes."""
    with Counter() as counter:
        call()
    return len(counter.names)
