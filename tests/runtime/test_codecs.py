"""Codecs: decoding by hand, error bounds on odd values, and the native core's bits against torch's."""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specgate.errors import ConfigError, StoreError
from specgate.runtime import codecs, native
from specgate.runtime.layout import CODECS, DTYPES, BlockLayout

CODED = [("int8", 0), ("int4", 32), ("int4", 64), ("fp8", 0)]
KINDS = list(DTYPES.values())
needs_native = pytest.mark.skipif(not native.available(), reason="the native core is not compiled")


def odd_matrices(dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights that trip a careless codec, in a checkpoint's dtype."""
    random = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    normal = torch.randn(6, 100, generator=random)
    outlier = 0.01 * normal
    outlier[2, 17] = 900.0
    ties = torch.arange(-32, 32).float().div(2).expand(3, -1).clone()  # halves: every quotient is a tie
    ties[:, 0] = 127.0
    mixed = normal.clone()
    mixed[1] = 0
    mixed[3] *= 1e-30
    tiny = info.smallest_normal * info.eps
    most = min(info.max, 400_000.0)  # int4's scales end at 458528
    return {
        "normal": normal.to(dtype),
        "zeros": torch.zeros(3, 65, dtype=dtype),
        "negative zeros": torch.full((2, 33), -0.0, dtype=dtype),
        "outlier": outlier.to(dtype),
        "ties": ties.to(dtype),
        "mixed rows": mixed.to(dtype),
        "subnormal": torch.arange(-40, 40).mul(tiny).reshape(2, 40).to(dtype),
        "least": torch.full((2, 5), tiny, dtype=dtype),
        "largest": torch.tensor([[most, -most, 0.3 * most, 1.0]], dtype=dtype),
        "one value": torch.tensor([[-0.7]], dtype=dtype),
        "one column": normal[:, :1].to(dtype),
        "constant": torch.full((2, 97), 0.3, dtype=dtype),
    }


def decode_by_hand(values: Tensor, scales: Tensor, cols: int, codec: str, group: int) -> list[list[float]]:
    """Decoding in Python's own floats, from the bytes: exact, before anything is rounded."""
    raw, rows = values.numpy().tobytes(), len(values)
    width = len(raw) // rows
    out = []
    for r in range(rows):
        row = []
        for c in range(cols):
            if codec == "int8":
                (value,) = struct.unpack_from("<b", raw, r * width + c)
                scale = scales[r, 0].item()
            elif codec == "int4":
                byte = raw[r * width + c // 2]
                value, scale = (byte >> 4 if c % 2 else byte & 15) - 8, scales[r, c // group].item()
            else:
                byte = raw[r * width + c]
                exponent, fraction = byte >> 3 & 15, byte & 7
                value = math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10)
                value, scale = (-value if byte & 128 else value), scales[r, 0].item()
            row.append(value * scale)
        out.append(row)
    return out


@pytest.mark.parametrize(("codec", "group"), CODED)
@pytest.mark.parametrize("name", list(odd_matrices(torch.float32)))
def test_decoding_is_what_the_bytes_say(codec: str, group: int, name: str) -> None:
    weights = odd_matrices(torch.float32)[name]
    values, scales = codecs.encode_matrix(weights, codec, group)
    got = codecs.decode_matrix(values, scales, weights.shape[1], codec, torch.float32)
    by_hand = torch.tensor(
        decode_by_hand(values, scales, weights.shape[1], codec, group), dtype=torch.float64
    )
    assert torch.equal(got, by_hand.float())


@pytest.mark.parametrize(("codec", "group"), CODED)
@pytest.mark.parametrize("stored", KINDS, ids=list(DTYPES))
@pytest.mark.parametrize("slot", KINDS, ids=list(DTYPES))
def test_error_bounds_hold(codec: str, group: int, stored: torch.dtype, slot: torch.dtype) -> None:
    for name, weights in odd_matrices(stored).items():
        values, scales = codecs.encode_matrix(weights, codec, group)
        got = codecs.decode_matrix(values, scales, weights.shape[1], codec, slot)
        error = (got.double() - weights.double()).abs()
        bound = codecs.error_bound(weights, codec, group, slot)
        assert got.isfinite().all(), name
        assert (error <= bound).all(), (name, float((error / bound).max()))


def test_bounds_are_not_idle() -> None:
    """Half of each bound is reached: with a bound half as large the test above would fail."""
    weights = odd_matrices(torch.float32)["normal"]
    for codec, group in CODED:
        values, scales = codecs.encode_matrix(weights, codec, group)
        got = codecs.decode_matrix(values, scales, 100, codec, torch.float32)
        bound = codecs.error_bound(weights, codec, group, torch.float32)
        assert float(((got.double() - weights.double()).abs() / bound).max()) > 0.5


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_error_bounds_hold_for_anything_finite(data: st.DataObject) -> None:
    codec, group = data.draw(st.sampled_from(CODED))
    slot = data.draw(st.sampled_from(KINDS))
    rows, cols = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70))
    most = 458_000.0 if codec == "int4" else torch.finfo(torch.float32).max
    numbers = st.floats(-most, most, width=32) if codec != "int4" else st.floats(-most, most).map(np.float32)
    flat = data.draw(st.lists(numbers, min_size=rows * cols, max_size=rows * cols))
    weights = torch.tensor(np.array(flat, np.float32)).reshape(rows, cols)
    values, scales = codecs.encode_matrix(weights, codec, group)
    got = codecs.decode_matrix(values, scales, cols, codec, slot)
    bound = codecs.error_bound(weights, codec, group, slot)
    assert ((got.double() - weights.double()).abs() <= bound).all()


