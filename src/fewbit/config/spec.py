"""How ONE tensor is quantized, and which tensors of a module are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fewbit.config import quark
from fewbit.config.validation import config_class
from fewbit.errors import ConfigError, nearest, shown
from fewbit.numerics.formats import FORMATS, NumberFormat, RoundMethod, format_of
from fewbit.numerics.grouping import Tiling
from fewbit.numerics.scale_format import SCALE_TYPES, ExponentMode, ScaleFormat
from fewbit.numerics.scales import GridRule

SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

QScheme = Literal["per_tensor", "per_channel", "per_token", "per_group", "per_block"]
Observer = Literal["search", "mse", "minmax", "signed-max", "percentile", "histogram", "moving-average", "placeholder"]
WEIGHT_ONLY_OBSERVERS = ("search", "signed-max")
SEARCHING_OBSERVERS = ("search", "mse", "histogram")
ACCUMULATING_OBSERVERS = ("histogram", "moving-average")
# The fields of a cast that others need to find or store their scales
PLAIN = {
    "symmetric": True, "qscheme": "per_tensor", "observer": "placeholder", "scale_type": "float", "clip_ratio": 1.0,
}  # fmt: skip


@config_class
class QuantizationSpec:
    """How one tensor is quantized: element format, what shares a scale, how the scale is found and stored. Weights are
    [out, in], activations [..., tokens, channels]."""

    dtype: str = "int4"
    """Element format: int2 … int8, uint2 … uint8 (with a zero point), e4m3, e5m2, e3m2, e2m3, e2m1; bfloat16 and
    float16 are plain casts. fp8_e4m3, fp8_e5m2, fp6_e3m2, fp6_e2m3 and fp4 name the same formats. int9 … int64 and
    uint9 … uint64 are rounded to (Quantizer, FakeQuantLinear), but cannot be stored."""
    qscheme: QScheme = "per_group"
    """What shares one scale: the tensor, a channel (a weight's row), a token (an activation's row), `group_size`
    neighbours, or a block of `block_size`."""
    group_size: Annotated[int, Field(gt=0)] | None = None
    """Elements per scale; given with per_group and only then."""
    block_size: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    """Rows and columns of a block; given with per_block and only then."""
    ch_axis: int | None = None
    """per_channel: the axis that keeps a scale for each of its entries (0: rows, the default; 1 or −1: columns).
    per_group: the axis along which groups run (1 or −1, the default, or 0)."""
    symmetric: bool = True
    """Symmetric: value = code · scale. Otherwise affine: value = (code − zero_point) · scale."""
    observer: Observer = "search"
    """How the scale is found; see numerics/scales.py and, for static activations, calibration/observers.py.
    search: the range and sign with the least error weighted by the inputs' second moment. mse: the same, unweighted.
    minmax, signed-max, percentile: formulas. histogram: the least error over a histogram of all batches.
    moving-average: minmax of each batch, averaged. placeholder: nothing (casts)."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Percent of the values that the observer "percentile" keeps in the range."""
    scale_type: str = "float"
    """How scales are stored: float, pof2, e4m3 (with a global scale: NVFP4), e8m0 or microexponent; see
    numerics/scale_format.py."""
    scale_dtype: Literal["checkpoint", "float32", "float16", "bfloat16"] = "checkpoint"
    """Dtype of float and pof2 scales; "checkpoint" is the dtype of the weight they belong to."""
    exponent_mode: ExponentMode = "even"
    """How a block's exponent (e8m0, microexponent) follows from its largest magnitude."""
    round_method: RoundMethod = "half_even"
    """half_even: ties to the even code. round: ties away from zero. floor: always down."""
    clip_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The range is multiplied by this before its scale is taken."""
    is_dynamic: bool = False
    """Activations: the scale comes from the tensor at hand. Otherwise (static) it comes from calibration."""
    residual: bool = False
    """Activations: what quantization left over is quantized as well and added (two codes per element)."""
    first_stage: QuantizationSpec | None = None
    """Quantize by this spec first, then quantize the result by the rest of this one (FP8, then INT4 for W4A8)."""

    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(quark.translate_spec)

    def __post_init__(self) -> None:
        if format_of(self.dtype) is None:
            raise ConfigError(f"unknown dtype {shown(self.dtype)}{nearest(self.dtype, FORMATS)}")
        if self.scale_type not in SCALE_TYPES:
            raise ConfigError(f"unknown scale_type {shown(self.scale_type)}{nearest(self.scale_type, SCALE_TYPES)}")
        for check in (self._check_granularity, self._check_grid, self._check_observer, self._check_scale):
            check()
        if (first := self.first_stage) is not None:
            _check_weight("first_stage", first)
            if first.first_stage is not None:
                raise ConfigError("first_stage: there are two stages at most")

    def check_stored(self, what: str) -> None:
        """ConfigError, which names `what`, for a dtype that has no codes to store."""
        if not self.format.has_codes:
            only = "can be rounded to (Quantizer, FakeQuantLinear), but not stored"
            raise ConfigError(f"{what}: {self.dtype} {only}; codes have 2 to 8 bits")

    def _check_granularity(self) -> None:
        sizes = (("per_group", "group_size", self.group_size), ("per_block", "block_size", self.block_size))
        for qscheme, field, size in sizes:
            if self.qscheme == qscheme and size is None:
                raise ConfigError(f"qscheme {qscheme} needs {field}")
            if self.qscheme != qscheme and size is not None:
                raise ConfigError(f"{field} {size} contradicts qscheme {self.qscheme}; use {qscheme}")
        if self.ch_axis is not None:
            if self.qscheme not in ("per_channel", "per_group"):
                raise ConfigError(f"ch_axis has no effect with qscheme {self.qscheme}; leave it out")
            if self.ch_axis not in (-2, -1, 0, 1):
                raise ConfigError(f"ch_axis {self.ch_axis} is out of range: a matrix has the axes 0 and 1 (or −2, −1)")

    def _check_grid(self) -> None:
        if self.format.is_cast:
            for field, only in PLAIN.items():
                if (given := getattr(self, field)) != only:
                    raise ConfigError(f"dtype {self.dtype} is a cast without scales; leave {field} {given} out")
            return
        if self.symmetric and self.format.is_integer and not self.format.is_signed:
            raise ConfigError(f"symmetric codes are signed: use {self.dtype.removeprefix('u')}, or symmetric=False")
        if not self.symmetric and not self.format.is_integer:
            raise ConfigError(f"dtype {self.dtype} has a sign of its own: symmetric=False needs an integer format")

    def _check_observer(self) -> None:
        if self.observer == "signed-max" and not (self.symmetric and self.format.is_integer):
            raise ConfigError("observer signed-max is for symmetric integers; use search or minmax")
        if self.observer == "signed-max" and not self.stored_as.may_be_negative:
            raise ConfigError(f"observer signed-max needs scales with a sign; {self.scale_type} has none")
        if self.observer == "placeholder" and not self.format.is_cast:
            raise ConfigError(f"observer placeholder finds no scale, which dtype {self.dtype} needs; use minmax")
        if self.is_dynamic and self.observer in ACCUMULATING_OBSERVERS:
            raise ConfigError(f"observer {self.observer} gathers many batches; is_dynamic=True sees only one")
        if self.clip_ratio != 1.0 and self.observer in SEARCHING_OBSERVERS:
            raise ConfigError(f"clip_ratio {self.clip_ratio}: observer {self.observer} finds the range; use minmax")

    def _check_scale(self) -> None:
        stored_as = self.stored_as
        if stored_as.own_dtype is not None and self.scale_dtype != "checkpoint":
            raise ConfigError(f"scale_dtype {self.scale_dtype} contradicts scale_type {self.scale_type}")
        if not (self.symmetric or stored_as.allows_zero_points):
            raise ConfigError(f"scale_type {self.scale_type} is for symmetric specs")
        if (problem := stored_as.problem(self.format, self.group_size)) is not None:
            raise ConfigError(f"scale_type {self.scale_type} {problem}")
        if stored_as.block > 1 and (self.ch_axis in (0, -2) or self.qscheme == "per_block"):
            where = f"ch_axis {self.ch_axis}" if self.qscheme != "per_block" else "qscheme per_block"
            raise ConfigError(f"{where}: scale_type {self.scale_type} stores the scales along a row jointly")

    @property
    def format(self) -> NumberFormat:
        found = format_of(self.dtype)
        assert found is not None
        return found

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def tiling(self) -> Tiling:
        """Tiles of a matrix [rows, columns] that share a scale."""
        if self.block_size is not None:
            return Tiling(*self.block_size, partial=True)
        if self.qscheme == "per_tensor":
            return Tiling(rows=0, columns=0)
        size, block = self.group_size or 0, self.stored_as.block
        if self.qscheme == "per_group":
            return Tiling(size, 1) if self.ch_axis in (0, -2) else Tiling(1, size, block=block)
        if self.qscheme == "per_channel" and self.ch_axis in (1, -1):
            return Tiling(rows=0, columns=1, block=block)
        return Tiling(rows=1, columns=0)

    @property
    def summary(self) -> str:
        """A few words for tables: "int8 per_token dynamic"."""
        size = f" {self.group_size}" if self.group_size else f" {self.block_size}" if self.block_size else ""
        scale = "" if self.scale_type == "float" else f" {self.scale_type} scales"
        affine = "" if self.symmetric else " affine"
        return f"{self.dtype} {self.qscheme}{size}{affine}{scale}{' dynamic' if self.is_dynamic else ''}"

    @property
    def needs_data(self) -> bool:
        """Whether an activation of this spec has a scale that only calibration can find."""
        return not self.format.is_cast and (not self.is_dynamic or self.stored_as.has_global_scale)

    @property
    def stored_as(self) -> type[ScaleFormat]:
        """The scale type."""
        return SCALE_TYPES[self.scale_type]

    def stored_scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the scales of a weight that is stored in `weight_dtype`; float32 for 8-bit floats and float64."""
        if self.stored_as.own_dtype is not None:
            return self.stored_as.own_dtype
        if self.scale_dtype != "checkpoint":
            return SCALE_DTYPES[self.scale_dtype]
        return weight_dtype if weight_dtype in SCALE_DTYPES.values() else torch.float32

    def scale_format(self, weight_dtype: torch.dtype, global_scale: float = 1.0) -> ScaleFormat:
        """How the scales of a tensor of that dtype are stored, given its global scale (1.0 where there is none)."""
        return self.stored_as(self.stored_scale_dtype(weight_dtype), global_scale)

    def global_scale(self, *tensors: Tensor) -> float:
        """One for all of some tensors, by their largest magnitude; 1.0 where the scale type has none."""
        if not self.stored_as.has_global_scale:
            return 1.0
        largest = max((float(x.abs().max()) for x in tensors if x.numel()), default=0.0)
        return self.stored_as.global_scale_for(largest, self.format)

    def grid_rule(self, scale: ScaleFormat) -> GridRule:
        """The rule that finds this spec's scales."""
        return GridRule(
            fmt=self.format, scale=scale, symmetric=self.symmetric, rule=self.observer, mode=self.exponent_mode,
            percentile=self.percentile, clip_ratio=self.clip_ratio, rounding=self.round_method,
        )  # fmt: skip

    def stored_bits(self, shape: tuple[int, int], weight_dtype: torch.dtype = torch.bfloat16) -> int:
        """Bits of a weight of `shape` [out, in], read in `weight_dtype`: codes, scales and zero points."""
        elements = self.bits * math.prod(shape)
        if self.format.is_cast:
            return elements
        scales = math.prod(self.tiling.scale_shape(shape))
        zero_points = 0 if self.symmetric else self.bits * scales
        return elements + zero_points + self.scale_format(weight_dtype).stored_bits(scales)


