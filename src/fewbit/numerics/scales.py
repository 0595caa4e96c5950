"""How the scale of a group is found. Every rule returns scales as they will be STORED (see scale_format.py).

All rules work on tiles [..., n] (the last axis shares a scale, see grouping.py) and return one scale, and for affine
grids one integer zero point, per tile.

    minmax       the range's ends map to the grid's ends (integers, symmetric: amax / ((2^b − 1) / 2); floats:
                 amax / largest; e8m0: the block exponent by the scale format's mode)
    signed-max   symmetric integers: the element of largest magnitude maps to −2^(b−1), the scale may be negative
    percentile   minmax without the outermost values: those of largest magnitude if symmetric, else half on either side
    search       the least squared error (search.py), each element weighted by `importance`: diag(H) for a weight
    mse          search with all elements weighted alike
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat, RoundMethod
from fewbit.numerics.scale_format import ExponentMode, ScaleFormat
from fewbit.numerics.search import PIECE, search


@dataclass(frozen=True)
class GridRule:
    """Everything that decides the grid of a tensor's groups but the data: fields of QuantizationSpec, mostly."""

    fmt: NumberFormat
    scale: ScaleFormat
    symmetric: bool = True
    rule: str = "search"
    mode: ExponentMode = "even"
    percentile: float = 100.0
    clip_ratio: float = 1.0
    rounding: RoundMethod = "half_even"
    signed: bool = True
    """Scales may be negative, where the scale format has a sign. Engines compute activations' own without."""

    def find(self, tiles: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Stored scale [...] and zero point [...] (None when symmetric) of tiles [..., n] float32. `importance`,
        broadcastable to `tiles`, weighs the squared errors of the rule "search"."""
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
            zero = self.fmt.smallest - low.float() / self.scale.value(scale)
            return scale, self.fmt.encode(zero.nan_to_num_())  # NaN has a NaN scale, which is what shows
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
        """Shares of the covering scale that a search with many candidates tries."""
        return tuple(1.0 - 0.05 * step for step in range(14 if self.fmt.bits == 2 else 10))

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
        sign where that differs, and zero points. They are at `shares` of the range; None: `fractions`, or of a coarse
        scale type all that matter."""
        if shares is None and self.symmetric and self.scale.is_coarse:
            return torch.stack(list(self.storable(low, high, torch.ones_like(low)))), None
        shares = self.fractions if shares is None else shares
        if self.symmetric:
            ends = self.ends(low, high)
            return self.scale.round(torch.stack([share * end for end in ends for share in shares])), None
        stored, zero = self.from_range(*(torch.stack([share * end for share in shares]) for end in (low, high)))
        return self.scale.value(stored), zero

    def storable(self, low: Tensor, high: Tensor, floor: Tensor) -> Iterator[Tensor]:
        """Of a coarse scale type, all symmetric scales worth trying for these ranges: values [...]. Below the share
        `floor` [...] of the range there are only neighbours of the covering scale."""
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
        steps = _snap_(tiles * by.reciprocal(), zero, self.fmt, self.rounding, signed_zero=False)
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
    rounded = fmt.round_(steps, rounding)
    return fmt.encode(rounded) if bool(rounded.isnan().any()) else fmt.codes(rounded)


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
    return _snap_(tiles.float() / by, zero, fmt, rounding).mul_(by)


def _snap_(
    steps: Tensor, zero: Tensor | None, fmt: NumberFormat, rounding: RoundMethod, signed_zero: bool = True
) -> Tensor:
    """Round to a grid with zero points [...], in place: what codes stand for, divided by the scale."""
    if zero is None:
        return fmt.round_(steps, rounding, signed_zero)
    offset = zero.float().unsqueeze(-1)
    return fmt.round_(steps.add_(offset), rounding).sub_(offset)


def extremes(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Least and largest value along an axis. (torch's aminmax takes up to twenty times as long on CPUs.)"""
    return x.amin(dim), x.amax(dim)


def kept_ranks(count: int, percentile: float, symmetric: bool) -> tuple[int, int]:
    """First and last that are kept of `count` sorted values, of magnitudes if symmetric."""
    outside = (100.0 - percentile) / 100.0 * (count - 1)
    return (0, count - 1 - round(outside)) if symmetric else (round(outside / 2), count - 1 - round(outside / 2))


def unless_zero(low: Tensor, high: Tensor, least: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """A range [...], but that of all values where nothing but zeros is left."""
    nothing = (low == 0) & (high == 0)
    return torch.where(nothing, least, low), torch.where(nothing, largest, high)


def percentile_range(tiles: Tensor, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Ends [...] of the range that holds `percentile` percent of the values of tiles [..., n]; of all values where
    that leaves zeros alone; ± a magnitude if symmetric."""
    first, last = kept_ranks(tiles.shape[-1], percentile, symmetric)
    order = (tiles.float().abs() if symmetric else tiles.float()).sort(dim=-1).values
    low, high = unless_zero(order[..., first], order[..., last], order[..., 0], order[..., -1])
    return -high if symmetric else low, high
