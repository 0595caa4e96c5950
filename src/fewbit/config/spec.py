"""How ONE tensor is quantized, and which tensors of a module are."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from fewbit.config.validation import config_class
from fewbit.errors import ConfigError, nearest
from fewbit.numerics.formats import FORMATS, NumberFormat
from fewbit.numerics.grouping import Tiling

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@config_class
class QuantizationSpec:
    """How one weight [out, in] is quantized: element format, what shares a scale, how the scale is found."""

    dtype: str = "int4"
    """Element format: int2 … int8 (two's complement) or uint2 … uint8 (with a zero point)."""
    qscheme: Literal["per_tensor", "per_channel", "per_group"] = "per_group"
    """What shares one scale: the tensor, a row (output channel), or `group_size` neighbours along `in`."""
    group_size: Annotated[int, Field(gt=0)] | None = None
    """Elements per scale along `in`; given with per_group and only then."""
    symmetric: bool = True
    """Symmetric: value = code · scale. Otherwise affine: value = (code − zero_point) · scale."""
    scale_rule: Literal["search", "minmax", "signed-max"] = "search"
    """search: the shrink factor and sign with the least error weighted by the inputs' second moment.
    minmax: the range's ends map to the code range's ends (symmetric: amax / ((2^b − 1) / 2)).
    signed-max: the element of largest magnitude maps to −2^(b−1), so the scale may be negative."""
    scale_dtype: Literal["checkpoint", "float32", "float16", "bfloat16"] = "checkpoint"
    """Dtype the scale is stored in; "checkpoint" is the dtype of the weight it replaces."""

    def __post_init__(self) -> None:
        if self.dtype not in FORMATS:
            raise ConfigError(f"unknown dtype {self.dtype!r}{nearest(self.dtype, INTEGER_FORMATS)}")
        if self.dtype not in INTEGER_FORMATS:
            raise ConfigError(
                f"dtype {self.dtype!r} is not a weight format of this version: {', '.join(INTEGER_FORMATS)}"
            )
        if self.qscheme == "per_group" and self.group_size is None:
            raise ConfigError("qscheme per_group needs group_size")
        if self.qscheme != "per_group" and self.group_size is not None:
            raise ConfigError(f"group_size {self.group_size} contradicts qscheme {self.qscheme}; use per_group")
        if self.symmetric and not self.format.is_signed:
            raise ConfigError(f"symmetric codes are signed: use {self.dtype.removeprefix('u')}, or symmetric=False")
        if self.scale_rule == "signed-max" and not self.symmetric:
            raise ConfigError("scale_rule signed-max is for symmetric specs; an affine one takes search or minmax")

    @property
    def format(self) -> NumberFormat:
        return FORMATS[self.dtype]

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def tiling(self) -> Tiling:
        """Tiles of a weight [out, in] that share a scale."""
        if self.qscheme == "per_tensor":
            return Tiling(rows=0, columns=0)
        return Tiling(rows=1, columns=self.group_size or 0)

    def stored_bits(self, shape: tuple[int, int], weight_dtype: torch.dtype = torch.bfloat16) -> int:
        """Bits that a weight of `shape` [out, in] takes: packed codes, scales and zero points.

        `weight_dtype` is what the checkpoint holds it in, which decides the scales' dtype unless the spec does.
        """
        scales = math.prod(self.tiling.scale_shape(shape))
        per_scale = 8 * self.stored_scale_dtype(weight_dtype).itemsize + (0 if self.symmetric else self.bits)
        return self.bits * math.prod(shape) + per_scale * scales

    def stored_scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the stored scales of a weight that the checkpoint holds in `weight_dtype`."""
        return weight_dtype if self.scale_dtype == "checkpoint" else SCALE_DTYPES[self.scale_dtype]


INTEGER_FORMATS = [name for name, fmt in FORMATS.items() if fmt.is_integer]


@config_class
class QuantizationConfig:
    """Which tensors of a module are quantized and how. None leaves the tensor as it is."""

    weight: QuantizationSpec | None = None
