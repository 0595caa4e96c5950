"""Scale types: how scales are stored, and what a wanted scale becomes when it is. One class each, in `SCALE_TYPES`:

    float            float32, float16 or bfloat16, sign allowed
    pof2             a power of two in one of those dtypes, so that scaling is a shift
    e4m3             one byte per group times one global scale for the whole tensor (NVFP4)
    e8m0             one byte: a bare power of two (OCP MX v1.0)
    microexponent    a byte per 16 elements and a bit per pair below it (MX6, MX9: Rouhani et al. 2023,
                     arXiv:2302.08007)

Nothing else knows what a scale type is: searches score the values that `round` gives, over the candidates that the
type enumerates; all others ask for its properties.

The global scale of e4m3 is a power of two. Formats disagree whether it multiplies (ModelOpt) or divides
(compressed-tensors); a power of two is exact both ways, and e4m3 has room for the half binade that may cost.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewbit.numerics.formats import FORMATS, NumberFormat

ExponentMode = Literal["floor", "ceil", "rceil", "even"]

SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127  # of normal float32
E8M0_SMALLEST_EXPONENT = -127  # subnormal in float32
# e4m3 codes around that of the covering scale, 1.75× and back: 4 instead of 6 for the largest element, too
E4M3_STEPS, E4M3_STEPS_IN_OCTAVE = 6, 8
PAIRS = 8  # of elements that share a microexponent's byte


@dataclass(frozen=True)
class ScaleFormat(ABC):
    """How the scales of one tensor are stored: [..., tiles], the last axis running along a row. A stored scale is one
    element of `dtype`, whatever its bits mean: only `value` reads them. Storing its value gives that value again."""

    dtype: torch.dtype = torch.float32
    global_scale: float = 1.0
    """What all values are multiplied by, one per tensor; 1.0 for types that have none."""

    name: ClassVar[str]
    own_dtype: ClassVar[torch.dtype | None] = None
    """The `dtype` of this type; None for a float dtype that the spec or the checkpoint chooses."""
    may_be_negative: ClassVar[bool] = False
    allows_zero_points: ClassVar[bool] = False
    """Whether affine grids may have such scales."""
    is_power_of_two: ClassVar[bool] = False
    """Too coarse to be fitted to codes in closed form."""
    is_coarse: ClassVar[bool] = False
    """Whether a search tries every scale near the covering one (`storable`), instead of shares of it."""
    has_global_scale: ClassVar[bool] = False
    block: ClassVar[int] = 1
    """Neighbours along a row that are stored jointly, so that what one becomes depends on the others."""
    shares: ClassVar[tuple[float, ...]] = (1.0,)
    """Of the covering scale: a few that come near what a search finds, for estimates."""

    @abstractmethod
    def store(self, scale: Tensor) -> Tensor:
        """The stored form [..., tiles] of wanted scales (float32). No value is 0: zeros become 1, and what is too
        small the smallest there is (in e4m3 both). What is not finite stays so, as NaN where there is no infinity."""

    def value(self, stored: Tensor) -> Tensor:
        """What a stored scale stands for, float32."""
        return stored.float() if self.global_scale == 1.0 else stored.float() * self.global_scale

    def round(self, scale: Tensor) -> Tensor:
        """The value of a wanted scale once stored, float32."""
        return self.value(self.store(scale))

    def covering(self, magnitude: Tensor, fmt: NumberFormat, mode: ExponentMode) -> Tensor:
        """The positive scale, not yet stored, at which the largest magnitude [...] reaches the end of the grid, or 0;
        `mode` is for block exponents."""
        reach: float = (2**fmt.bits - 1) / 2 if fmt.is_integer else fmt.largest
        return magnitude / reach

    def storable(self, end: Tensor, octaves: Tensor) -> Iterator[Tensor]:
        """Of a coarse type, all values [...] worth trying from just above a covering scale, `end` [...], down by
        `octaves` [...]. A type that does not enumerate its own is tried at its `shares`."""
        yield from (self.round(share * end) for share in self.shares)

    def alternatives(self, covering: Tensor) -> Iterator[Iterable[Tensor]]:
        """Of a type that is stored jointly, about the covering scales [..., tiles]: for each state of what a block
        shares, the values [..., tiles] of which each tile may take one. A type that does not enumerate its own states
        is tried at its `shares`, a whole block at a time."""
        yield from ((self.round(share * covering),) for share in self.shares)

    def pooled(self, error: Tensor) -> Tensor:
        """Errors [..., tiles], each the sum over the tiles whose scales are stored jointly."""
        if self.block == 1:
            return error
        summed: Tensor = error.unflatten(-1, (-1, self.block)).sum(-1)
        return summed.repeat_interleave(self.block, -1)

    @classmethod
    def global_scale_for(cls, magnitude: float, fmt: NumberFormat) -> float:
        """The global scale of a tensor with that largest magnitude; 1.0 for types that have none."""
        return 1.0

    @classmethod
    def problem(cls, fmt: NumberFormat, group_size: int | None) -> str | None:
        """Why elements or groups cannot have such scales, continuing "scale_type NAME "; None if they can."""
        return None

    def stored_bits(self, scales: int) -> int:
        """Bits that a tensor's scales take, the global one included."""
        return 8 * self.dtype.itemsize * scales + 32 * self.has_global_scale


