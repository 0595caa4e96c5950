"""The formats as bytes: how each of compressed-tensors' layouts stores one quantized weight [out, in] of b bits.

    pack-quantized        weight_packed       int32 [out, ceil(in·b/32)]   code + 2^(b−1), a little-endian bit stream
                          weight_shape        int64 [2]
                          weight_zero_point   int32 [ceil(out·b/32), in/group], affine only: packed along `out`
    int-, float-, naive-  weight              int8 (code − zero is code − zero_point) or float8_e4m3fn [out, in]
      quantized           weight_zero_point   int8, shape of the scales, affine only
    mxfp8-quantized       weight              float8_e4m3fn [out, in]
    nvfp4-, mxfp4-pack-   weight_packed       uint8 [out, in/2], even columns in the low nibble
    mxfp6-pack-quantized  weight_packed       uint8 [out, 3·in/4], four codes in three bytes, the first in the low bits

    weight_scale          float [1], [out, 1], [out, in/group] or [out/rows, in/columns]; of the model's dtype
                          NVFP4: float8_e4m3fn [out, in/16]; MX: uint8 [out, in/32], value 2^(byte − 127)
    weight_global_scale   float32 [1], NVFP4 only: what the scales are DIVIDED by

Zero points of symmetric weights are never stored (vLLM refuses them).
Source: compressed_tensors/compressors of version 0.20.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.numerics.packing import pack, unpack
from fewbit.tensor import QuantTensor, from_unsigned

Tensors = dict[str, Tensor]
"""Tensors of one module by their names beside it."""
GLOBAL_SCALE = "weight_global_scale"


@dataclass(frozen=True)
class Layout:
    """One layout: a way to store codes (and zero points) and a way to store scales."""

    name: str
    parts: tuple[str, ...]
    """Tensors of a symmetric weight; an affine one has weight_zero_point, too."""
    stored_bits: int | None
    """Bits of a stored code; None where weight_shape tells how many codes there are."""
    store_codes: Callable[[QuantTensor], Tensors]
    load_codes: Callable[[Tensors, QuantizationSpec], tuple[Tensor, Tensor | None]]
    exponents: bool = False
    """Whether scales are stored as the exponent's byte."""

    def needed(self, symmetric: bool) -> tuple[str, ...]:
        """Names of all tensors of a weight."""
        return self.parts if symmetric else (*self.parts, "weight_zero_point")

    def encode(self, weight: QuantTensor) -> Tensors:
        """The tensors of one weight; the spec must fit the layout (see scheme.py)."""
        scale = weight.scale.reshape(1) if weight.spec.qscheme == "per_tensor" else weight.scale.contiguous()
        tensors = self.store_codes(weight) | {"weight_scale": scale.view(torch.uint8) if self.exponents else scale}
        if GLOBAL_SCALE not in self.parts:
            return tensors
        if bool(torch.signbit(scale.float()).any()):
            raise ConfigError("NVFP4 has no negative scales (hardware reads them without a sign)")
        return tensors | {GLOBAL_SCALE: divisor(weight.global_scale)}

    def decode(self, tensors: Tensors, spec: QuantizationSpec) -> QuantTensor:
        """Inverse of `encode`. CheckpointError if the tensors' shapes contradict the spec."""
        codes, zero = self.load_codes(tensors, spec)
        stored = tensors["weight_scale"].view(torch.float8_e8m0fnu) if self.exponents else tensors["weight_scale"]
        unit = 1.0 / float(tensors[GLOBAL_SCALE]) if GLOBAL_SCALE in self.parts else 1.0
        try:
            shape = spec.tiling.scale_shape((codes.shape[0], codes.shape[1]))
            scale = stored.reshape(shape)
            return QuantTensor(codes, scale, None if zero is None else zero.reshape(shape), spec, unit)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"weight_scale {tuple(stored.shape)} does not fit its weight: {error}") from None


def signed_codes(codes: Tensor, spec: QuantizationSpec) -> Tensor:
    """Integer codes or zero points as compressed-tensors counts them, from −2^(b−1) on whatever the spec: int8."""
    return (codes.to(torch.int16) - _offset(spec)).to(torch.int8)


