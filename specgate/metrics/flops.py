"""Floating-point operations of a computation, counted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def grouped_mm_flops(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of ``[R, I] x [G, I, O]`` where every row meets one of the G matrices; torch's counter takes
    it for none."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[-1]


@torch.no_grad()
def count_flops(call: Callable[[], object]) -> int:
    """Operations of the matrix products and attentions of one call; a multiply-add is two.

    Sums, activations and look-ups are not counted, as is usual. Attention runs as plain products meanwhile,
    because the counter does not know every fused kernel.
    """
    known = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        call()
    return int(counter.get_total_flops())
