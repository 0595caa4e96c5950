"""QuantTensor: THE representation of a quantized weight. Every algorithm ends in one, every exporter starts from one.
QuantizedActivation is its counterpart for what flows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.numerics import scales
from fewbit.numerics.packing import pack, unpack
from fewbit.numerics.scale_format import ScaleFormat

PIECE = 2**17  # elements that are worked on at a time: few enough for the cache


@dataclass(frozen=True)
class QuantTensor:
    """A quantized matrix [out, in].

    codes: [out, in] in the format's code dtype (int8 or uint8; the dtype itself for a cast), one code per element.
    scale: [tiles along out, tiles along in] in the dtype it is stored in; floats may be negative.
    zero_point: same shape as `scale`, code dtype; None for a symmetric spec.
    global_scale: what all scales are multiplied by (NVFP4); 1.0 for scale types without one.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantizationSpec
    global_scale: float = 1.0

    def __post_init__(self) -> None:
        expected = self.spec.tiling.scale_shape((self.codes.shape[0], self.codes.shape[1]))
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale has shape {tuple(self.scale.shape)}, the spec says {expected}")
        if (self.zero_point is None) != self.spec.symmetric:
            raise ValueError("a zero point is there exactly when the spec is affine")
        if self.zero_point is not None and self.zero_point.shape != self.scale.shape:
            raise ValueError(f"zero point has shape {tuple(self.zero_point.shape)}, the scale {expected}")
        if self.codes.dtype != self.spec.format.code_dtype:
            raise ValueError(f"codes of {self.spec.dtype} are {self.spec.format.code_dtype}, not {self.codes.dtype}")
        if self.global_scale != 1.0 and not self.spec.stored_as.has_global_scale:
            raise ValueError(f"scales of type {self.spec.scale_type} have no global scale")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element: packed codes, scales and zero points."""
        return self.spec.stored_bits((self.shape[0], self.shape[1]), self.scale.dtype) / self.codes.numel()

    @property
    def scale_format(self) -> ScaleFormat:
        return self.spec.stored_as(self.scale.dtype, self.global_scale)

    @property
    def scale_value(self) -> Tensor:
        """What the codes are multiplied with: scale · global_scale, float32, shape of `scale`."""
        return self.scale_format.value(self.scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(codes − zero_point) · scale, computed in float32 and rounded once to `dtype`. [out, in]"""
        values = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for rows, tiles in self.spec.tiling.pieces(self.shape[0], self.shape[1], PIECE):
            values[rows] = self._values(rows, tiles)
        return values

    def squared_error(self, weight: Tensor) -> Tensor:
        """Σ (dequantized − weight)² of each row of `weight` [out, in]: float64 [out]."""
        pieces = self.spec.tiling.pieces(self.shape[0], self.shape[1], PIECE)
        deltas = (self._values(rows, tiles).sub_(weight[rows]) for rows, tiles in pieces)
        return torch.cat([torch.linalg.vector_norm(delta, dim=-1).double().square_() for delta in deltas])

    def _values(self, rows: slice, tiles: slice) -> Tensor:
        """Some rows dequantized, float32; `tiles` are the rows of their scales."""
        tiling, codes = self.spec.tiling, self.codes[rows]
        scale, zero = self.scale_value[tiles], None if self.zero_point is None else self.zero_point[tiles]
        return tiling.merge(scales.decode(tiling.split(codes), scale, zero, self.spec.format), *codes.shape)

    def unsigned_codes(self) -> Tensor:
        """Codes shifted to start at 0 (the offset is −smallest code): uint8 [out, in], what is packed."""
        return _to_unsigned(self.codes, self.spec)

    def unsigned_zero_point(self) -> Tensor | None:
        """Zero point shifted like `unsigned_codes`; None for a symmetric spec."""
        return None if self.zero_point is None else _to_unsigned(self.zero_point, self.spec)

    def rows(self, rows: slice) -> QuantTensor:
        """Some rows, copied; for specs whose scales belong to rows or to the whole tensor."""
        own = slice(None) if self.spec.qscheme == "per_tensor" else rows
        zero = None if self.zero_point is None else self.zero_point[own].clone()
        return replace(self, codes=self.codes[rows].contiguous(), scale=self.scale[own].clone(), zero_point=zero)

    def with_rows(self, rows: Tensor, other: QuantTensor) -> QuantTensor:
        """A copy with some rows (bool [out]) of `other`, which has the same spec and global scale. Rows that share
        scales come together."""
        tile_rows, _ = self.spec.tiling.tile(*self.shape)

        def mixed(ours: Tensor, theirs: Tensor, chosen: Tensor) -> Tensor:
            result = ours.clone()
            result.view(torch.uint8)[chosen] = theirs.contiguous().view(torch.uint8)[chosen]  # bytes of any dtype
            return result

        zero, tiles = self.zero_point, rows[::tile_rows]
        if zero is not None and other.zero_point is not None:
            zero = mixed(zero, other.zero_point, tiles)
        codes, scale = mixed(self.codes, other.codes, rows), mixed(self.scale, other.scale, tiles)
        return replace(self, codes=codes, scale=scale, zero_point=zero)

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored: codes and zero_point packed in int32 words along the last axis, scales as they are."""
        codes = self.codes if self.spec.format.is_cast else pack(self.unsigned_codes(), self.spec.bits)
        tensors = {"codes": codes, "scale": self.scale.contiguous()}
        if (zero := self.unsigned_zero_point()) is not None:
            tensors["zero_point"] = pack(zero, self.spec.bits)
        if self.spec.stored_as.has_global_scale:
            tensors["global_scale"] = torch.tensor([self.global_scale], dtype=torch.float32)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], spec: QuantizationSpec, shape: tuple[int, int]) -> QuantTensor:
        """Inverse of `to_tensors` for a matrix of `shape`."""
        codes, scale, zero = tensors["codes"], tensors["scale"], tensors.get("zero_point")
        if not spec.format.is_cast:
            codes = from_unsigned(unpack(codes, spec.bits, shape[1]), spec)
        if zero is not None:
            zero = from_unsigned(unpack(zero, spec.bits, scale.shape[1]), spec)
        return cls(codes, scale, zero, spec, float(tensors.get("global_scale", 1.0)))

    @staticmethod
    def stored_names(spec: QuantizationSpec) -> list[str]:
        """Keys of `to_tensors` for a spec."""
        names = ["codes", "scale"]
        return names + ["zero_point"] * (not spec.symmetric) + ["global_scale"] * spec.stored_as.has_global_scale


@dataclass(frozen=True)
class QuantizedActivation:
    """How one activation is quantized, and what calibration found for it.

    scale, zero_point: [rows, columns] of tiles, as stored; None for a dynamic spec, whose scales come with the tensor.
    global_scale: found by calibration even where the groups' own scales are dynamic; 1.0 for types without one.
    """

    spec: QuantizationSpec
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: float = 1.0

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored of it."""
        found = {"scale": self.scale, "zero_point": self.zero_point}
        # linears may share them, files may not
        tensors = {name: part.clone() for name, part in found.items() if part is not None}
        if self.spec.stored_as.has_global_scale:
            tensors["global_scale"] = torch.tensor([self.global_scale], dtype=torch.float32)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], spec: QuantizationSpec) -> QuantizedActivation:
        """Inverse of `to_tensors`."""
        return cls(spec, tensors.get("scale"), tensors.get("zero_point"), float(tensors.get("global_scale", 1.0)))

    def split(self, matrix: Tensor) -> Tensor:
        """Matrix [rows, channels] → tiles [rows, columns, n]; ConfigError if they do not cover it exactly."""
        try:
            return self.spec.tiling.split(matrix)
        except ValueError as error:
            raise ConfigError(f"an activation cannot be quantized {self.spec.summary}: {error}") from None

    def find_scale(self, tiles: Tensor, format: ScaleFormat) -> tuple[Tensor, Tensor | None]:
        """Stored scale and zero point of tiles [rows, columns, n]: known already, or found now."""
        if self.scale is not None:
            return self.scale, self.zero_point
        if self.spec.is_dynamic:
            return replace(self.spec.grid_rule(format), signed=False).find(tiles.float())
        raise CalibrationError(
            f"a static activation ({self.spec.summary}) has no scale yet; run data through the model inside "
            "`with fewbit.calibrate(model):` first, or use is_dynamic=True"
        )

    def fake_quantize(self, x: Tensor, format: ScaleFormat) -> Tensor:
        """x [..., channels] quantized and dequantized in its dtype, whatever the spec says of a residual."""
        spec = self.spec
        if spec.format.is_cast:
            return spec.format.encode(x).to(x.dtype)
        if not x.is_floating_point():
            raise ConfigError(f"only floats can be quantized, not {x.dtype}")
        if x.numel() == 0:  # an expert without tokens
            return x
        matrix = x.reshape(-1, x.shape[-1])
        tiles = self.split(matrix)
        stored, zero = self.find_scale(tiles, format)
        values = scales.fake_quantize(tiles, format.value(stored), zero, spec.format, spec.round_method)
        return spec.tiling.merge(values, *matrix.shape).reshape(x.shape).to(x.dtype)

    def encode(self, matrix: Tensor, format: ScaleFormat) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes of a matrix [rows, channels] in its shape, and the scales and zero points [rows, columns] of its tiles
        as stored: what a kernel takes. `decode` is the inverse; the format is no cast."""
        tiles, spec = self.split(matrix), self.spec
        stored, zero = self.find_scale(tiles, format)
        codes = scales.encode(tiles, format.value(stored), zero, spec.format, spec.round_method)
        return spec.tiling.merge(codes, *matrix.shape), stored, zero

    def decode(self, codes: Tensor, format: ScaleFormat, stored: Tensor, zero: Tensor | None) -> Tensor:
        """Values (float32) of what `encode` gives."""
        values = scales.decode(self.split(codes), format.value(stored), zero, self.spec.format)
        return self.spec.tiling.merge(values, *codes.shape)


def find_grid(
    weight: Tensor, spec: QuantizationSpec, format: ScaleFormat, costs: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Stored scales and zero points of a weight [out, in] of any float dtype, by the spec's rule; `costs` [in] weigh
    the squared errors of each column where it searches."""
    weights = None if costs is None or spec.observer != "search" else spec.tiling.split(costs.expand_as(weight))
    return spec.grid_rule(format).find(spec.tiling.split(weight), weights)


