"""Layouts: offsets by hand, views, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from specgate.errors import ConfigError, StoreError
from specgate.runtime.layout import CODECS, BlockLayout, aligned, dtype_name

GPT = [
    ("gate_up_proj", (32, 48), torch.bfloat16),
    ("gate_up_proj_bias", (48,), torch.bfloat16),
    ("down_proj", (24, 32), torch.bfloat16),
    ("down_proj_bias", (32,), torch.bfloat16),
]


def test_offsets_by_hand() -> None:
    plain = BlockLayout.make(GPT)
    # 32 * 48 * 2 = 3072, 96 -> 256, 24 * 32 * 2 = 1536, 64 -> 256
    assert [piece.slot_offset for piece in plain.pieces] == [0, 3072, 3328, 4864]
    assert (plain.slot_bytes, plain.block_bytes, plain.is_copy) == (5120, 5120, True)
    assert [piece.block_offset for piece in plain.pieces] == [piece.slot_offset for piece in plain.pieces]

    int8 = BlockLayout.make(GPT, "int8")
    # 1536 values, 32 scales of 4 bytes -> 256; a bias of 96 -> 256; 768 values, 24 scales -> 256; 64 -> 256
    places = [(piece.block_offset, piece.scale_offset, piece.coded) for piece in int8.pieces]
    assert places == [(0, 1536, True), (1792, 0, False), (2048, 2816, True), (3072, 0, False)]
    assert (int8.slot_bytes, int8.block_bytes, int8.is_copy) == (5120, 3328, False)

    int4 = BlockLayout.make(GPT, "int4", 32)
    # rows of 48 take two groups of 16 bytes: 1024; 64 scales of 2 bytes -> 256; then 384 -> 512, 48 -> 256
    places = [(piece.block_offset, piece.scale_offset, piece.coded) for piece in int4.pieces]
    assert places == [(0, 1024, True), (1280, 0, False), (1536, 2048, True), (2304, 0, False)]
    assert (int4.slot_bytes, int4.block_bytes) == (5120, 2560)


def test_slots_of_another_dtype() -> None:
    wide = BlockLayout.make(GPT, dtype=torch.float32)
    assert (wide.slot_bytes, wide.block_bytes, wide.is_copy) == (6144 + 256 + 3072 + 256, 5120, False)
    assert wide.with_dtype("bfloat16") == BlockLayout.make(GPT) == wide.with_dtype(None)
    assert BlockLayout.make(GPT, "fp8").with_dtype("float16").codec == "fp8"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_everything_is_aligned_and_apart(codec: str, dtype: str | None) -> None:
    odd = [("a", (3, 5), "float32"), ("b", (7,), "float16"), ("c", (2, 3, 33), "bfloat16")]
    layout = BlockLayout.make(odd, codec, dtype=dtype)
    assert layout.slot_bytes % 256 == layout.block_bytes % 256 == 0
    for size, extents in (
        (layout.slot_bytes, [(p.slot_offset, p.slot_bytes) for p in layout.pieces]),
        (
            layout.block_bytes,
            [(p.block_offset, p.sizes(codec, layout.group)[0]) for p in layout.pieces]
            + [(p.scale_offset, p.sizes(codec, layout.group)[1]) for p in layout.pieces if p.coded],
        ),
    ):
        reached = 0
        for begin, length in sorted(extents):
            assert begin % 256 == 0
            assert reached <= begin
            reached = begin + length
        assert reached <= size < aligned(reached) + 1


def test_views_are_the_slots() -> None:
    layout = BlockLayout.make(GPT)
    slots = torch.zeros(3, layout.slot_bytes, dtype=torch.uint8)
    views = layout.views(slots)
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "gate_up_proj": (3, 32, 48), "gate_up_proj_bias": (3, 48), "down_proj": (3, 24, 32),
        "down_proj_bias": (3, 32),
    }  # fmt: skip
    views["down_proj"][1] = 1.0
    assert slots[1, 3328:4864].view(torch.bfloat16).eq(1).all()
    assert int(slots.count_nonzero()) == 24 * 32 * 2  # 0x3F80: both bytes
    one = layout.views(slots[1])
    assert one["down_proj"].data_ptr() == views["down_proj"][1].data_ptr()


def test_json_round_trip() -> None:
    for codec in CODECS:
        layout = BlockLayout.make(GPT, codec)
        assert BlockLayout.from_json(layout.to_json()) == layout
        assert BlockLayout.from_json(layout.to_json(), "float32") == layout.with_dtype("float32")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v["pieces"][1].update(offset=256), "offsets in the header"),
        (lambda v: v["pieces"][0].update(shape=[32, 49]), "offsets in the header"),
        (lambda v: v.update(block_bytes=1), "offsets in the header"),
        (lambda v: v["pieces"][0].update(shape=[0, 48]), "every axis"),
        (lambda v: v["pieces"][0].update(shape="x"), "makes no sense"),
        (lambda v: v["pieces"][0].update(stored="int3"), "dtype=int3"),
        (lambda v: v["pieces"][1].update(name="gate_up_proj"), "appears twice"),
        (lambda v: v.update(codec="int3"), "codec=int3"),
        (lambda v: v.update(pieces=[]), "without tensors"),
        (lambda v: v.pop("group"), "makes no sense"),
    ],
)
def test_a_header_that_contradicts_itself(change: Any, sentence: str) -> None:
    values = copy.deepcopy(BlockLayout.make(GPT, "int8").to_json())
    change(values)
    with pytest.raises(StoreError, match=sentence):
        BlockLayout.from_json(values)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="group=48"):
        BlockLayout.make(GPT, "int4", 48)
    with pytest.raises(ConfigError, match="group=32 is only for codec=int4"):
        BlockLayout.make(GPT, "int8", 32)
    with pytest.raises(ConfigError, match="dtype=float64"):
        BlockLayout.make(GPT, dtype=torch.float64)
    with pytest.raises(ConfigError, match="no piece up; it has gate_up_proj"):
        BlockLayout.make(GPT).piece("up")
    assert dtype_name(torch.float16) == dtype_name("float16") == "float16"
