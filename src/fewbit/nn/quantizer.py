"""`Quantizer(bits, method, group_size)`: quantize a tensor and see what it becomes; and the same for one matrix."""

from typing import Any

import torch
from torch import Tensor

from fewbit import process
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.steps import KeepsDtypes
from fewbit.nn.words import input_spec
from fewbit.numerics.scale_format import Float, ScaleFormat
from fewbit.tensor import QuantizedActivation, QuantTensor, after_first_stage, find_grid, round_to_nearest


class Quantizer(KeepsDtypes):
    """Quantizes tensors of any float dtype and shape [..., M, K]: each by a scale of its own, or, between `find_scale`
    and `forget`, by the scale that was found.

    Args:
        bits: 2 to 64, of integers. (Up to 8 can be stored: QuantLinear; more are rounded to.)
        method: what shares a scale, see nn/words.py.
        group_size: of per-block (per-group).
        symmetric: value = code · scale; otherwise affine, with a zero point.
        dtype: an element format instead of integers of `bits`: "e4m3", "e2m1" … (QuantizationSpec.dtype).
        options: any other field of QuantizationSpec: observer ("minmax" unless told otherwise), scale_type,
            percentile, clip_ratio, round_method …
    """

    scale: Tensor | None
    """What find_scale found: float32 values, shaped as above."""
    zero_point: Tensor | None
    """Its zero points (codes); None where symmetric."""

    def __init__(
        self,
        bits: int = 8,
        method: str = "per-tensor",
        group_size: int | None = None,
        symmetric: bool = True,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.spec = input_spec(bits, method, group_size, symmetric=symmetric, dtype=dtype, **options)
        self._quantizer = ActivationQuantizer(self.spec)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("zero_point", None, persistent=False)

    @process.neutral()
    def find_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Find scales and zero points for x [..., M, K], keep them as `scale` and `zero_point`, and return them.
        ConfigError for a cast, which has none, and for an x that the groups do not divide, that is empty, no float, or
        holds NaN or infinity."""
        if self.spec.format.is_cast:
            raise ConfigError(f"dtype {self.spec.dtype} is a cast without scales; call quantize")
        if not x.is_floating_point():
            raise ConfigError(f"only floats can be quantized, not {x.dtype}")
        if x.numel() == 0 or not bool(torch.isfinite(x).all()):
            what = "holds NaN or infinity" if x.numel() else "is empty"
            raise ConfigError(f"a tensor of shape {list(x.shape)} that {what} has no scale; give another one")
        matrix = _matrix(x)
        format, unknown = self._quantizer.format(x), self._quantizer.state()
        stored, zero = unknown.find_scale(unknown.split(matrix), format)
        shape = self._scale_shape(x, stored.shape[-1])
        self.scale = format.value(stored).reshape(shape)
        self.zero_point = None if zero is None else zero.reshape(shape)
        return self.scale, self.zero_point

    def forget(self) -> None:
        """Give every tensor a scale of its own again."""
        self.scale = self.zero_point = None

    @process.neutral()
    def quantize(self, x: Tensor) -> Tensor:
        """x rounded to its grid: quantized and dequantized, same shape and dtype. ConfigError if `find_scale` kept
        scales for other rows (per-token, per-block) or columns (per-channel)."""
        matrix = _matrix(x)
        if self.scale is None or x.numel() == 0 or not x.is_floating_point():
            return self._quantizer(x)  # type: ignore[no-any-return]
        tiles = self._quantizer.state().split(matrix)
        if tuple(self.scale.shape) != self._scale_shape(x, tiles.shape[-2]):
            raise ConfigError(
                f"the scale that was found has shape {list(self.scale.shape)}, which does not fit a tensor of shape "
                f"{list(x.shape)}; call find_scale with it, or forget() for a scale of its own"
            )
        parts = (self.scale, self.zero_point)
        scale, zero = (None if part is None else part.to(x.device).reshape(tiles.shape[:-1]) for part in parts)
        known = QuantizedActivation(self.spec, scale, zero)
        rounded = known.fake_quantize(x, Float())  # scales are values, not as they are stored
        return rounded + self._quantizer.once(x - rounded) if self.spec.residual else rounded

    forward = quantize

    def _scale_shape(self, x: Tensor, columns: int) -> tuple[int, ...]:  # for so many tiles along a row
        return (*x.shape[:-1], columns) if self.spec.tiling.rows == 1 else (1, columns)

    def extra_repr(self) -> str:
        return self.spec.summary


def _matrix(x: Tensor) -> Tensor:
    """[..., M, K] → [rows, K]. ConfigError for a bare number, which has no axis."""
    if x.ndim == 0:
        raise ConfigError("a tensor without axes cannot be quantized; give it one, e.g. x.reshape(1)")
    return x.reshape(-1, x.shape[-1]) if x.numel() else x


@process.neutral()
def quantize_matrix(weight: Tensor, spec: QuantizationSpec, name: str = "the weight") -> QuantTensor:
    """Round a float matrix [out, in] to the nearest codes of the grid that `spec` finds for it alone, without data.
    Scales are stored in its dtype unless the spec says otherwise. ConfigError, which names the matrix, if the spec's
    groups do not cover it, or it holds NaN or infinity."""
    spec.check_stored(name)
    return round_to_nearest(*_checked(weight, spec, name))


def round_matrix(weight: Tensor, spec: QuantizationSpec, name: str = "the weight") -> Tensor:
    """What a matrix [out, in] becomes, in its dtype: as `quantize_matrix`, and for dtypes that have no codes, too."""
    if spec.format.has_codes:
        return quantize_matrix(weight, spec, name).dequantize(weight.dtype)
    target, _, format = _checked(weight, spec, name)
    known = QuantizedActivation(spec, *find_grid(target, spec, format))
    return known.fake_quantize(target, format).to(weight.dtype)


def _checked(weight: Tensor, spec: QuantizationSpec, name: str) -> tuple[Tensor, QuantizationSpec, ScaleFormat]:
    """What is rounded to nearest (float32, after a first stage), by which spec, and how its scales are stored."""
    matrix = weight.detach().float()
    if not bool(torch.isfinite(matrix).all()):
        raise ConfigError(f"{name} holds NaN or infinity; is the model damaged?")
    for stage in (spec,) if spec.first_stage is None else (spec, spec.first_stage):
        try:
            stage.tiling.tile(*matrix.shape)
        except ValueError as error:
            raise ConfigError(f"{name} cannot be quantized {stage.summary}: {error}") from None
    if spec.first_stage is not None:
        spec.first_stage.check_stored(name)
    format = spec.scale_format(weight.dtype, spec.global_scale(matrix))
    return after_first_stage(matrix, spec, weight.dtype), spec, format