def round_to_nearest(
    weight: Tensor, spec: QuantizationSpec, format: ScaleFormat, costs: Tensor | None = None
) -> QuantTensor:
    """A weight [out, in] of any float dtype on the grid that `find_grid` finds; no float32 copy of the whole."""
    return quantize(weight, spec, format, *find_grid(weight, spec, format, costs))


def after_first_stage(weight: Tensor, spec: QuantizationSpec, dtype: torch.dtype) -> Tensor:
    """A weight [out, in] after the first of two stages, rounded to nearest: float32; as it is, if there is one stage.
    `dtype` is that of the checkpoint's weight."""
    if (first := spec.first_stage) is None:
        return weight
    return round_to_nearest(weight, first, first.scale_format(dtype, first.global_scale(weight))).dequantize()


def quantize(
    weight: Tensor, spec: QuantizationSpec, format: ScaleFormat, scale: Tensor, zero_point: Tensor | None = None
) -> QuantTensor:
    """Round a float weight [out, in] to the nearest codes of a given grid; `scale` as it is stored in `format`."""
    tiling, value = spec.tiling, format.value(scale)
    codes = torch.empty(weight.shape, dtype=spec.format.code_dtype, device=weight.device)
    for rows, tiles in tiling.pieces(weight.shape[0], weight.shape[1], PIECE):
        zero = None if zero_point is None else zero_point[tiles]
        found = scales.encode(tiling.split(weight[rows]), value[tiles], zero, spec.format, spec.round_method)
        codes[rows] = tiling.merge(found, *weight[rows].shape)
    return QuantTensor(codes, scale, zero_point, spec, format.global_scale)


def _to_unsigned(codes: Tensor, spec: QuantizationSpec) -> Tensor:
    shifted = spec.format.is_integer and spec.format.is_signed
    return codes.view(torch.uint8) - int(spec.format.smallest) if shifted else codes  # modulo 256


def from_unsigned(codes: Tensor, spec: QuantizationSpec) -> Tensor:
    """Unsigned codes (starting at 0) → the format's own codes."""
    shifted = spec.format.is_integer and spec.format.is_signed
    return (codes + (256 + int(spec.format.smallest))).view(torch.int8) if shifted else codes  # modulo 256
