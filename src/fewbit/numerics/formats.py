"""Element formats as data: what numbers a code of a few bits can stand for.

Integers follow two's complement; small floats follow OCP FP8 (e4m3 without infinities, e5m2 with) and OCP MX v1.0
(e3m2, e2m3, e2m1: no infinities, no NaN). bfloat16 and float16 are casts: they have no codes of their own. Integers of
9 bits and more can be rounded to, but nothing stores them.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

RoundMethod = Literal["half_even", "round", "floor"]
FLOAT32_MANTISSA = 23
NATIVE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # whose bits are the codes
CAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CODE_BITS = 8  # of the widest codes that are stored
WIDEST = 64  # bits of the widest integers that can be rounded to


@dataclass(frozen=True)
class NumberFormat:
    """One element format. Encoding saturates at `smallest` and `largest`, the finite ends of the range."""

    name: str
    bits: int
    kind: Literal["int", "float", "cast"]
    smallest: float
    largest: float
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    nan_code: int | None = None

    @property
    def is_integer(self) -> bool:
        return self.kind == "int"

    @property
    def is_cast(self) -> bool:
        """Elements are a torch dtype as they are: nothing is scaled, nothing is packed."""
        return self.kind == "cast"

    @property
    def has_codes(self) -> bool:
        """Whether elements can be stored: as codes of at most 8 bits, or as what they are cast to."""
        return self.is_cast or self.bits <= CODE_BITS

    @property
    def emax(self) -> int:
        """Exponent of the largest binade, floor(log2(largest)): what OCP MX reduces a block's exponent by."""
        return math.frexp(self.largest)[1] - 1

    @property
    def is_signed(self) -> bool:
        return self.smallest < 0

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of one code unpacked: int8 for signed integers, uint8 for what else is coded, float64 for wide
        integers."""
        if self.is_cast:
            return CAST_DTYPES[self.name]
        if not self.has_codes:
            return torch.float64
        return torch.int8 if self.is_integer and self.is_signed else torch.uint8

    def round(self, x: Tensor, method: RoundMethod = "half_even") -> Tensor:
        """Nearest representable value of each element, saturating. Float in, float32 out; `x` is left alone."""
        return self.round_(x.float().clone(), method)

    def round_(self, x: Tensor, method: RoundMethod = "half_even", signed_zero: bool = True) -> Tensor:
        """`round` in place, for float32 `x` without NaN: the inner loop of every search, so a few plain passes.

        Without `signed_zero`, −0 may become 0, which saves one.
        """
        if self.is_integer:
            return round_steps_(x, method).clamp_(self.smallest, self.largest)
        if self.is_cast:
            return x.copy_(x.clamp_(self.smallest, self.largest).to(self.code_dtype))
        # The quantum of a float's binade is a power of two: its exponent bits, at least those of the lowest normal
        # binade, less the mantissa's. In units of it, the nearest float is the nearest integer.
        x.clamp_(self.smallest, self.largest)
        quantum = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
        quantum.clamp_(min=2.0 ** (1 - self.bias)).mul_(2.0**-self.mantissa_bits)
        if method != "half_even":
            return round_steps_(x.div_(quantum), method).mul_(quantum).clamp_(self.smallest, self.largest)
        # A sum with 1.5 · 2^23 quanta has no room for less than one of them, and is itself rounded half to even
        much = 1.5 * 2.0**FLOAT32_MANTISSA
        if not signed_zero:
            return x.add_(quantum, alpha=much).sub_(quantum, alpha=much)
        return torch.copysign(x.add(quantum, alpha=much).sub_(quantum, alpha=much), x, out=x)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest representable values: `x` float of any shape → `code_dtype`, same shape.

        NaN becomes the format's NaN code; ValueError where there is none: a silent 0 would hide a broken tensor.
        """
        if self.is_cast:  # NaN stays NaN
            return x.float().clamp(self.smallest, self.largest).to(self.code_dtype)
        isnan = x.isnan()
        if self.nan_code is None and bool(isnan.any()):
            raise ValueError(f"NaN cannot be encoded as {self.name}")
        if self.is_integer:
            return x.round().clamp(self.smallest, self.largest).to(self.code_dtype)
        codes = self.codes(self.round(x))
        return codes if self.nan_code is None else codes.masked_fill_(isnan, self.nan_code)

    def codes(self, values: Tensor) -> Tensor:
        """Codes of float32 values of the format itself (what `round_` gives), without NaN: `encode`, but faster."""
        if self.is_integer or self.is_cast:
            return values.to(self.code_dtype)
        if self.name in NATIVE_DTYPES:
            return values.to(NATIVE_DTYPES[self.name]).view(torch.uint8)
        sign = torch.signbit(values).to(torch.uint8) << (self.bits - 1)
        positive = _code_table(self.name)[: 2 ** (self.bits - 1)].to(values.device, values.dtype)
        return torch.searchsorted(positive, values.abs().contiguous()).to(torch.uint8) | sign

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of `codes` in `dtype`."""
        if self.is_integer or self.is_cast:
            return codes.to(dtype)
        if self.name in NATIVE_DTYPES:
            return codes.view(NATIVE_DTYPES[self.name]).to(dtype)
        return _code_table(self.name).to(codes.device, dtype)[codes.long()]


def round_steps_(steps: Tensor, method: RoundMethod) -> Tensor:
    """Round to integers in place. half_even: ties to the even one; round: ties away from zero; floor: downwards."""
    if method == "half_even":
        return steps.round_()
    if method == "floor":
        return steps.floor_()
    # just below a half, because 0.5 added to the number just below 0.5 is 1
    return steps.add_(torch.full_like(steps, 0.5 - 2.0**-25).copysign_(steps)).trunc_()


def format_of(name: str) -> NumberFormat | None:
    """An element format by its name, integers of more than 8 bits included; None for one that does not exist."""
    if name in FORMATS:
        return FORMATS[name]
    wide = re.fullmatch(r"(u?)int([1-9]\d?)", name)
    if wide is None or not CODE_BITS < int(wide[2]) <= WIDEST:
        return None
    return _integer(int(wide[2]), signed=not wide[1])


@cache
def _code_table(name: str) -> Tensor:
    """Float64 values of all 2^bits codes of a float without NaN: sign, exponent and mantissa bits."""
    fmt = FORMATS[name]
    code = torch.arange(2 ** (fmt.bits - 1))
    exponent = code >> fmt.mantissa_bits
    # subnormal numbers have the exponent of the lowest normal ones, and no 1 before the mantissa
    steps = torch.where(exponent > 1, code - ((exponent - 1) << fmt.mantissa_bits), code)
    positive = torch.ldexp(steps.double(), exponent.clamp(min=1) - fmt.bias - fmt.mantissa_bits)
    return torch.cat([positive, -positive])


def _integer(bits: int, signed: bool) -> NumberFormat:
    name, smallest = ("int", -(2.0 ** (bits - 1))) if signed else ("uint", 0.0)
    return NumberFormat(f"{name}{bits}", bits, "int", smallest, 2.0 ** (bits - signed) - 1)


def _float(exponent: int, mantissa: int, largest: float, nan: int | None = None) -> NumberFormat:
    name, bits, bias = f"e{exponent}m{mantissa}", 1 + exponent + mantissa, 2 ** (exponent - 1) - 1
    return NumberFormat(name, bits, "float", -largest, largest, exponent, mantissa, bias, nan)


FORMATS: dict[str, NumberFormat] = {
    fmt.name: fmt
    for fmt in (
        *(_integer(bits, signed) for signed in (True, False) for bits in range(2, 9)),
        _float(4, 3, 448.0, nan=0x7F),
        _float(5, 2, 57344.0, nan=0x7F),
        _float(3, 2, 28.0),
        _float(2, 3, 7.5),
        _float(2, 1, 6.0),
        NumberFormat("bfloat16", 16, "cast", -3.3895313892515355e38, 3.3895313892515355e38),
        NumberFormat("float16", 16, "cast", -65504.0, 65504.0),
    )
}
