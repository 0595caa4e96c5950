"""`Quantizer(bits, method, group_size)`: quantize a tensor and see what it becomes. And the same words as a spec.

What shares a scale, by FullQuantTransformer's names, for x [..., M, K]:

    per-tensor              everything               scales (1, 1)
    per-token               a row                    scales (..., M, 1)
    per-channel             a column                 scales (1, K)
    per-block, per-group    `group_size` neighbours  scales (..., M, K / group_size)

A linear's weight is [out, in], and one scale for each output channel is one for each row: `weight_spec` takes the
field's word for that, per-channel, which for a Quantizer on the bare matrix is per-token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError, nearest
from fewbit.nn.activation import ActivationQuantizer
from fewbit.numerics.scale_format import ScaleFormat
from fewbit.tensor import QuantTensor, quantize

METHODS = ("per-tensor", "per-token", "per-channel", "per-block", "per-group")


class Quantizer:
    """Quantizes tensors of any float dtype and shape [..., M, K], each with scales of its own.

    Args:
        bits: 2 to 8, of integers.
        method: what shares a scale, see above.
        group_size: of per-block (per-group).
        symmetric: value = code · scale; otherwise affine, with a zero point.
        dtype: an element format instead of integers of `bits`: "e4m3", "e2m1" … (QuantizationSpec.dtype).
        options: any other field of QuantizationSpec: observer ("minmax" unless told otherwise), scale_type,
            percentile, clip_ratio, round_method …
    """

    def __init__(
        self,
        bits: int = 8,
        method: str = "per-tensor",
        group_size: int | None = None,
        symmetric: bool = True,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        self.spec = make_spec(
            bits, method, group_size, symmetric, dtype, **{"observer": "minmax", "is_dynamic": True} | options
        )
        self._quantizer = ActivationQuantizer(self.spec)

    def find_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales (float32 values, shaped as above) and zero points (codes; None where symmetric) for x [..., M, K]."""
        if self.spec.format.is_cast:
            raise ConfigError(f"dtype {self.spec.dtype} is a cast without scales; call quantize")
        matrix = x.reshape(-1, x.shape[-1])
        format = self._quantizer.format(x)
        stored, zero = self._quantizer.find_scale(self._quantizer.split(matrix), format)
        rows = self.spec.tiling.rows == 1
        shape = (*x.shape[:-1], stored.shape[-1]) if rows else tuple(stored.shape)
        return format.value(stored).reshape(shape), None if zero is None else zero.reshape(shape)

    def quantize(self, x: Tensor) -> Tensor:
        """x rounded to its grid: quantized and dequantized, same shape and dtype."""
        quantized: Tensor = self._quantizer(x)
        return quantized

    __call__ = quantize

    def __repr__(self) -> str:
        return f"Quantizer({self.spec.summary})"


def make_spec(
    bits: int,
    method: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: str | None = None,
    **options: Any,
) -> QuantizationSpec:
    """The spec of a matrix whose rows are tokens. ConfigError for words that are unknown or contradict each other."""
    name = method.replace("_", "-").lower()
    if name not in METHODS:
        raise ConfigError(f"unknown method {method!r}{nearest(name, METHODS)}")
    if dtype is None:
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ConfigError(f"bits must be 2 to 8, not {bits!r}; for floats say dtype, e.g. dtype='e4m3'")
        dtype = f"int{bits}" if symmetric else f"uint{bits}"
    fields: dict[str, Any] = {"dtype": dtype, "symmetric": symmetric, "qscheme": name.replace("-", "_")}
    if name in ("per-block", "per-group"):
        if group_size is None:
            raise ConfigError(f"method {method} needs group_size")
        fields |= {"qscheme": "per_group", "group_size": group_size}
    elif group_size is not None:
        raise ConfigError(f"group_size {group_size} contradicts method {method}; use per-block")
    elif name == "per-channel":
        fields["ch_axis"] = 1
    return QuantizationSpec(**fields | options)


def weight_spec(
    bits: int,
    method: str,
    group_size: int | None = None,
    symmetric: bool = True,
    dtype: str | None = None,
    **options: Any,
) -> QuantizationSpec:
    """The spec of a linear's weight [out, in]: per-channel is a scale for each output channel."""
    spec_options = {"observer": "search"} | options
    if method.replace("_", "-").lower() == "per-channel":
        spec_options.setdefault("ch_axis", 0)
    return make_spec(bits, method, group_size, symmetric, dtype, **spec_options)


def quantize_matrix(weight: Tensor, spec: QuantizationSpec, name: str = "the weight") -> QuantTensor:
    """Round a float matrix [out, in] to the nearest codes of the grid that `spec` finds for it alone, without data.

    Scales are stored in the weight's dtype unless the spec says otherwise. ConfigError, which names the matrix, if the
    spec's groups do not cover it, or it holds NaN or infinity.
    """
    matrix = weight.detach().float()
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError(f"{name} holds NaN or infinity; is the model damaged?")
    try:
        spec.tiling.tile(*matrix.shape)
    except ValueError as error:
        raise ConfigError(f"{name} cannot be quantized {spec.summary}: {error}") from None
    target = matrix
    if spec.first_stage is not None:
        target = quantize_matrix(weight, spec.first_stage, name).dequantize()
    format = scale_format(matrix, spec, weight.dtype)
    stored, zero = spec.grid_rule(format).find(spec.tiling.split(target))
    return quantize(target, spec, format, stored, zero)


def scale_format(matrix: Tensor, spec: QuantizationSpec, dtype: torch.dtype) -> ScaleFormat:
    """How the scales of `matrix` are stored, with the second level that its largest magnitude needs."""
    return spec.scale_format(dtype, spec.unit(float(matrix.abs().max())))
