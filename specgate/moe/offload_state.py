"""What an offloaded model knows of itself while it runs, and what it refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from specgate.errors import ConfigError
from specgate.moe.offload_forecast import Forecaster
from specgate.moe.offload_plan import OffloadPlan
from specgate.moe.offload_slots import Store
from specgate.moe.offload_speculate import KernelForecaster


class Offloaded:
    """What is to be known of an offloaded model while it runs: ``model.specgate``.

    Attributes:
        plan: where the memory goes; print it.
        store: that lends the experts.
        forecaster: that asks the predictors, or None.
        verified: with ``verify``, per MoE layer the largest relative difference from the resident layer.
    """

    def __init__(self, plan: OffloadPlan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.forecaster: Forecaster | KernelForecaster | None = None
        self.verified: list[float] | None = None
        self._last: dict[str, Any] | None = None

    def stats(self) -> dict[str, Any]:
        """The store's counters, and how often predictors were asked; after the block, as they were then."""
        if self._last is not None:
            return dict(self._last)
        found = dict(self.store.stats())
        if self.forecaster is not None:
            found |= {"forecasts": self.forecaster.asked, "ignored": self.forecaster.ignored}
        return found

    def timeline(self) -> list[Any]:
        """Transfers as events of the Chrome trace format."""
        return self.store.timeline()

    def close(self) -> None:
        """Keeps the counters for later."""
        self._last = self.stats()


def stays(model: nn.Module) -> Any:
    """``Module._apply`` of a model that must not be moved or cast: what changes nothing is let through."""

    def refuse(change: Any, recurse: bool = True) -> nn.Module:
        first = next(model.parameters())
        probe: Tensor = change(first.new_empty(0))
        if (probe.device, probe.dtype) != (first.device, first.dtype):
            raise ConfigError(
                f"An offloaded model stays on {first.device} in {first.dtype}; name device= and dtype= in "
                "specgate.offload."
            )
        return model

    return refuse


def not_whole(*args: Any, **kwargs: Any) -> None:
    raise ConfigError("An offloaded model has no experts to save; copy the directory that it came from.")
