"""What the codecs mean, in torch: encoding, decoding, and how far a decoded weight may be from the original.

Letters: R rows (all axes but the last), C columns (the last axis), G groups of a row.

The native core decodes by its own code (``csrc/codec.h``); both give the same bits. Only matrices are coded;
biases and other 1-D tensors are kept as they are.

=====  ===========================================================  ==================================
codec  values                                                       a scale
=====  ===========================================================  ==================================
int8   -127 to 127                                                  float32, one a row: absmax / 127
int4   -7 to 7, two a byte (the first in the low half, plus 8)      float16, one a group: absmax / 7
fp8    e4m3fn (Micikevicius et al., "FP8 formats for deep           float32, one a row: absmax / 448
       learning", 2022, arXiv:2209.05433)
=====  ===========================================================  ==================================

Scales are rounded up, so that no value has to be cut off. Decoding multiplies in float32, cuts off what the
slot's dtype cannot hold, and rounds to the nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specgate.errors import StoreError
from specgate.runtime.layout import DTYPES, BlockLayout

LEVELS = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
CHUNK = 1 << 20  # values that are encoded at a time


def row_scales(weights_RC: Tensor, codec: str, group: int = 0) -> Tensor:
    """The scales of a matrix: ``[R, 1]`` float32, or ``[R, G]`` float16 for int4.

    Raises:
        StoreError: if a scale of int4 would be beyond float16.
    """
    if codec == "int4":
        exact = padded(weights_RC, group).unflatten(-1, (-1, group)).abs().amax(-1).double() / LEVELS[codec]
        scales = exact.to(torch.float16)
        if scales.isinf().any():
            raise StoreError(
                f"A weight of {float(weights_RC.abs().max()):.4g} is beyond what int4 can scale (458528); "
                "pack with codec=int8, fp8 or none."
            )
        above = (scales.view(torch.int16) + 1).view(torch.float16)  # the next larger one: none is negative
        return torch.where(scales.double() < exact, above, scales)
    exact = weights_RC.abs().amax(-1, keepdim=True).double() / LEVELS[codec]
    scales = exact.float()
    return torch.where(scales.double() < exact, torch.nextafter(scales, scales.new_tensor(torch.inf)), scales)


def padded(weights_RC: Tensor, group: int) -> Tensor:
    """The matrix with zeros behind each row, up to whole groups."""
    return torch.nn.functional.pad(weights_RC, (0, -weights_RC.shape[-1] % group))


def encode_matrix(weights_RC: Tensor, codec: str, group: int = 0) -> tuple[Tensor, Tensor]:
    """Encodes a matrix.

    Returns:
        The bytes of the values, uint8 ``[R, C]`` (int4: ``[R, G * group / 2]``), and the scales.

    Raises:
        StoreError: for a value that is not finite, or too large for int4.
    """
    if not weights_RC.isfinite().all():
        raise StoreError("A value is not finite; no codec but none can keep it.")
    weights = weights_RC.float()
    scales = row_scales(weights, codec, group)
    if codec == "int4":
        weights = padded(weights, group).unflatten(-1, (-1, group))
        by = scales.float().unsqueeze(-1)
        values = torch.where(by > 0, weights / by, 0.0).round().flatten(-2)
        codes = (values + 8).to(torch.uint8)
        return codes[:, ::2] | (codes[:, 1::2] << 4), scales
    values = torch.where(scales > 0, weights / scales, 0.0)
    if codec == "int8":
        return values.round().to(torch.int8).view(torch.uint8), scales
    return values.to(torch.float8_e4m3fn).view(torch.uint8), scales


def decode_matrix(values: Tensor, scales: Tensor, cols: int, codec: str, dtype: torch.dtype) -> Tensor:
    """Decodes what :func:`encode_matrix` gave: ``[R, C]`` in the slot's dtype."""
    if codec == "int4":
        codes = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2).float() - 8
        products = codes.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)
        products = products.flatten(-2)[:, :cols]
    else:
        kind = torch.int8 if codec == "int8" else torch.float8_e4m3fn
        products = values.view(kind).float() * scales
    largest = torch.finfo(dtype).max
    return products.clamp(-largest, largest).to(dtype)


