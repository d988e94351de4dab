"""Floating-point operations of a computation, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products and attentions of one call; a multiply-add is two.

    Sums, activations and look-ups are not counted, as is usual. Attention runs as plain products meanwhile,
    because the counter does not know every fused kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
