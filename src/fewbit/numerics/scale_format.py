"""How scales are stored, and what a wanted scale becomes when it is.

Every search scores the scale that will be stored, so all of them go through `ScaleFormat.store`:

    float            float32, float16 or bfloat16, sign allowed
    pof2             a power of two in one of those dtypes, so that scaling is a shift
    e4m3             one byte per group times one `unit` for the whole tensor (NVFP4)
    e8m0             one byte: a bare power of two (OCP MX v1.0)
    microexponent    a byte per 16 elements and a bit per pair below it (MX6, MX9: Rouhani et al. 2023,
                     arXiv:2302.08007)

The unit of e4m3 is a power of two. Formats disagree whether it multiplies (ModelOpt) or divides (compressed-tensors);
a power of two is exact both ways, and e4m3's exponent leaves room for the half binade that may cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbit.numerics.formats import FORMATS, NumberFormat

ScaleType = Literal["float", "pof2", "e4m3", "e8m0", "microexponent"]
ExponentMode = Literal["floor", "ceil", "rceil", "even"]

SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127  # of normal float32
E8M0_SMALLEST_EXPONENT = -127  # subnormal in float32
E4M3_SMALLEST = 2.0**-9
PAIRS = 8  # of elements that share a microexponent's byte


@dataclass(frozen=True)
class ScaleFormat:
    """How the scales of one tensor are stored: value = stored · unit."""

    type: ScaleType = "float"
    dtype: torch.dtype = torch.float32
    """Stored dtype: a float dtype, float8_e4m3fn or float8_e8m0fnu."""
    unit: float = 1.0
    """Second level, one per tensor; a power of two."""

    @property
    def is_power_of_two(self) -> bool:
        return self.type in ("pof2", "e8m0", "microexponent")

    @property
    def may_be_negative(self) -> bool:
        return self.type in ("float", "pof2")

    def store(self, scale: Tensor) -> Tensor:
        """The stored form of wanted scales (float32). Never zero: where nothing is to be scaled, 1 takes its place;
        where a scale is too small for its dtype, the smallest there is (in e4m3 for both). Infinite ones are NaN in
        bytes, so that what is not finite does not come out as a number."""
        if self.type == "e4m3":
            steps = (scale / self.unit).float()
            finite = steps.isfinite()
            steps = FORMATS["e4m3"].round_(steps.nan_to_num_()).clamp_(min=E4M3_SMALLEST)
            return steps.masked_fill_(~finite, torch.nan).to(torch.float8_e4m3fn)
        if self.is_power_of_two:
            smallest = SMALLEST_EXPONENT if self.may_be_negative else E8M0_SMALLEST_EXPONENT
            scale = nearest_power_of_two(scale, smallest)
            if self.type == "microexponent":  # before zeros become 1: a pair of zeros lifts no other
                scale = _share_exponents(scale)
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        stored = scale.to(self.dtype)
        if not self.may_be_negative:  # a byte, which holds every power of two that is left
            return stored
        limits = torch.finfo(self.dtype)
        least = torch.full_like(stored, limits.smallest_normal * limits.eps).copysign(stored)
        instead = torch.where(scale == 0, torch.ones_like(stored), least)
        return torch.where(stored == 0, instead, stored)

    def value(self, stored: Tensor) -> Tensor:
        """What a stored scale stands for, float32."""
        return stored.float() if self.unit == 1.0 else stored.float() * self.unit

    def round(self, scale: Tensor) -> Tensor:
        """The value of a wanted scale once stored, float32."""
        return self.value(self.store(scale))


def unit_for(magnitude: float, fmt: NumberFormat) -> float:
    """Second-level scale of a tensor whose largest magnitude is given: the largest e4m3 scale (448) times the largest
    element just covers it, rounded up to a power of two."""
    if not 0 < magnitude < math.inf:
        return 1.0
    exponent = math.ceil(math.log2(magnitude / (FORMATS["e4m3"].largest * fmt.largest)))
    return 2.0 ** min(max(exponent, SMALLEST_EXPONENT), LARGEST_EXPONENT)


def nearest_power_of_two(scale: Tensor, smallest: int = SMALLEST_EXPONENT) -> Tensor:
    """The power of two with the nearest logarithm, from 2^smallest to 2^127, keeping the sign; zero stays zero.
    float32 → float32."""
    mantissa, exponent = torch.frexp(scale)  # |mantissa| in [0.5, 1)
    exponent = exponent - 1 + (mantissa.abs() > 0.5**0.5).to(exponent.dtype)
    power = torch.ldexp(torch.ones_like(scale), exponent.clamp(smallest, LARGEST_EXPONENT))
    signed: Tensor = power.copysign(scale).masked_fill(scale == 0, 0.0)
    return signed.masked_fill(~scale.isfinite(), torch.nan)


def block_exponent_scale(magnitude: Tensor, fmt: NumberFormat, mode: ExponentMode) -> Tensor:
    """Power-of-two scale of blocks with the given largest magnitudes (OCP MX v1.0, §6.3 and what others made of it).

    floor: 2^(floor(log2 amax) − emax), OCP's; elements above the largest saturate. ceil: the next power of two up.
    rceil: the smallest power of two with which nothing saturates. even: like floor after amax was rounded to the
    element's mantissa bits, so that the block moves up a binade when its maximum would round there.
    The largest magnitude stays finite: where it would be rounded up to 2^128, it saturates a binade below. Blocks of
    zeros get 1, those that hold infinity or NaN get NaN. float32 → float32, from 2^-127 to 2^127.
    """
    amax = magnitude.double()  # so that no float32 is too small or too large for what follows
    if mode == "rceil":
        exponent = _ceil_log2(amax / fmt.largest)
    elif mode == "ceil":
        exponent = _ceil_log2(amax) - fmt.emax
    else:
        mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1)
        exponent = exponent - 1 - fmt.emax
        if mode == "even":
            mantissa_bits = fmt.bits - 2 if fmt.is_integer else fmt.mantissa_bits
            exponent += (mantissa >= 1 - 2.0 ** -(mantissa_bits + 2)).to(exponent.dtype)
    exponent = exponent.clamp_(E8M0_SMALLEST_EXPONENT, LARGEST_EXPONENT)
    for _ in range(2):  # both ends of an integer grid
        exponent -= _overflows(amax, exponent, fmt).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(amax), exponent).float()
    scale = torch.where(magnitude == 0, torch.ones_like(scale), scale)
    return scale.masked_fill(~magnitude.isfinite(), torch.nan)


def _overflows(amax: Tensor, exponent: Tensor, fmt: NumberFormat) -> Tensor:
    """Whether ± a finite float64 `amax`, rounded to a multiple of 2^exponent, is no finite float32."""
    steps = torch.ldexp(amax, -exponent).nan_to_num_().float()
    top = torch.maximum(fmt.round(steps), -fmt.round(-steps)).double()
    return torch.ldexp(top, exponent) > torch.finfo(torch.float32).max


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return exponent - (mantissa == 0.5).to(exponent.dtype)


def _share_exponents(scale: Tensor) -> Tensor:
    """Scales of pairs [..., pairs], powers of two: none more than a factor 2 below the largest of its 8 neighbours."""
    if scale.shape[-1] % PAIRS:
        raise ValueError(f"{scale.shape[-1]} pairs do not divide into microexponent blocks of {PAIRS}")
    blocks = scale.unflatten(-1, (-1, PAIRS))
    shared: Tensor = blocks.maximum(blocks.amax(-1, keepdim=True) / 2)
    return shared.flatten(-2)
