"""A few numbers on a device, at once: the slots that every layer of an offloaded model sends there."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def to_device(values: list[int], device: torch.device) -> Tensor:
    """Integers on a device, int64 ``[len(values)]``; see :func:`write_into`."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64)
    if not _kernel_for(device):
        return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    return write_into(torch.empty(len(values), dtype=torch.int64, device=device), values)


def write_into(there: Tensor, values: list[int]) -> Tensor:
    """Integers into a contiguous int64 tensor of as many; returns it.

    Nothing is waited for: a plain copy would wait for all that the stream waits for, the experts' copies with
    it, and kernels would be launched only after them. A kernel that carries them writes them, since a copy
    would cost the host a pinned buffer; without the native core it is one.
    """
    device = there.device
    if device.type == "cuda" and _kernel_for(device):
        _write_numbers()(there.data_ptr(), values, torch.cuda.current_stream(device).cuda_stream)
        return there
    source = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return there.copy_(source.view(there.shape), non_blocking=True)


def _kernel_for(device: torch.device) -> bool:
    return _write_numbers() is not None and device.index in (None, torch.cuda.current_device())


@cache
def _write_numbers() -> Any:
    """The native kernel; None without CUDA in the native core."""
    from specgate.runtime import native

    return getattr(native.require(), "write_numbers_cuda", None) if native.available() else None
