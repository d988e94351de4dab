"""A machine and a model with round numbers, for tests."""

from __future__ import annotations

from typing import Any

from specgate.policy.hardware import Hardware
from specgate.policy.roofline import Attention, ModelSizes


def machine(**changed: Any) -> Hardware:
    """100 GB/s of device memory, 1 TFLOPS, a link of 10 GB/s, kernels that take no time to launch."""
    values: dict[str, Any] = {
        "name": "box",
        "device": "box",
        "device_gb": 8,
        "device_gb_per_s": 100,
        "tflops": 1,
        "link_gb_per_s": 10,
        "link_latency_us": 2,
        "host_gb": 16,
        "host_gb_per_s": 40,
        "file_gb_per_s": 2,
        "file_latency_us": 50,
        "kernel_us": 0,
        "source": "made up",
    }
    return Hardware(**values | changed)


def sizes(**changed: Any) -> ModelSizes:
    """Two layers of four experts of 1000 weights of 2 bytes, two per token."""
    values: dict[str, Any] = {
        "name": "small",
        "layers": 2,
        "experts": 4,
        "top_k": 2,
        "expert_parameters": 1000,
        "slot_bytes": 2000,
        "itemsize": 2,
        "stretch_parameters": (500, 700),
        "step_parameters": 3000,
        "attentions": (Attention(0, 16, 32), Attention(1, 16, 32, window=10)),
    }
    return ModelSizes(**values | changed)