def test_the_bound_of_a_cast() -> None:
    for stored in KINDS:
        for slot in KINDS:
            for name, weights in odd_matrices(stored).items():
                if weights.double().abs().max() > torch.finfo(slot).max:
                    continue  # a plain cast, as transformers does it, makes infinity of them
                error = (weights.to(slot).double() - weights.double()).abs()
                assert (error <= codecs.error_bound(weights, "none", 0, slot)).all(), name
                if stored == slot:
                    assert error.max() == 0


def test_scales_are_large_enough_and_hardly_larger() -> None:
    weights = odd_matrices(torch.float32)["normal"]
    for codec, group, most in (("int8", 0, 127), ("int4", 32, 7), ("fp8", 0, 448)):
        scales = codecs.row_scales(weights, codec, group).double()
        if codec == "int4":
            largest = torch.stack([part.abs().amax(-1) for part in weights.split(group, -1)], -1).double()
        else:
            largest = weights.abs().amax(-1, keepdim=True).double()
        assert (scales * most >= largest).all()
        assert (scales * most <= largest * (1 + (2**-10 if codec == "int4" else 2**-22))).all()


def test_two_values_a_byte_the_first_in_the_low_half() -> None:
    weights = torch.zeros(1, 33)
    weights[0, :4] = torch.tensor([7.0, -7.0, 1.0, 0.0])
    weights[0, 32] = 3.5
    values, scales = codecs.encode_matrix(weights, "int4", 32)
    assert values.shape == (1, 32)
    assert values[0, :3].tolist() == [0x1F, 0x89, 0x88]  # 7+8 | -7+8 << 4, ...
    assert values[0, 16:18].tolist() == [0x8F, 0x88]
    assert scales.dtype == torch.float16
    assert scales.tolist() == [[1.0, 0.5]]


def test_what_no_codec_can_keep_is_refused_by_name() -> None:
    layout = BlockLayout.make([("up", (2, 3), "float32"), ("bias", (3,), "float32")], "int8")
    good = {"up": torch.ones(2, 3), "bias": torch.ones(3)}
    for bad in (math.nan, math.inf, -math.inf):
        up = torch.ones(2, 3)
        up[1, 2] = bad
        with pytest.raises(
            StoreError, match=r"up of layer 3, expert 5 cannot be coded. A value is not finite"
        ):
            codecs.encode_block(layout, good | {"up": up}, "layer 3, expert 5")
    huge = torch.tensor([[1.0, 460_000.0]])
    with pytest.raises(StoreError, match=r"4.6e\+05 is beyond what int4 can scale"):
        codecs.encode_matrix(huge, "int4", 32)
    assert codecs.encode_matrix(huge, "int8")[0].tolist() == [[0, 127]]
    kept = codecs.encode_block(layout, good | {"bias": torch.tensor([math.nan, 1.0, 2.0])})
    assert codecs.decode_block(layout, kept)["bias"].isnan().tolist() == [True, False, False]


