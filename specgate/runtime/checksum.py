"""CRC-32C, the checksum of packed blocks: the native core's where it is built, else the same through numpy.

The checksum is linear over the field of two elements. So numpy cuts the bytes into as many lanes as it
handles well at once, and then joins neighbours: the checksum of A followed by B is that of A moved on by the
length of B, added to that of B. (Polynomial 0x1EDC6F41, RFC 3720.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specgate.runtime import native

POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41, bits reversed
LANES = 4096  # a power of two

Words = NDArray[np.uint32]


def crc32c(data: Any) -> int:
    """The checksum of a bytes-like object."""
    buffer = np.frombuffer(data, np.uint8)
    found = _native()
    return found(buffer) if found is not None else crc32c_numpy(buffer)


@cache
def _native() -> Callable[[Any], int] | None:
    core = native.require() if native.available() else None
    return getattr(core, "crc32c", None)


def crc32c_numpy(data: NDArray[np.uint8]) -> int:
    """The checksum without the native core, some hundreds of MB a second.

    Shapes:
        data: uint8 ``[bytes]``.
    """
    if len(data) < 4:
        short = 0xFFFFFFFF
        for byte in data.tolist():
            short = int(_one_byte()[(short ^ byte) & 0xFF]) ^ short >> 8
        return short ^ 0xFFFFFFFF
    lanes = min(LANES, 1 << (len(data) // 4).bit_length())
    words = -(-len(data) // lanes // 2)
    front = lanes * words * 2 - len(data)  # zeros before the first byte change nothing
    whole = np.zeros(lanes * words * 2, np.uint8)
    whole[front:] = data
    whole[front : front + 4] ^= 0xFF
    columns = np.ascontiguousarray(whole.view("<u2").reshape(lanes, words).T)
    table, crc = _two_bytes(), np.zeros(lanes, np.uint32)
    for column in columns:
        crc = table[crc.astype(np.uint16) ^ column] ^ crc >> 16
    moved = _zeros_after(words * 2)
    while len(crc) > 1:
        crc = _apply(moved, crc[::2]) ^ crc[1::2]
        moved = _apply(moved, moved)
    return int(crc[0]) ^ 0xFFFFFFFF


@cache
def _one_byte() -> Words:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


@cache
def _two_bytes() -> Words:
    one, words = _one_byte(), np.arange(1 << 16, dtype=np.uint32)
    first = one[words & 0xFF] ^ words >> 8
    return one[first & 0xFF] ^ first >> 8


def _zeros_after(length: int) -> Words:
    """What ``length`` zero bytes make of each bit of a checksum: ``[32]``."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    out, square = bits, _one_byte()[bits & 0xFF] ^ bits >> 8
    while length:
        if length & 1:
            out = _apply(square, out)
        square, length = _apply(square, square), length >> 1
    return out


def _apply(matrix: Words, crc: Words) -> Words:
    """The matrix times each checksum: ``[32], [n] -> [n]``."""
    out = np.zeros_like(crc)
    for bit in range(32):
        out ^= np.where(crc >> bit & 1, matrix[bit], 0).astype(np.uint32)
    return out