@config_class
class QuantizationConfig:
    """Which tensors of a module are quantized and how. None leaves the tensor as it is."""

    weight: QuantizationSpec | None = None
    input_tensors: QuantizationSpec | None = None
    """Activations that go in."""
    output_tensors: QuantizationSpec | None = None
    """Activations that come out."""
    bias: QuantizationSpec | None = None

    translate: ClassVar[Callable[[dict[str, Any]], dict[str, Any]]] = staticmethod(quark.translate_config)

    def __post_init__(self) -> None:
        for name, spec in self.activations.items():
            _check_activation(name, spec, spec.tiling.rows == 0, "per_tensor")
            if spec.is_dynamic and spec.qscheme != "per_tensor" and (spec.block_size or spec.tiling.rows != 1):
                raise ConfigError(
                    f"{name}: qscheme {spec.qscheme} with ch_axis {spec.ch_axis} takes scales over several tokens, "
                    "whose number differs from batch to batch; use per_token, or groups along channels"
                )
        if self.weight is not None:
            _check_weight("weight", self.weight)
        if (bias := self.bias) is not None:
            stored_as = bias.stored_as
            if bias.observer in ACCUMULATING_OBSERVERS or stored_as.has_global_scale or stored_as.block > 1:
                raise ConfigError("bias: one row takes a plain grid: float or e8m0 scales, found by minmax or mse")
            if bias.is_dynamic or bias.residual:
                raise ConfigError("bias: is_dynamic and residual are for activations; a bias never changes")

    @property
    def quantizes(self) -> bool:
        """Whether it names anything."""
        return any((self.weight, self.input_tensors, self.output_tensors, self.bias))

    @property
    def activations(self) -> dict[str, QuantizationSpec]:
        """By field, those that are not None."""
        found = {"input_tensors": self.input_tensors, "output_tensors": self.output_tensors}
        return {name: spec for name, spec in found.items() if spec is not None}

    @property
    def needs_data(self) -> bool:
        """Whether an activation has a scale that only calibration can find."""
        return any(spec.needs_data for spec in self.activations.values())


