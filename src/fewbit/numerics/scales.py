"""How the scale of a group is found. Every rule returns scales as they will be STORED (see scale_format.py).

All rules work on tiles [..., n] (the last axis shares a scale, see grouping.py) and return one scale, and for affine
grids one integer zero point, per tile.

    minmax       the range's ends map to the grid's ends (integers, symmetric: amax / ((2^b − 1) / 2); floats:
                 amax / largest; e8m0: the block exponent by the scale format's mode)
    signed-max   symmetric integers: the element of largest magnitude maps to −2^(b−1), the scale may be negative
    percentile   minmax of the range without its outermost values
    search       the scale with the least squared error (search.py), each element weighted by `importance`: diag(H) for
                 a linear's weight
    mse          search with all elements weighted alike
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat, RoundMethod
from fewbit.numerics.scale_format import ExponentMode, ScaleFormat
from fewbit.numerics.search import PIECE, search

FRACTIONS = tuple(1.0 - 0.05 * step for step in range(10))  # of the covering scale
FRACTIONS_2_BITS = tuple(1.0 - 0.05 * step for step in range(14))


@dataclass(frozen=True)
class GridRule:
    """Everything that decides the grid of a tensor's groups but the data."""

    fmt: NumberFormat
    scale: ScaleFormat
    symmetric: bool = True
    rule: str = "search"
    mode: ExponentMode = "even"
    """How a block's exponent follows from its largest magnitude."""
    percentile: float = 100.0
    """Of the values that the rule "percentile" keeps, in percent."""
    clip_ratio: float = 1.0
    """The range is multiplied by this before its scale is taken."""
    rounding: RoundMethod = "half_even"
    signed: bool = True
    """Scales may be negative, where the scale format has a sign. Engines compute activations' own without."""

    def find(self, tiles: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Stored scale [...] and zero point [...] (None when symmetric) of tiles [..., n] float32.

        `importance`, broadcastable to `tiles`, weighs the squared errors of the rule "search".
        """
        if self.rule in ("search", "mse"):
            return search(self, tiles, None if self.rule == "mse" else importance)
        if self.rule == "percentile":
            low, high = percentile_range(tiles, self.percentile, self.symmetric)
        else:
            low, high = extremes(tiles)
        return self.from_range(low.float(), high.float())

    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scale and zero point that map a range to the grid; for static scales, whose data is gone."""
        low, high = self.clip_ratio * low, self.clip_ratio * high
        if not self.symmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = self.scale.store((high - low) / (self.fmt.largest - self.fmt.smallest))
            return scale, self.zero_point(low, scale)
        if self.rule == "signed-max":
            return self.scale.store(torch.where(high > -low, high, low) / self.fmt.smallest), None
        return self.scale.store(self.covering(torch.maximum(high, -low))), None

    def covering(self, magnitude: Tensor) -> Tensor:
        """The symmetric scale, not yet stored, at which the largest magnitude reaches the end of the grid."""
        if self.fmt.is_cast:
            return torch.ones_like(magnitude)
        return self.scale.covering(magnitude, self.fmt, self.mode)

    @property
    def fractions(self) -> tuple[float, ...]:
        """Shares of the range that a search with many candidates tries."""
        return FRACTIONS_2_BITS if self.fmt.bits == 2 else FRACTIONS

    def zero_point(self, low: Tensor, stored: Tensor) -> Tensor:
        """The code that stands for 0 when `low` maps to the smallest code."""
        zero = self.fmt.smallest - low.float() / self.scale.value(stored)
        return self.fmt.encode(zero.nan_to_num_())  # NaN has a NaN scale, which is what shows

    def ends(self, low: Tensor, high: Tensor) -> list[Tensor]:
        """Symmetric scales, not yet stored, that just cover a range: one of either sign for integers, whose two ends
        differ, if the scale may have one."""
        if not (self.fmt.is_integer and self.signed and self.scale.may_be_negative):
            return [self.covering(torch.maximum(high, -low))]
        smallest, largest = self.fmt.smallest, self.fmt.largest
        return [torch.maximum(high / largest, low / smallest), -torch.maximum(high / -smallest, low / -largest)]

    def candidates(
        self, low: Tensor, high: Tensor, shares: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Grids worth trying for ranges [...] (low ≤ 0 ≤ high): values of stored scales [candidates, ...], of either
        sign where that differs, and zero points.

        They are at `shares` of the range; None is `fractions`, but of a coarse scale type all that matter.
        """
        if shares is None and self.symmetric and self.scale.is_coarse:
            return torch.stack(list(self.storable(low, high, torch.ones_like(low)))), None
        shares = self.fractions if shares is None else shares
        if self.symmetric:
            return self.scale.round(
                torch.stack([share * end for end in self.ends(low, high) for share in shares])
            ), None
        stored, zero = self.from_range(*(torch.stack([share * end for share in shares]) for end in (low, high)))
        return self.scale.value(stored), zero

    def storable(self, low: Tensor, high: Tensor, floor: Tensor) -> Iterator[Tensor]:
        """Of a coarse scale type, all symmetric scales worth trying for groups with these ranges: values [...].

        `floor` [...]: share of the range below which nothing is tried, but for the neighbours of the covering scale.
        """
        for end in self.ends(low, high):
            yield from self.scale.storable(end, -floor.log2())

    def error(self, tiles: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None) -> Tensor:
        """Weighted squared error of each tile when its elements go to its grid: float32 [...]. `scale` is a value."""
        if tiles.shape[-1] > PIECE:  # a long row in parts that fit the cache
            parts = tiles.split(PIECE, -1)
            weights = [None] * len(parts) if importance is None else importance.expand_as(tiles).split(PIECE, -1)
            errors = [self.error(part, scale, zero, weight) for part, weight in zip(parts, weights, strict=True)]
            return torch.stack(errors).sum(0)
        by = scale.unsqueeze(-1)
        steps = tiles * by.reciprocal()
        if zero is None:
            self.fmt.round_(steps, self.rounding, signed_zero=False)
        else:
            offset = zero.float().unsqueeze(-1)
            self.fmt.round_(steps.add_(offset), self.rounding).sub_(offset)
        steps.mul_(by).sub_(tiles)
        if importance is None:
            norm: Tensor = torch.linalg.vector_norm(steps, dim=-1)
            return norm.square_()
        return steps.square_().mul_(importance).sum(-1)


def encode(tiles: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat, rounding: RoundMethod) -> Tensor:
    """Codes of `tiles` [..., n] on the grid of their scale values [...] and zero points [...]."""
    if fmt.is_cast:
        return fmt.encode(tiles)
    steps = tiles.float() / scale.unsqueeze(-1)
    if zero is not None:
        steps += zero.unsqueeze(-1)
    if bool(steps.isnan().any()):
        if fmt.nan_code is None:
            raise ValueError(f"NaN cannot be encoded as {fmt.name}")
        return fmt.encode(fmt.round_(steps, rounding))
    return fmt.codes(fmt.round_(steps, rounding))


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> Tensor:
    """Values (float32) of codes [..., n] with scale values and zero points [...]."""
    steps = fmt.decode(codes)
    if zero is not None:
        steps -= zero.unsqueeze(-1)
    return steps.mul_(scale.unsqueeze(-1))


def fake_quantize(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat, rounding: RoundMethod
) -> Tensor:
    """decode(encode(tiles)) without the codes: float32 [..., n]."""
    by = scale.unsqueeze(-1)
    steps = tiles.float() / by
    if zero is None:
        return fmt.round_(steps, rounding).mul_(by)
    offset = zero.float().unsqueeze(-1)
    return fmt.round_(steps.add_(offset), rounding).sub_(offset).mul_(by)


def extremes(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Least and largest value along an axis. (torch's aminmax takes up to twenty times as long on CPUs.)"""
    return x.amin(dim), x.amax(dim)


def percentile_range(tiles: Tensor, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ends [...] of the range that holds `percentile` percent of the values of tiles [..., n].

    Symmetric: ± the magnitude that so many stay below. Otherwise the rest is left out half on either side. Where that
    leaves zeros alone, the range is that of all values.
    """
    last = tiles.shape[-1] - 1
    outside = (100.0 - percentile) / 100.0 * last
    if symmetric:
        order = tiles.float().abs().sort(dim=-1).values
        high = order[..., last - round(outside)]
        high = torch.where(high == 0, order[..., last], high)
        return -high, high
    order = tiles.float().sort(dim=-1).values
    low, high = order[..., round(outside / 2)], order[..., last - round(outside / 2)]
    nothing = (low == 0) & (high == 0)
    return torch.where(nothing, order[..., 0], low), torch.where(nothing, order[..., last], high)
