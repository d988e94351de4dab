"""The packed file: its bytes by hand, its checksums, and every way in which it can be damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from specgate.errors import StoreError
from specgate.runtime import packed
from specgate.runtime.checksum import crc32c, crc32c_numpy
from specgate.runtime.pack import Options, pack
from specgate.runtime.packed import PackedWriter, read_packed
from specgate.runtime.source import ExpertSource
from tests.runtime.checkpoints import loaded, save


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("olmoe", tmp_path_factory.mktemp("olmoe"))


def packed_file(model: Path, out: Path, codec: str = "none") -> Path:
    return pack(Options(moe=str(model), out=str(out), codec=codec), Console(quiet=True)).path


def test_the_file_by_hand(olmoe: Path, tmp_path: Path) -> None:
    """Read with struct and json alone, as docs/packed-format.md tells it."""
    raw = packed_file(olmoe, tmp_path / "x.experts").read_bytes()
    magic, version, crc, length, size = struct.unpack("<8sIIQQ", raw[:32])
    assert (magic, version, size) == (b"SGEXPERT", 1, len(raw))
    assert len(raw) % 4096 == 0
    text = raw[32 : 32 + length]
    assert crc == crc_by_bits(text)
    header = json.loads(text)
    assert header["layout"]["block_bytes"] == 3 * 24 * 32 * 2
    assert [row[:2] for row in header["blocks"]] == [list(divmod(i, 8)) for i in range(24)]
    model = loaded(olmoe, torch.bfloat16)
    for layer, expert, offset, length, crc in header["blocks"]:
        block = raw[offset : offset + length]
        assert offset % 4096 == 0
        assert crc == crc_by_bits(block)
        gate_up = model.model.layers[layer].mlp.experts.gate_up_proj[expert]
        assert block[: 48 * 32 * 2] == gate_up.detach().view(torch.uint8).numpy().tobytes()
        assert not any(raw[offset + length : -(-(offset + length) // 4096) * 4096])


def crc_by_bits(data: bytes) -> int:
    """CRC-32C one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_checksums_agree() -> None:
    assert crc32c(b"123456789") == crc32c_numpy(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    random = np.random.default_rng(0)
    for size in (0, 1, 3, 4, 5, 255, 4096, 8191, 8192, 8193, 20_000):
        data = random.integers(0, 256, size, dtype=np.uint8)
        assert crc32c_numpy(data) == crc_by_bits(data.tobytes()) == crc32c(data.tobytes())


def test_blocks_must_be_complete(olmoe: Path, tmp_path: Path) -> None:
    header = read_packed(packed_file(olmoe, tmp_path / "x.experts"))
    with PackedWriter(tmp_path / "y.experts", header, header.layout.block_bytes) as writer:
        writer.add(bytes(header.layout.block_bytes))
        with pytest.raises(StoreError, match="got 1 blocks of 24"):
            writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["x.experts"]


@pytest.fixture(scope="module")
def file(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_file(olmoe, tmp_path_factory.mktemp("packed") / "x.experts", codec="int8")


def damaged(file: Path, folder: Path, change: Any) -> Path:
    raw = bytearray(file.read_bytes())
    out = folder / "damaged.experts"
    out.write_bytes(change(raw) or raw)
    return out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda raw: raw[:-1], "is truncated: .* bytes instead of"),
        (lambda raw: raw[:20], "not a packed expert file"),
        (lambda raw: raw[:2000], "is truncated"),
        (lambda raw: raw + b"x", "is longer than it was written"),
        (lambda raw: b"SGEXPORT" + raw[8:], "not a packed expert file"),
        (lambda raw: raw[:8] + b"\x02" + raw[9:], "format version 2 and this specgate reads 1"),
        (lambda raw: raw[:40] + b"?" + raw[41:], "The header of .* is damaged"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "The header of .* is damaged"),
    ],
)
def test_files_that_are_refused(change: Any, sentence: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=sentence) as caught:
        ExpertSource.open(damaged(file, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none.experts cannot be opened \(No such file or directory\)"):
        ExpertSource.open(tmp_path / "none.experts")


def reheader(raw: bytearray, change: Any) -> bytes:
    """The file with another header, whose checksum is right."""
    _, _, _, length, size = packed.PREAMBLE.unpack(raw[:32])
    values = json.loads(raw[32 : 32 + length])
    change(values)
    text = json.dumps(values).encode().ljust(length)
    start = packed.PREAMBLE.pack(packed.MAGIC, 1, crc_by_bits(text), len(text), size)
    return start + text + bytes(raw[32 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["blocks"][3].__setitem__(2, v["blocks"][2][2]),  # the same place twice
        lambda v: v["blocks"][3].__setitem__(2, v["blocks"][3][2] + 1),
        lambda v: v["blocks"][3].__setitem__(2, 0),
        lambda v: v["blocks"][3].__setitem__(2, -4096),
        lambda v: v["blocks"][-1].__setitem__(2, 1 << 60),
        lambda v: v["blocks"][3].__setitem__(3, 7),
        lambda v: v["blocks"][3].__setitem__(4, 1 << 32),
        lambda v: v["blocks"][3].__setitem__(4, "x"),
        lambda v: v["blocks"][3].__setitem__(1, 4),
        lambda v: v["blocks"].pop(),
        lambda v: v.update(layers=0, blocks=[]),
        lambda v: v.pop("layout"),
        lambda v: v["layout"].update(block_bytes=8),
        lambda v: v.update(blocks=None),
        lambda v: v["blocks"].__setitem__(3, 5),
    ],
)
def test_headers_that_make_no_sense(change: Any, file: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"makes no sense|cannot be read") as caught:
        ExpertSource.open(damaged(file, tmp_path, lambda raw: reheader(raw, change)))
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_found(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    """In the header, or in the block that it belongs to; between the blocks there is nothing to find."""
    source = ExpertSource.open(file)
    raw = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    other = tmp_path / "flipped.experts"
    other.write_bytes(raw)
    places = [(b.segments[0].offset, b.segments[0].offset + b.segments[0].length) for b in source.blocks]
    inside = [i for i, (begin, end) in enumerate(places) if begin <= at < end]
    if at < places[0][0]:
        with pytest.raises(StoreError):
            ExpertSource.open(other)
        return
    flipped = ExpertSource.open(other)
    for b in {*inside, 0}:
        if b in inside:
            with pytest.raises(StoreError, match=rf"expert {b % 8} in .* is damaged \(wrong checksum\)"):
                flipped.read(b)
        else:
            assert flipped.read(b) == source.read(b)