def _check_weight(name: str, spec: QuantizationSpec) -> None:
    """ConfigError for what only an activation can have."""
    if spec.is_dynamic or spec.residual:
        raise ConfigError(
            f"{name}: {'is_dynamic' if spec.is_dynamic else 'residual'} is for activations; leave it out"
        )
    if spec.qscheme == "per_token":
        raise ConfigError(f"{name}: per_token is for activations; use per_channel")
    if spec.observer in ACCUMULATING_OBSERVERS:
        raise ConfigError(f"{name}: observer {spec.observer} gathers batches; use search, mse or minmax")


def _check_activation(name: str, spec: QuantizationSpec, fits_static: bool, static: str) -> None:
    """ConfigError for what only a weight can have, and for a static scale unless its granularity `fits_static`."""
    if spec.observer in WEIGHT_ONLY_OBSERVERS:
        raise ConfigError(f"{name}: observer {spec.observer} is for weights; use minmax, mse or percentile")
    if spec.first_stage is not None:
        raise ConfigError(f"{name}: first_stage is for weights; an activation takes residual=True")
    if spec.residual and not spec.is_dynamic:
        raise ConfigError(f"{name}: residual needs is_dynamic=True: what is left over has a scale of its own")
    if not (spec.is_dynamic or fits_static):
        raise ConfigError(
            f"{name}: qscheme {spec.qscheme} has scales for each token, which calibration cannot know; "
            f"use is_dynamic=True, or {static}"
        )


@config_class
class AttentionConfig:
    """What is quantized inside attention, after rotary embeddings. None leaves the tensor as it is.

    Granularity of key, value and query [batch, heads, tokens, head_dim]: per_tensor; per_channel: a scale per head;
    per_token: a scale for all heads of a token; per_group: groups along head_dim of each token and head.
    """

    key: QuantizationSpec | None = None
    value: QuantizationSpec | None = None
    query: QuantizationSpec | None = None
    probabilities: QuantizationSpec | None = None
    """Attention probabilities [batch, heads, tokens, tokens]."""

    def __post_init__(self) -> None:
        if not self.specs:
            raise ConfigError("attention: name a spec for key, value, query or probabilities, or leave attention out")
        for name, spec in self.specs.items():
            fits_static = spec.qscheme in ("per_tensor", "per_channel")
            _check_activation(f"attention {name}", spec, fits_static, "per_tensor or per_channel (a scale per head)")

    @property
    def specs(self) -> dict[str, QuantizationSpec]:
        """By slot, those that are not None."""
        found = {"key": self.key, "value": self.value, "query": self.query, "probabilities": self.probabilities}
        return {slot: spec for slot, spec in found.items() if spec is not None}
