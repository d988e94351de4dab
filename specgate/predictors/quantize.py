"""Integer weights: quantised, packed into bytes, stored in the checkpoint, unpacked where they are used.

Letters: R rows of a weight (everything but its inputs), I inputs of a row, G groups of a row.

Symmetric, one scale per group of inputs: int8 with a group per row, int4 with a group per 32 inputs, two
codes to a byte (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877). torchao does the arithmetic of quantising; its
``quantize_`` and ``QATConfig`` know ``nn.Linear`` alone, and most weights here are one map per source point
(``PointLinear``), so they are handed over row by row. Reading packed weights needs no torchao.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from specgate.errors import ConfigError
from specgate.predictors.layers import PointLinear

GROUP = 32
SMALLEST = 2048
"""Parameters with fewer values stay as they are."""
_PACKED = ".parametrizations."
KEPT = {"calibrator", "conformal"}
"""Modules that are fitted after packing, and few."""


def quantise(rows: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Integers and scales of a weight whose last axis are the inputs; torchao's arithmetic.

    Args:
        bits: 8 or 4. group: inputs that share a scale; None: all of a row.

    Shapes:
        rows: ``[..., I]`` float. output: codes ``[..., I']`` int8, I padded with zeros to whole groups, and
        scales ``[..., G]`` bfloat16 (what is stored; the codes are those of the rounded scale).

    Raises:
        ConfigError: without torchao, or for other bits.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits} is no precision of weights here: choose 8 or 4")
    try:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine
    except ImportError:
        raise ConfigError("integer weights need torchao: pip install 'specgate[quantize]'") from None
    size = group or rows.shape[-1]
    padded = F.pad(rows.detach().float(), (0, -rows.shape[-1] % size))
    flat_RI = padded.reshape(-1, padded.shape[-1])
    low, high, block = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (1, size)
    scale_RG, _ = choose_qparams_affine(
        flat_RI,
        MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        block,
        torch.int8,
        quant_min=low,
        quant_max=high,
        eps=1e-12,
        scale_dtype=torch.float32,
    )
    scale_RG = scale_RG.to(torch.bfloat16)
    zero_RG = torch.zeros_like(scale_RG, dtype=torch.int32)
    codes_RI = quantize_affine(flat_RI, block, scale_RG.float(), zero_RG, torch.int8, low, high)
    return codes_RI.view(padded.shape), scale_RG.view(*padded.shape[:-1], -1)


def dequantise(codes: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """The weight that codes and scales stand for: ``[..., I']``, ``[..., G]`` -> ``[..., inputs]``
    float32."""
    grouped = codes.unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]
    return grouped.flatten(-2)[..., :inputs]


def fake_quantise(weight: Tensor, bits: int, axis: int, group: int | None) -> Tensor:
    """The weight as it will be once packed, in its own dtype and shape; ``axis`` holds the inputs."""
    rows = weight.movedim(axis, -1)
    codes, scale = quantise(rows, bits, group)
    return dequantise(codes, scale, rows.shape[-1]).movedim(-1, axis).to(weight.dtype)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes to a byte: int8 ``[..., I]`` in -8..7 -> uint8 ``[..., I / 2]``."""
    unsigned = (codes + 8).to(torch.uint8)
    return unsigned[..., ::2] | (unsigned[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The reverse of :func:`pack_nibbles`."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return both.to(torch.int8) - 8


class Packed(nn.Module):
    """How a packed weight is read (a parametrisation: ``module.weight`` unpacks it).

    Args:
        bits, group: see :func:`quantise`. axis: of the weight that holds the inputs. inputs: their number.
        empty: registered without values, to be filled from a checkpoint.

    Shapes:
        codes: ``[..., I']`` int8 or ``[..., I' / 2]`` uint8; scale ``[..., G]``. Leading axes may be cut
        down to some rows: what comes out is those rows.
    """

    def __init__(self, bits: int, group: int | None, axis: int, inputs: int, empty: bool) -> None:
        super().__init__()
        self.bits, self.group, self.axis, self.inputs, self.empty = bits, group, axis, inputs, empty

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The weight, float32."""
        values = unpack_nibbles(codes) if self.bits == 4 else codes
        return dequantise(values, scale, self.inputs).movedim(-1, self.axis)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Pack a weight."""
        rows = weight.detach().movedim(self.axis, -1)
        if self.empty:
            size = self.group or self.inputs
            padded = self.inputs + -self.inputs % size
            codes = torch.zeros(*rows.shape[:-1], padded, dtype=torch.int8, device=weight.device)
            scale = torch.zeros(*rows.shape[:-1], padded // size, dtype=torch.bfloat16, device=weight.device)
        else:
            codes, scale = quantise(rows, self.bits, self.group)
        return (pack_nibbles(codes) if self.bits == 4 else codes), scale


def quantisable(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, int]]:
    """Every weight worth packing: (its module, its name there, the weight, the axis of its inputs).

    All parameters of two and more axes, more than one input and at least :data:`SMALLEST` values, but biases.
    The inputs are the last axis, but the one before it in a ``PointLinear``.
    """
    for place, part in module.named_modules():
        if not KEPT.isdisjoint(place.split(".")) or _writes_its_own_state(part):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            large = parameter.dim() > 1 and parameter.numel() >= SMALLEST and parameter.is_floating_point()
            axis = input_axis(part, name)
            if large and parameter.shape[axis] > 1 and not name.startswith("bias"):
                yield part, name, parameter, axis


def _writes_its_own_state(part: nn.Module) -> bool:
    """Whether a module (torch-geometric's Linear is one) stores its weights by a method of its own, which
    would store them unpacked."""
    return type(part)._save_to_state_dict is not nn.Module._save_to_state_dict


def input_axis(part: nn.Module, name: str) -> int:
    """The axis of a weight that holds its inputs."""
    return -2 if isinstance(part, PointLinear) and name == "weight" else -1


def group_of(bits: int, group: int, inputs: int) -> int | None:
    """Inputs per scale: a row's all for int8; for int4 ``group``, or a narrow row's all if that is even."""
    if bits == 8 or (inputs <= group and inputs % 2 == 0):
        return None
    return group


def pack(module: nn.Module, bits: int, group: int = GROUP) -> None:
    """Replace every :func:`quantisable` weight of a module by packed codes and scales, in place; a predictor
    remembers it in ``quantization``, which its checkpoint keeps.

    Args:
        bits: 8 or 4. group: inputs per scale of int4.

    Raises:
        ConfigError: without torchao, or for other bits.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits} is no precision of weights here: choose 8 or 4")
    for part, name, weight, axis in list(quantisable(module)):
        _register(part, name, weight, axis, bits, group, empty=False)
    if hasattr(module, "quantization"):
        module.quantization = {"bits": bits, "group": group}  # type: ignore[assignment]


def prepare_packed(module: nn.Module, state: Mapping[str, Tensor], bits: int, group: int) -> None:
    """Make room in a module for the packed weights of a checkpoint, those that ``state`` holds packed."""
    for key in state:
        place, found, name = f".{key}".removesuffix(".original0").rpartition(_PACKED)
        if key.endswith(".original0") and found:
            part = module.get_submodule(place[1:])
            weight = getattr(part, name)
            _register(part, name, weight, input_axis(part, name), bits, group, empty=True)
    module.quantization = {"bits": bits, "group": group}  # type: ignore[assignment]


def _register(
    part: nn.Module, name: str, weight: Tensor, axis: int, bits: int, group: int, empty: bool
) -> None:
    weight.requires_grad_(False)
    inputs = weight.shape[axis]
    packed = Packed(bits, group_of(bits, group, inputs), axis, inputs, empty)
    parametrize.register_parametrization(part, name, packed, unsafe=True)


def stored_bytes(module: nn.Module) -> int:
    """Size of everything that a checkpoint keeps of a module, in bytes."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())
