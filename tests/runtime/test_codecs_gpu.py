"""Decoding on a device: the same bits as torch's, for many blocks at once, on a stream of the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specgate.errors import ConfigError
from specgate.runtime import codecs, native
from specgate.runtime.layout import CODECS, DTYPES, BlockLayout
from tests.runtime.test_codecs import sample_block

pytestmark = pytest.mark.gpu
FILL = 0xA5


def core() -> Any:
    found: Any = native.require()
    assert found.build_info()["cuda"], "this build of the native core has no CUDA"
    return found


def decode(layout: BlockLayout, blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """The slots that the device makes of blocks, fetched."""
    there = [block.cuda() for block in blocks]
    slots = [torch.full((layout.slot_bytes,), FILL, dtype=torch.uint8, device="cuda") for _ in blocks]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    core().decode_blocks_cuda(
        layout.native_format(),
        [b.data_ptr() for b in there],
        [s.data_ptr() for s in slots],
        stream.cuda_stream,
    )
    stream.synchronize()
    return [slot.cpu() for slot in slots]


def expected(layout: BlockLayout, block: torch.Tensor) -> torch.Tensor:
    slot = torch.full((layout.slot_bytes,), FILL, dtype=torch.uint8)
    views = layout.views(slot)
    for name, tensor in codecs.decode_block(layout, block).items():
        views[name].copy_(tensor)
    return slot


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stored", list(DTYPES))
@pytest.mark.parametrize("slot", list(DTYPES))
def test_the_same_bits(codec: str, stored: str, slot: str) -> None:
    for cols in (1, 7, 8, 33, 64, 100, 768, 4096):
        shapes: Any = [("a", (24, cols), stored), ("a_bias", (cols,), stored), ("b", (2, 5, 31), stored)]
        for group in (32, 64) if codec == "int4" else (0,):
            layout = BlockLayout.make(shapes, codec, group, slot)
            block = sample_block(layout, cols)
            (got,) = decode(layout, [block])
            assert torch.equal(got, expected(layout, block)), (cols, group)


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_more_blocks_than_one_launch_takes(codec: str) -> None:
    layout = BlockLayout.make([("a", (16, 96), "bfloat16"), ("b", (96, 16), "bfloat16")], codec)
    blocks = [sample_block(layout, seed) for seed in range(130)]
    for got, block in zip(decode(layout, blocks), blocks, strict=True):
        assert torch.equal(got, expected(layout, block))


def test_every_code_of_every_codec() -> None:
    """All bytes that an encoder can write, with scales of every size: subnormal, one, near the largest."""
    scales = torch.tensor([1e-44, 1.2e-38, 3e-6, 1.0, 700.0, 6e4, 2e36])
    for slot in DTYPES:
        for codec in ("int8", "fp8"):
            layout = BlockLayout.make([("a", (len(scales), 256), "float32")], codec, dtype=slot)
            block = torch.zeros(layout.block_bytes, dtype=torch.uint8)
            codes = torch.arange(256, dtype=torch.uint8)
            if codec == "fp8":
                codes[(codes & 0x7F) == 0x7F] = 0
            piece = layout.piece("a")
            block[: len(scales) * 256] = codes.repeat(len(scales))
            block[piece.scale_offset :][: 4 * len(scales)] = scales.view(torch.uint8)
            (got,) = decode(layout, [block])
            assert torch.equal(got, expected(layout, block)), (slot, codec)
        layout = BlockLayout.make([("a", (0x7C00, 32), "float32")], "int4", dtype=slot)
        piece = layout.piece("a")
        block = torch.zeros(layout.block_bytes, dtype=torch.uint8)
        block[: 0x7C00 * 16] = torch.arange(16, dtype=torch.uint8).mul(0x11).repeat(0x7C00)
        block[piece.scale_offset :][: 0x7C00 * 2] = torch.arange(0x7C00, dtype=torch.int16).view(torch.uint8)
        (got,) = decode(layout, [block])
        assert torch.equal(got, expected(layout, block)), slot


def test_mapped_host_memory_can_be_decoded_in_place() -> None:
    layout = BlockLayout.make([("a", (128, 256), "bfloat16")], "int8")
    block = sample_block(layout).pin_memory()
    slot = torch.full((layout.slot_bytes,), FILL, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    core().decode_blocks_cuda(layout.native_format(), [block.data_ptr()], [slot.data_ptr()], stream)
    torch.cuda.synchronize()
    assert torch.equal(slot.cpu(), expected(layout, block))


def test_what_no_kernel_takes() -> None:
    layout = BlockLayout.make([("a", (16, 96), "bfloat16")], "int8")
    block, slot = (
        sample_block(layout).cuda(),
        torch.zeros(layout.slot_bytes, dtype=torch.uint8, device="cuda"),
    )
    with pytest.raises(ConfigError, match="not aligned to 16 bytes"):
        core().decode_blocks_cuda(layout.native_format(), [block.data_ptr() + 4], [slot.data_ptr()], 0)
    with pytest.raises(ConfigError, match="1 blocks for 2 slots"):
        core().decode_blocks_cuda(layout.native_format(), [block.data_ptr()], [slot.data_ptr()] * 2, 0)
    many = BlockLayout.make([(f"p{i}", (8, 8), "bfloat16") for i in range(9)], "int8")
    with pytest.raises(ConfigError, match="more than 8 tensors"):
        core().decode_blocks_cuda(many.native_format(), [block.data_ptr()], [slot.data_ptr()], 0)


def test_decoding_keeps_up_with_the_memory() -> None:
    """Bytes read and written a second, experts of gpt-oss-20b's size: above a fifth of the device's copy."""
    layout = BlockLayout.make(
        [("gate_up_proj", (2880, 5760), "bfloat16"), ("down_proj", (2880, 2880), "bfloat16")], "int4", 32
    )
    blocks = [torch.zeros(layout.block_bytes, dtype=torch.uint8, device="cuda") for _ in range(8)]
    slots = [torch.zeros(layout.slot_bytes, dtype=torch.uint8, device="cuda") for _ in range(8)]

    def rate(work: Any, moved: int) -> float:
        work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(20):
            work()
        end.record()
        torch.cuda.synchronize()
        return 20 * moved / begin.elapsed_time(end) / 1e6

    stream, form = torch.cuda.current_stream().cuda_stream, layout.native_format()
    here, there = [b.data_ptr() for b in blocks], [s.data_ptr() for s in slots]
    decoded = rate(
        lambda: core().decode_blocks_cuda(form, here, there, stream),
        8 * (layout.block_bytes + layout.slot_bytes),
    )
    copied = rate(
        lambda: [a.copy_(b) for a, b in zip(slots[:4], slots[4:], strict=True)], 8 * layout.slot_bytes
    )
    print(f"decoding {decoded:.0f} GB/s, copying {copied:.0f} GB/s")
    assert decoded > 0.2 * copied