def codes_from_signed(signed: Tensor, spec: QuantizationSpec) -> Tensor:
    """Inverse of `signed_codes`, in the format's code dtype."""
    return (signed.to(torch.int16) + _offset(spec)).to(spec.format.code_dtype)


def _offset(spec: QuantizationSpec) -> int:
    return int(2 ** (spec.bits - 1)) + int(spec.format.smallest)


def _words(weight: QuantTensor) -> Tensors:
    tensors = {
        "weight_packed": pack(weight.unsigned_codes(), weight.spec.bits),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if (zero := weight.unsigned_zero_point()) is not None:
        tensors["weight_zero_point"] = pack(zero.T.contiguous(), weight.spec.bits).T.contiguous()
    return tensors


def _from_words(tensors: Tensors, spec: QuantizationSpec) -> tuple[Tensor, Tensor | None]:
    rows, columns = (int(n) for n in tensors["weight_shape"])
    codes = from_unsigned(unpack(tensors["weight_packed"], spec.bits, columns), spec)
    if "weight_zero_point" not in tensors:
        return codes, None
    zero = unpack(tensors["weight_zero_point"].T.contiguous(), spec.bits, rows).T.contiguous()
    return codes, from_unsigned(zero, spec)


def _bytes(weight: QuantTensor) -> Tensors:
    if not weight.spec.format.is_integer:
        return {"weight": weight.codes.contiguous().view(torch.float8_e4m3fn)}
    tensors = {"weight": signed_codes(weight.codes, weight.spec)}
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = signed_codes(weight.zero_point, weight.spec)
    return tensors


def _from_bytes(tensors: Tensors, spec: QuantizationSpec) -> tuple[Tensor, Tensor | None]:
    if not spec.format.is_integer:
        return tensors["weight"].view(torch.uint8), None
    zero = tensors.get("weight_zero_point")
    return codes_from_signed(tensors["weight"], spec), None if zero is None else codes_from_signed(zero, spec)


def _nibbles(weight: QuantTensor) -> Tensors:
    return {"weight_packed": weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4)}


def _from_nibbles(tensors: Tensors, spec: QuantizationSpec) -> tuple[Tensor, Tensor | None]:
    packed = tensors["weight_packed"]
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2), None


def _sextets(weight: QuantTensor) -> Tensors:
    a, b, c, d = weight.codes.unflatten(-1, (-1, 4)).unbind(-1)  # bits past the eighth of a byte fall off
    three = torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), dim=-1)
    return {"weight_packed": three.flatten(-2)}


def _from_sextets(tensors: Tensors, spec: QuantizationSpec) -> tuple[Tensor, Tensor | None]:
    x, y, z = tensors["weight_packed"].unflatten(-1, (-1, 3)).unbind(-1)
    four = torch.stack((x, (x >> 6) | (y << 2), (y >> 4) | (z << 4), z >> 2), dim=-1) & 0x3F
    return four.flatten(-2), None


def divisor(unit: float) -> Tensor:
    """The global scale as the format counts it: its reciprocal, exact because it is a power of two."""
    return torch.tensor([1.0 / unit], dtype=torch.float32)


_SCALED = ("weight", "weight_scale")
_PACKED = ("weight_packed", "weight_scale")
_BYTES = (8, _bytes, _from_bytes)
_NIBBLES = (4, _nibbles, _from_nibbles)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("pack-quantized", (*_PACKED, "weight_shape"), None, _words, _from_words),
        *(Layout(f"{name}-quantized", _SCALED, *_BYTES) for name in ("int", "float", "naive")),
        Layout("nvfp4-pack-quantized", (*_PACKED, GLOBAL_SCALE), *_NIBBLES),
        Layout("mxfp4-pack-quantized", _PACKED, *_NIBBLES, exponents=True),
        Layout("mxfp6-pack-quantized", _PACKED, 6, _sextets, _from_sextets, exponents=True),
        Layout("mxfp8-quantized", _SCALED, *_BYTES, exponents=True),
    )
}