class Float(ScaleFormat):
    """A float dtype."""

    name = "float"
    may_be_negative = allows_zero_points = True
    shares: ClassVar[tuple[float, ...]] = (1.0, 0.9, 0.8, 0.7, 0.6)

    def store(self, scale: Tensor) -> Tensor:
        stored = scale.to(self.dtype)
        limits = torch.finfo(self.dtype)
        least = torch.full_like(stored, limits.smallest_normal * limits.eps).copysign(stored)
        instead = torch.where(scale == 0, torch.ones_like(stored), least)
        return torch.where(stored == 0, instead, stored)


class _Binades(ScaleFormat):
    """Powers of two."""

    is_power_of_two = is_coarse = True

    def storable(self, end: Tensor, octaves: Tensor) -> Iterator[Tensor]:
        down = octaves.ceil().clamp_(min=1)
        for step in range(1, -1 - int(down.max()) if down.numel() else 0, -1):
            yield self.round(torch.exp2(torch.clamp(-down, min=step)) * end)


class PowerOfTwo(_Binades, Float):
    """A power of two in a float dtype."""

    name = "pof2"
    shares = (1.0, 0.5)

    def store(self, scale: Tensor) -> Tensor:
        return Float.store(self, nearest_power_of_two(scale))


class E4M3(ScaleFormat):
    """A byte of three mantissa bits; the global scale puts the tensor's largest magnitude in its range."""

    name = "e4m3"
    own_dtype = torch.float8_e4m3fn
    is_coarse = has_global_scale = True
    shares = (1.0, 0.85, 1.5)

    def store(self, scale: Tensor) -> Tensor:
        steps = (scale / self.global_scale).float()
        finite = steps.isfinite()
        steps = FORMATS["e4m3"].round_(steps.nan_to_num_()).clamp_(min=2.0**-9)
        return steps.masked_fill_(~finite, torch.nan).to(torch.float8_e4m3fn)

    def storable(self, end: Tensor, octaves: Tensor) -> Iterator[Tensor]:
        code = self.store(end).view(torch.uint8).int()
        down = (octaves * E4M3_STEPS_IN_OCTAVE).ceil().int().clamp_(min=E4M3_STEPS)
        for step in range(E4M3_STEPS, -1 - int(down.max()) if down.numel() else 0, -1):
            codes = (code + torch.clamp(-down, min=step)).clamp_(1, 126).to(torch.uint8)
            yield self.value(codes.view(torch.float8_e4m3fn))

    @classmethod
    def global_scale_for(cls, magnitude: float, fmt: NumberFormat) -> float:
        """The power of two with which the largest scale (448) times the largest element covers the magnitude."""
        if not 0 < magnitude < math.inf:
            return 1.0
        exponent = math.ceil(math.log2(magnitude / (FORMATS["e4m3"].largest * fmt.largest)))
        return 2.0 ** min(max(exponent, SMALLEST_EXPONENT), LARGEST_EXPONENT)


class E8M0(_Binades):
    """A byte that is an exponent."""

    name = "e8m0"
    own_dtype = torch.float8_e8m0fnu
    shares: ClassVar[tuple[float, ...]] = (1.0, 0.5, 2.0)

    def store(self, scale: Tensor) -> Tensor:
        power = self.shared(nearest_power_of_two(scale, E8M0_SMALLEST_EXPONENT))
        return torch.where(power == 0, torch.ones_like(power), power).to(self.dtype)

    def covering(self, magnitude: Tensor, fmt: NumberFormat, mode: ExponentMode) -> Tensor:
        return block_exponent_scale(magnitude, fmt, mode).masked_fill(magnitude == 0, 0.0)

    def shared(self, power: Tensor) -> Tensor:
        """What becomes of powers of two and zeros [..., tiles] that are stored jointly."""
        return power


class Microexponent(E8M0):
    """The byte of 8 pairs and a bit for each of them. A scale is held as the byte that both amount to."""

    name = "microexponent"
    block = PAIRS
    shares = (1.0,)

    def shared(self, power: Tensor) -> Tensor:
        """None is more than a factor 2 below the largest of its 8 neighbours; a pair of zeros lifts no other."""
        if power.shape[-1] % PAIRS:
            raise ValueError(f"{power.shape[-1]} pairs do not divide into microexponent blocks of {PAIRS}")
        blocks = power.unflatten(-1, (-1, PAIRS))
        lifted: Tensor = blocks.maximum(blocks.amax(-1, keepdim=True) / 2)
        return lifted.flatten(-2)

    def alternatives(self, covering: Tensor) -> Iterator[Iterable[Tensor]]:
        top = self.round(covering).unflatten(-1, (-1, PAIRS)).amax(-1).repeat_interleave(PAIRS, -1)
        for binade in (0.5, 1.0, 2.0):
            upper = self.round(binade * top)
            yield upper, upper / 2

    @classmethod
    def problem(cls, fmt: NumberFormat, group_size: int | None) -> str | None:
        return None if group_size == 2 and fmt.is_integer else "shares scales by pairs of integers; use group_size 2"

    def stored_bits(self, scales: int) -> int:
        return scales * 8 // PAIRS + scales


SCALE_TYPES: dict[str, type[ScaleFormat]] = {
    scale_type.name: scale_type for scale_type in (Float, PowerOfTwo, E4M3, E8M0, Microexponent)
}


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
    rceil: the smallest power of two with which nothing saturates. even: floor of amax rounded to the element's
    mantissa bits, so that the block moves up a binade when its maximum would. Where that would be rounded up to 2^128,
    it saturates a binade below. Blocks of zeros get 1, those with infinity or NaN get NaN. float32 → float32, from
    2^-127 to 2^127.
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