def test_a_long_matrix_is_coded_in_parts() -> None:
    weights = torch.randn(700, 4096, generator=torch.Generator().manual_seed(0))
    layout = BlockLayout.make([("w", (700, 4096), "float32")], "int4", 64)
    block = codecs.encode_block(layout, {"w": weights})
    values, scales = codecs.encode_matrix(weights, "int4", 64)
    assert torch.equal(
        codecs.decode_block(layout, block)["w"],
        codecs.decode_matrix(values, scales, 4096, "int4", torch.float32),
    )


# ---------------------------------------------------------------------------------------- the native core


def sample_block(layout: BlockLayout, seed: int = 0) -> Tensor:
    """An encoded expert with rows of very different size, and NaN in no place."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for piece in layout.pieces:
        weights = torch.randn(piece.rows, piece.cols, generator=random) * 0.05
        weights[:: max(2, piece.rows // 2)] *= 1e-4
        weights[-1] *= 3e3
        tensors[piece.name] = weights.reshape(piece.shape).to(DTYPES[piece.stored])
    return codecs.encode_block(layout, tensors)


@needs_native
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stored", list(DTYPES))
@pytest.mark.parametrize("slot", list(DTYPES))
def test_native_decoding_gives_the_same_bits(codec: str, stored: str, slot: str) -> None:
    core: Any = native.require()
    for cols in (1, 7, 33, 64, 100, 256):
        shapes: Any = [("a", (24, cols), stored), ("a_bias", (cols,), stored), ("b", (2, 5, 31), stored)]
        for group in (32, 64) if codec == "int4" else (0,):
            layout = BlockLayout.make(shapes, codec, group, slot)
            block = sample_block(layout, cols)
            native_slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
            form = layout.native_format()
            assert form.is_plain == layout.is_copy
            core.decode_block(form, block.numpy(), native_slot.numpy())
            assert torch.equal(native_slot, codecs.decode_to_slot(layout, block))


@needs_native
def test_native_refusals() -> None:
    core: Any = native.require()
    layout = BlockLayout.make([("a", (4, 40), "float32")], "int8")
    form = layout.native_format()
    block, slot = np.zeros(layout.block_bytes, np.uint8), np.zeros(layout.slot_bytes, np.uint8)
    with pytest.raises(ConfigError, match="give 512 and 768"):
        core.decode_block(form, block[:-1], slot)
    with pytest.raises(ConfigError, match="codec=int3"):
        core.BlockFormat("int3", 0, [], 256, 256)
    with pytest.raises(ConfigError, match="over another one"):
        core.BlockFormat("none", 0, [(1, 1, "float32", "float32", False, 0, 0, 0)] * 2, 256, 256)
    with pytest.raises(TypeError):
        core.decode_block(form, block, slot.astype(np.float32))


@needs_native
def test_zstd_against_the_library_itself() -> None:
    core: Any = native.require()
    if not core.zstd_available():
        pytest.skip("libzstd.so.1 is not installed")
    plain = np.frombuffer(bytes(range(256)) * 300, np.uint8)
    packed = core.zstd_compress(plain, 5)
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(len(plain))
    got = library.ZSTD_decompress(out, ctypes.c_size_t(len(plain)), packed, ctypes.c_size_t(len(packed)))
    assert got == len(plain)
    assert out.raw == plain.tobytes()
    back = np.zeros(len(plain), np.uint8)
    core.zstd_decompress(np.frombuffer(packed, np.uint8), back)
    assert np.array_equal(back, plain)
    with pytest.raises(StoreError, match="76800 bytes instead of 76801"):
        core.zstd_decompress(np.frombuffer(packed, np.uint8), np.zeros(len(plain) + 1, np.uint8))
    with pytest.raises(StoreError, match="damaged"):
        core.zstd_decompress(np.frombuffer(packed[:-3], np.uint8), back)
    with pytest.raises(ConfigError, match="level 99"):
        core.zstd_compress(plain, 99)
