"""QuantTensor: THE representation of a quantized weight.

Every algorithm ends in one, every exporter starts from one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import scales
from fewbit.numerics.packing import pack, unpack


@dataclass(frozen=True)
class QuantTensor:
    """A quantized matrix [out, in].

    codes: [out, in] in the format's code dtype (int8 or uint8), one code per element.
    scale: [tiles along out, tiles along in] in the dtype it is stored in; may be negative.
    zero_point: same shape as `scale`, code dtype; None for a symmetric spec.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantizationSpec

    def __post_init__(self) -> None:
        expected = self.spec.tiling.scale_shape(tuple(self.codes.shape))
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale has shape {tuple(self.scale.shape)}, the spec says {expected}")
        if (self.zero_point is None) != self.spec.symmetric:
            raise ValueError("a zero point is there exactly when the spec is affine")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero point has shape {tuple(self.zero_point.shape)}, the scale {expected}")
        if self.codes.dtype != self.spec.format.code_dtype:
            raise ValueError(f"codes of {self.spec.dtype} are {self.spec.format.code_dtype}, not {self.codes.dtype}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element: packed codes, scales and zero points."""
        rows, columns = self.shape
        return self.spec.stored_bits((rows, columns), self.scale.dtype) / self.codes.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes − zero_point) · scale, computed in float32 and rounded once to `dtype`. [out, in]"""
        tiling = self.spec.tiling
        tiles = tiling.split(self.codes)
        values = scales.decode(tiles, self.scale, self.zero_point, self.spec.format)
        return tiling.merge(values, *self.shape).to(dtype)

    def unsigned_codes(self) -> Tensor:
        """Codes shifted to start at 0 (the offset is −smallest code): uint8 [out, in], what is packed."""
        return _to_unsigned(self.codes, self.spec)

    def unsigned_zero_point(self) -> Tensor | None:
        """Zero point shifted like `unsigned_codes`; None for a symmetric spec."""
        return None if self.zero_point is None else _to_unsigned(self.zero_point, self.spec)

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored: codes and zero_point packed in int32 words along the last axis, scale as it is."""
        tensors = {"codes": pack(self.unsigned_codes(), self.spec.bits), "scale": self.scale.contiguous()}
        zero = self.unsigned_zero_point()
        if zero is not None:
            tensors["zero_point"] = pack(zero, self.spec.bits)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], spec: QuantizationSpec, shape: tuple[int, int]) -> QuantTensor:
        """Inverse of `to_tensors` for a matrix of `shape`."""
        codes = from_unsigned(unpack(tensors["codes"], spec.bits, shape[1]), spec)
        scale = tensors["scale"]
        zero = None
        if "zero_point" in tensors:
            zero = from_unsigned(unpack(tensors["zero_point"], spec.bits, scale.shape[1]), spec)
        return cls(codes, scale, zero, spec)


def quantize(weight: Tensor, spec: QuantizationSpec, scale: Tensor, zero_point: Tensor | None = None) -> QuantTensor:
    """Round a float weight [out, in] to the nearest codes of a given grid."""
    tiling = spec.tiling
    codes = scales.encode(tiling.split(weight), scale, zero_point, spec.format)
    return QuantTensor(tiling.merge(codes, *weight.shape), scale, zero_point, spec)


def _to_unsigned(codes: Tensor, spec: QuantizationSpec) -> Tensor:
    if not spec.format.is_signed:
        return codes
    return (codes.to(torch.int16) - int(spec.format.smallest)).to(torch.uint8)


def from_unsigned(codes: Tensor, spec: QuantizationSpec) -> Tensor:
    """Unsigned codes (starting at 0) → the format's own codes."""
    if not spec.format.is_signed:
        return codes
    return (codes.to(torch.int16) + int(spec.format.smallest)).to(torch.int8)