def encode_block(layout: BlockLayout, tensors: Mapping[str, Tensor], where: str = "the expert") -> Tensor:
    """The encoded block of one expert: uint8 ``[block_bytes]``; what pads it is zero.

    Args:
        layout: pieces and codec.
        tensors: the pieces by name, in the checkpoint's dtype or another (then they are cast first).
        where: whose expert this is, for errors.

    Raises:
        StoreError: for a value that is not finite or, with int4, too large; the piece is named.
    """
    block = torch.zeros(layout.block_bytes, dtype=torch.uint8)
    for piece in layout.pieces:
        rows = tensors[piece.name].reshape(piece.rows, piece.cols)
        if not piece.coded:
            _put(block, piece.block_offset, rows.to(DTYPES[piece.stored]))
            continue
        step = max(1, CHUNK // piece.cols)
        value_at, scale_at = piece.block_offset, piece.scale_offset
        for start in range(0, piece.rows, step):
            try:
                values, scales = encode_matrix(rows[start : start + step], layout.codec, layout.group)
            except StoreError as error:
                raise StoreError(f"{piece.name} of {where} cannot be coded. {error}") from None
            value_at += _put(block, value_at, values)
            scale_at += _put(block, scale_at, scales)
    return block


def decode_block(layout: BlockLayout, block: Tensor) -> dict[str, Tensor]:
    """The pieces of an encoded block (uint8 ``[block_bytes]``) in the slots' dtype."""
    out = {}
    for piece in layout.pieces:
        dtype = DTYPES[piece.dtype]
        size, scale_size = piece.sizes(layout.codec, layout.group)
        values = block[piece.block_offset : piece.block_offset + size]
        if piece.coded:
            scales = block[piece.scale_offset : piece.scale_offset + scale_size]
            scales = scales.view(torch.float16 if layout.codec == "int4" else torch.float32)
            values, scales = values.unflatten(0, (piece.rows, -1)), scales.unflatten(0, (piece.rows, -1))
            matrix = decode_matrix(values, scales, piece.cols, layout.codec, dtype)
        else:
            matrix = values.view(DTYPES[piece.stored]).to(dtype)
        out[piece.name] = matrix.reshape(piece.shape)
    return out


def decode_to_slot(layout: BlockLayout, block: Tensor) -> Tensor:
    """The slot that an encoded block becomes: uint8 ``[slot_bytes]``; what pads it is zero."""
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    for name, tensor in decode_block(layout, block).items():
        _put(slot, layout.piece(name).slot_offset, tensor)
    return slot


def error_bound(weights: Tensor, codec: str, group: int, dtype: torch.dtype) -> Tensor:
    """How far each decoded weight may be from the original: ``[..., C]`` float64, same shape.

    With the largest magnitude ``a`` of the row (int4: of the group), the unit roundoff ``u`` of the slot's
    dtype plus 2^-22, and its smallest step ``d``:

    * none: ``u |w| + d`` (nothing at all if the dtype is the checkpoint's)
    * int8: ``s / 2 + u (|w| + s / 2) + d`` with ``s = a / 127 + 2^-149``
    * int4: the same with ``s = (a / 7) (1 + 2^-10) + 2^-24``
    * fp8: ``e + u (|w| + e) + d`` with ``e = max(|w| / 16, s / 1024)``, ``s = a / 448 + 2^-149``

    and, if the dtype cannot hold the weight at all, what it is beyond the largest value.
    """
    exact = weights.double()
    size = exact.abs()
    unit, step = _rounding(dtype)
    beyond = (size - torch.finfo(dtype).max).clamp(min=0)
    if codec == "none":
        return unit * size + step + beyond
    if codec == "int4":
        cols = weights.shape[-1]
        groups = padded(size, group).unflatten(-1, (-1, group))
        scale = groups.amax(-1, keepdim=True) / LEVELS[codec] * (1 + 2**-10) + 2**-24
        error = (scale / 2).expand_as(groups).flatten(-2)[..., :cols]
    else:
        scale = size.amax(-1, keepdim=True) / LEVELS[codec] + 2**-149
        error = (scale / 2).expand_as(size) if codec == "int8" else torch.maximum(size / 16, scale / 1024)
    return error + unit * (size + error) + step + beyond


def _rounding(dtype: torch.dtype) -> tuple[float, float]:
    """Unit roundoff (with that of the product before it) and smallest positive value of a dtype."""
    info = torch.finfo(dtype)
    return info.eps / 2 + 2**-22, info.smallest_normal * info.eps


def _put(target: Tensor, offset: int, tensor: Tensor) -> int:
    """Copies a tensor's bytes to ``target[offset:]``; returns how many."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    target[offset : offset + data.numel()] = data
    return data.numel()
