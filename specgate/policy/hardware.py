"""What a machine has and how fast it is: figures of vendors for known ones, measured ones for this machine.

The profiles lie in ``conf/hardware``; ``hardware=local`` is what ``python -m specgate.policy.measure`` wrote.
One GB is 10^9 bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from specgate.errors import ConfigError

#: Names another file than the usual one for the measured profile.
VARIABLE = "SPECGATE_HARDWARE"
MEASURE = "python -m specgate.policy.measure"

_POSITIVE = (
    "device_gb",
    "device_gb_per_s",
    "tflops",
    "link_gb_per_s",
    "host_gb",
    "host_gb_per_s",
    "file_gb_per_s",
)
_NOT_NEGATIVE = (
    *("link_latency_us", "file_latency_us", "kernel_us", "reserved_gb"),
    *("operation_us", "readback_us", "upload_us", "send_us", "launch_slowdown"),
    *("graph_us", "node_us", "gap_us", "write_us", "answer_us", "graph_slowdown"),
)
_UNKNOWN = (
    *("pageable_gb_per_s", "operation_us", "readback_us", "upload_us", "send_us", "gathered_gb_per_s"),
    *("graph_us", "node_us", "gap_us", "write_us", "answer_us"),
)


@dataclass(frozen=True)
class Hardware:
    """One accelerator in one machine.

    Attributes:
        name: as in ``hardware=``. device: what it is called.
        device_gb: memory of the device. reserved_gb: of it, what no model gets (driver, display).
        device_gb_per_s: its memory's bandwidth. device_share: of that, what kernels reach.
        tflops: dense bfloat16. tflops_share: of that, what matrix products reach.
        link_gb_per_s: from pinned host memory to the device, achieved. link_latency_us: of each copy besides.
        pageable_gb_per_s: the same from memory that is not pinned; None: unknown.
        host_gb, host_gb_per_s: host memory and its bandwidth.
        file_gb_per_s, file_latency_us: reading the folder of the expert file, several reads in flight.
        file: what kind of disk that is.
        ahead: whether the host goes on while the device works; a CPU is both.
        kernel_us: the host's time to launch one kernel from Python.
        operation_us: the host's time for one operation of a model's layer, of many in a row; None: unknown,
            ``kernel_us`` stands for it.
        readback_us: how much longer a layer takes if the host reads its router's choice. upload_us: if it
            sends the slots of its experts over and waits, send_us: if it does not wait. None: unknown,
            taken as 0.
        launch_slowdown: by how much a layer's launches take longer while a copy to the device is under way,
            relative to them; 0: unknown, or none.
        graph_us: the host's time to launch a layer's experts, or its dense part, as one CUDA graph; None:
            unknown, and then so are the next four. node_us: the device's for an operation that moves next to
            nothing. gap_us: the device's for a graph besides its operations. write_us: the host's to send the
            slots of its experts over. answer_us: from the end of what the device does until the host has read
            its router's choice.
        graph_slowdown: as launch_slowdown, for a layer of two graphs.
        gathered_gb_per_s: bandwidth at which experts are copied together and multiplied; None: unknown,
            memory's.
        source: where the figures come from.
        measured: whether they were read on the machine itself.
        readings: what was measured, in full; kept for the reader.

    Raises:
        ConfigError: if a number makes no sense.
    """

    name: str
    device: str
    device_gb: float
    device_gb_per_s: float
    tflops: float
    link_gb_per_s: float
    link_latency_us: float
    host_gb: float
    host_gb_per_s: float
    file_gb_per_s: float
    file_latency_us: float
    kernel_us: float
    source: str
    reserved_gb: float = 0.0
    device_share: float = 1.0
    tflops_share: float = 1.0
    pageable_gb_per_s: float | None = None
    operation_us: float | None = None
    readback_us: float | None = None
    upload_us: float | None = None
    send_us: float | None = None
    launch_slowdown: float = 0.0
    graph_us: float | None = None
    node_us: float | None = None
    gap_us: float | None = None
    write_us: float | None = None
    answer_us: float | None = None
    graph_slowdown: float = 0.0
    gathered_gb_per_s: float | None = None
    file: str = "disk"
    ahead: bool = True
    measured: bool = False
    readings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        more = ("device_share", "tflops_share", "pageable_gb_per_s", "gathered_gb_per_s")
        for name in (*_POSITIVE, *_NOT_NEGATIVE, *more):
            value = getattr(self, name)
            if value is None and name in _UNKNOWN:
                continue
            least = "0 or more" if name in _NOT_NEGATIVE else "above 0"
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name not in _NOT_NEGATIVE):
                raise ConfigError(
                    f"hardware.{name}={value} of {self.name} makes no sense; write a number {least}."
                )
        for name in ("device_share", "tflops_share"):
            if getattr(self, name) > 1:
                raise ConfigError(
                    f"hardware.{name}={getattr(self, name)} of {self.name} is more than all; write 0 to 1."
                )
        if self.reserved_gb >= self.device_gb:
            raise ConfigError(
                f"hardware.reserved_gb={self.reserved_gb} leaves nothing of the {self.device_gb} GB of "
                f"{self.name}; write less."
            )

    @property
    def free_gb(self) -> float:
        """Device memory that a model may have."""
        return self.device_gb - self.reserved_gb

    @property
    def memory_bytes_per_ns(self) -> float:
        """Device memory bandwidth that kernels reach."""
        return self.device_gb_per_s * self.device_share

    @property
    def operations_per_ns(self) -> float:
        """Multiplications and additions that matrix products reach."""
        return self.tflops * 1e3 * self.tflops_share

    @property
    def gathered_bytes_per_ns(self) -> float:
        """Bandwidth of experts that are copied together and multiplied."""
        return self.gathered_gb_per_s or self.memory_bytes_per_ns

    @property
    def operation_ns(self) -> float:
        """The host's time for an operation."""
        return 1e3 * (self.kernel_us if self.operation_us is None else self.operation_us)

    @property
    def link_bytes_per_ns(self) -> float:
        """A copy to the device; host memory, which it is read from, may be the slower one."""
        return min(self.link_gb_per_s, self.host_gb_per_s)

    def share_in_pieces(self, piece_bytes: int) -> float:
        """Of the link's speed, what a copy reaches that is handed over in pieces; 0: as a whole."""
        if piece_bytes == 0:
            return 1.0
        moving = piece_bytes / self.link_bytes_per_ns
        return moving / (moving + 1e3 * self.link_latency_us)

    def describe(self) -> dict[str, Any]:
        """Plain values for metrics.json."""
        return asdict(self)


def profile_path(path: str | Path | None = None) -> Path:
    """Where the measured profile lies: ``path``, else $SPECGATE_HARDWARE, else the user's cache."""
    if path is not None:
        return Path(path).expanduser()
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "specgate" / "hardware" / "local.yaml"


def local(path: str | Path | None = None) -> Hardware:
    """This machine as it was measured.

    Raises:
        ConfigError: never measured, or the file is damaged; says what to run.
    """
    file = profile_path(path)
    if not file.is_file():
        raise ConfigError(
            f"hardware=local: this machine was never measured ({file} is not there); run {MEASURE} once."
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Hardware)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError("it holds other fields than a profile's")
        return Hardware(**values)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"hardware=local: {file} is no measured profile ({reason}); run {MEASURE} again."
        ) from None


def save(hardware: Hardware, path: str | Path | None = None) -> Path:
    """Writes a profile, whole or not at all; returns its path."""
    file = profile_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    text = yaml.safe_dump(_plain(asdict(hardware)), sort_keys=False, allow_unicode=True)
    partial.write_text(f"# Written by {MEASURE}.\n{text}", encoding="utf-8")
    os.replace(partial, file)
    return file


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
