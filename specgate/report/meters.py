"""What a stretch of a program takes besides time: energy of the GPU, memory at its peak."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType
from typing import Any

import psutil
import torch

INTERVAL = 0.1  # seconds between two looks at the memory
NO_ENERGY = "The driver gives no energy readings here (NVML), so energy is left out."


class EnergyCounter:
    """The GPU's own energy counter, through the driver's management library (NVML).

    Args:
        device: whose; a CPU has none here.
        library: stands in for ``libnvidia-ml.so.1`` in tests.

    Attributes:
        available: whether there is one.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        self._library, self._handle = library, ctypes.c_void_p()
        self.available = False
        if device.type != "cuda" and library is None:
            return
        try:
            if self._library is None:
                self._library = ctypes.CDLL("libnvidia-ml.so.1")
            name = b"GPU-0"
            if device.type == "cuda":
                name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            if self._library.nvmlInit_v2() == 0:
                found = self._library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._handle))
                self.available = found == 0 and self._read() is not None
        except (OSError, AttributeError):
            self.available = False

    def _read(self) -> int | None:
        value = ctypes.c_ulonglong()
        answer = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
        return int(value.value) if answer == 0 else None

    def joules(self) -> float | None:
        """Since the driver was loaded; None where nobody knows."""
        read = self._read() if self.available else None
        return None if read is None else read * 1e-3


class Meter:
    """Measures what happens inside it; a context.

    Args:
        device: that works.
        energy: its counter, which takes a while to open.

    Attributes:
        seconds: between entering and leaving.
        joules: of the GPU; None where unknown.
        device_peak: bytes in use on the GPU, of all programs; None on the CPU.
        host_peak: bytes of this process that lay in memory.
    """

    def __init__(self, device: torch.device, energy: EnergyCounter | None = None) -> None:
        self._device, self._energy = device, energy
        self.seconds = 0.0
        self.joules: float | None = None
        self.device_peak: int | None = None
        self.host_peak = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        self.host_peak = max(self.host_peak, int(self._process.memory_info().rss))
        if self._device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(self._device)
            self.device_peak = max(self.device_peak or 0, whole - free)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def __enter__(self) -> Meter:
        self._look()
        self._thread.start()
        self._before = None if self._energy is None else self._energy.joules()
        self._begin = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds = time.perf_counter() - self._begin
        after = None if self._energy is None else self._energy.joules()
        if self._before is not None and after is not None:
            self.joules = after - self._before
        self._stop.set()
        self._thread.join()
        self._look()

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "seconds": self.seconds,
            "joules": self.joules,
            "device_peak": self.device_peak,
            "host_peak": self.host_peak,
        }
