"""A call as a CUDA graph: one launch, however many operations it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARMING = 2  # runs before a capture: libraries make their handles and choose their kernels


def capture(call: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """What launches a call's operations at once; on a CPU the call itself.

    The call reads and writes the same tensors each time. It runs a few times meanwhile.

    Args:
        pool: of :func:`pool_of`, for graphs that never run at the same time; None: memory of its own.
    """
    if device.type != "cuda":
        return call
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    graph: Any = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(aside):
            for _ in range(WARMING):
                call()
        torch.cuda.current_stream(device).wait_stream(aside)
        # Other threads may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            call()
    replay: Callable[[], object] = graph.replay
    return replay


def pool_of(device: torch.device) -> Any:
    """Memory that graphs share; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
