"""What each thing that a simulation does costs: bytes, nanoseconds and bytes per nanosecond, plain numbers.

Letters: N events (see :mod:`specgate.policy.workload`), S steps, L MoE layers.

One byte per nanosecond is one GB/s. :mod:`specgate.policy.roofline` makes costs from a model's sizes and a
machine's speeds; a test writes them by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError

Nanoseconds = NDArray[np.float64]
_OPTIONAL = ("launch_ns_N", "host_pre_ns_N", "host_exec_ns_N")


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of one workload on one machine.

    Attributes:
        expert_bytes: that one expert takes on the link and in the file (its encoded block).
        link_bytes_per_ns: from host memory to the device, once a copy runs.
        link_latency_ns: that every copy occupies the link besides (start; decoding, if the block is coded).
        link_chunk_bytes: a forecast's copy can be stopped for a demand at multiples of this; 0: never.
        forecast_share: of link_bytes_per_ns, what a copy reaches that begins before an event waits for it,
            since it can be stopped: above 0, up to 1.
        file_bytes_per_ns: from the file to host memory, once a read runs.
        file_latency_ns: that every read takes besides.
        event_ns: host work of every event (remapping of indices, acquire, release).
        forecast_ns: from a router's choice until its forecast is known.
        pre_ns_N: float64, from the end of the event before until the router of event n has chosen; a step's
            first event includes the head and the sampling of the step before.
        exec_ns_N: float64, the experts of event n, all of them on the device.
        launch_ns_N: float64, the host's time from the choice of the router of event n - 1 (from the start,
            for n = 0) until all that comes before the choice of that of event n is launched: it cannot be
            made earlier, however fast the device is. None: the other times include it.
        link_slowdown: by how much the host's work takes longer, relative to it, while the link copies what no
            event waits for: 0.12 is 12 %. The host's work: launch_ns_N, event_ns and the next two.
        host_pre_ns_N, host_exec_ns_N: float64, of pre_ns_N and exec_ns_N, what the host's launches bind.
            None: nothing.

    Raises:
        ConfigError: if a number makes no sense.
    """

    expert_bytes: int
    link_bytes_per_ns: float
    link_latency_ns: float
    link_chunk_bytes: int
    file_bytes_per_ns: float
    file_latency_ns: float
    event_ns: float
    forecast_ns: float
    pre_ns_N: Nanoseconds
    exec_ns_N: Nanoseconds
    launch_ns_N: Nanoseconds | None = None
    link_slowdown: float = 0.0
    forecast_share: float = 1.0
    host_pre_ns_N: Nanoseconds | None = None
    host_exec_ns_N: Nanoseconds | None = None

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "link_chunk_bytes"):
            value, least = getattr(self, name), int(name == "expert_bytes")
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name}={value} is no number of bytes; write a whole one from {least}.")
        for name in ("link_bytes_per_ns", "file_bytes_per_ns"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value} moves nothing; write a number above 0 (1 is 1 GB/s).")
        for name in ("link_latency_ns", "file_latency_ns", "event_ns", "forecast_ns"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value} is no time; write nanoseconds, 0 or more.")
        if not 0 < self.forecast_share <= 1:
            raise ConfigError(
                f"forecast_share={self.forecast_share} is no share of the link's speed; write more than 0, "
                "up to 1."
            )
        if not (math.isfinite(self.link_slowdown) and self.link_slowdown >= 0):
            raise ConfigError(
                f"link_slowdown={self.link_slowdown} slows nothing down; write 0 or more (0.12 is 12 %)."
            )
        for name in ("pre_ns_N", "exec_ns_N", *_OPTIONAL):
            if getattr(self, name) is None and name in _OPTIONAL:
                continue
            values = np.ascontiguousarray(getattr(self, name), dtype=np.float64)
            if values.ndim != 1:
                raise ConfigError(f"{name} has {values.ndim} axes; write one time per event.")
            if values.size and not (np.isfinite(values).all() and values.min() >= 0):
                wrong = int(np.nonzero(~(values >= 0) | ~np.isfinite(values))[0][0])
                raise ConfigError(
                    f"{name}[{wrong}]={values[wrong]} is no time; write nanoseconds, 0 or more."
                )
            object.__setattr__(self, name, values)
        if self.launch_ns_N is not None and len(self.launch_ns_N) != len(self.pre_ns_N):
            raise ConfigError(
                f"{len(self.launch_ns_N)} times of launches and {len(self.pre_ns_N)} before events cannot "
                "belong together; write one of each per event."
            )
        if len(self.pre_ns_N) != len(self.exec_ns_N):
            raise ConfigError(
                f"{len(self.pre_ns_N)} times before events and {len(self.exec_ns_N)} of events cannot belong "
                "together; write one of each per event."
            )
        for name, of in (("host_pre_ns_N", self.pre_ns_N), ("host_exec_ns_N", self.exec_ns_N)):
            values = getattr(self, name)
            if values is not None and (len(values) != len(of) or (values > of).any()):
                raise ConfigError(
                    f"{name} is no part of {name.removeprefix('host_')}; write one time per event, none "
                    "above that of the event."
                )

    @property
    def events(self) -> int:
        """N."""
        return len(self.pre_ns_N)

    @property
    def copy_ns(self) -> float:
        """One expert from host memory to the device, on an idle link."""
        return self.link_latency_ns + self.expert_bytes / self.link_bytes_per_ns

    @property
    def read_ns(self) -> float:
        """One expert from the file to host memory, with nothing else to read."""
        return self.file_latency_ns + self.expert_bytes / self.file_bytes_per_ns

    @property
    def compute_ns(self) -> float:
        """All events with every expert on the device: what no policy can beat."""
        host = self.events * self.event_ns
        if self.launch_ns_N is None:
            return float(self.pre_ns_N.sum() + self.exec_ns_N.sum()) + host
        device_N = np.concatenate([np.zeros(min(1, self.events)), self.exec_ns_N[:-1]]) + self.pre_ns_N
        return float(np.maximum(device_N, self.launch_ns_N).sum() + self.exec_ns_N[-1:].sum()) + host

    def part(self, first: int, last: int) -> Costs:
        """The costs of events ``first`` to ``last`` - 1 alone."""
        return self._each(lambda values_N: values_N[first:last])

    def scaled(self, factor: float) -> Costs:
        """With all times of host and device, not those of copies, reads and forecasts, times ``factor``."""
        return replace(self._each(lambda values_N: values_N * factor), event_ns=self.event_ns * factor)

    def _each(self, change: Callable[[Nanoseconds], Nanoseconds]) -> Costs:
        """With all arrays changed alike."""
        arrays = {name: getattr(self, name) for name in ("pre_ns_N", "exec_ns_N", *_OPTIONAL)}
        changed: dict[str, Any] = {k: None if v is None else change(v) for k, v in arrays.items()}
        return replace(self, **changed)
