"""Numbers arrive as they were; on a GPU in the order of the stream (tests/moe/test_offload_gpu.py)."""

from __future__ import annotations

import pytest
import torch

from specgate.small_tensors import to_device


@pytest.mark.parametrize("values", [[], [7], [3, 0, 2**40, -1], list(range(1000))], ids=len)
def test_numbers_arrive(values: list[int]) -> None:
    there = to_device(values, torch.device("cpu"))
    assert there.tolist() == values
    assert there.dtype == torch.int64
