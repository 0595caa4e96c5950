"""How the scale of a group is found. Every rule returns scales as they will be STORED (see scale_format.py).

All rules work on tiles [..., n] (the last axis shares a scale, see grouping.py) and return one scale, and for affine
grids one integer zero point, per tile.

    minmax       the range's ends map to the grid's ends (integers, symmetric: amax / ((2^b − 1) / 2); floats:
                 amax / largest; e8m0: the block exponent by the scale format's mode)
    signed-max   symmetric integers: the element of largest magnitude maps to −2^(b−1), the scale may be negative
    percentile   minmax of the range without its outermost values
    search       the candidate (both signs, several ranges, neighbouring exponents …) with the least squared error,
                 each element weighted by `importance`: diag(H) for a linear's weight
    mse          search with all elements weighted alike
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat, RoundMethod
from fewbit.numerics.scale_format import PAIRS, ExponentMode, ScaleFormat, block_exponent_scale

PIECE = 2**17  # elements scored at a time, so that dozens of candidates are scored in the cache
COARSE = (1.0, 0.9, 0.8, 0.7, 0.6)  # share of the range that just covers the group; the search refines the best one
COARSE_2_BITS = (*COARSE, 0.5, 0.4, 0.3)  # with four codes, most of a group is best cut off
REFINE = (0.05, 0.025)
# e4m3 codes around that of the covering scale, 1.75× and back: 4 instead of 6 for the largest element, too
E4M3_STEPS = range(-6, 7)
BINADES = (-1, 0, 1)
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
            return self._search_in_pieces(tiles, None if self.rule == "mse" else importance)
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
        if self.scale.type in ("e8m0", "microexponent"):
            return block_exponent_scale(magnitude, self.fmt, self.mode).masked_fill(magnitude == 0, 0.0)
        reach: float = (2**self.fmt.bits - 1) / 2 if self.fmt.is_integer else self.fmt.largest
        return magnitude / reach

    @property
    def coarse(self) -> tuple[float, ...]:
        """Shares of the range that the search starts with."""
        return COARSE_2_BITS if self.fmt.bits == 2 else COARSE

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

    def candidates(self, low: Tensor, high: Tensor) -> Tensor:
        """Symmetric scales worth trying for groups with these ranges (low ≤ 0 ≤ high): values [candidates, ...]."""
        if self.scale.type == "e4m3":
            code = self.scale.store(self.covering(torch.maximum(high, -low))).view(torch.uint8).int()
            steps = torch.tensor(E4M3_STEPS, device=low.device).view(-1, *[1] * low.ndim)
            codes = (code + steps).clamp_(1, 126).to(torch.uint8)
            return self.scale.value(codes.view(torch.float8_e4m3fn))
        factors = [2.0**step for step in BINADES] if self.scale.is_power_of_two else self.fractions
        return self.scale.round(torch.stack([factor * end for end in self.ends(low, high) for factor in factors]))

    def error(self, tiles: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None) -> Tensor:
        """Weighted squared error of each tile when its elements go to its grid: float32 [...]. `scale` is a value."""
        by = scale.unsqueeze(-1)
        steps = tiles * by.reciprocal()
        if zero is None:
            self.fmt.round_(steps, self.rounding)
        else:
            offset = zero.float().unsqueeze(-1)
            self.fmt.round_(steps.add_(offset), self.rounding).sub_(offset)
        error = steps.mul_(by).sub_(tiles).square_()
        return (error if importance is None else error.mul_(importance)).sum(-1)

    def _search_in_pieces(self, tiles: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weights = None if importance is None else importance.expand_as(tiles)
        at_once = max(1, PIECE * tiles.shape[0] // max(1, tiles.numel()))
        scales, zeros = [], []
        for start in range(0, tiles.shape[0], at_once):
            piece = tiles[start : start + at_once].float()
            weight = None if weights is None else weights[start : start + at_once]
            if self.scale.type == "microexponent":
                scales.append(self._search_microexponents(piece, weight))
            elif self.symmetric:
                scales.append(self._search_symmetric(piece, weight))
            else:
                scale, zero = self._search_affine(piece, weight)
                scales.append(scale)
                zeros.append(zero)
        return torch.cat(scales), torch.cat(zeros) if zeros else None

    def _search_symmetric(self, tiles: Tensor, importance: Tensor | None) -> Tensor:
        low, high = extremes(tiles)
        low, high = low.clamp(max=0), high.clamp(min=0)
        best = self.scale.round(self.covering(torch.maximum(high, -low)))
        best_error = self.error(tiles, best, None, importance)

        def consider(scale: Tensor) -> None:
            nonlocal best, best_error
            error = self.error(tiles, scale, None, importance)
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)

        if self.scale.type != "float":  # few scales can be stored, so all that matter are tried
            for scale in self.candidates(low, high):
                consider(scale)
            return self.scale.store(best)
        for end in self.ends(low, high):
            for factor in self.coarse:
                consider(self.scale.round(factor * end))
        for step in REFINE:
            around = best
            for factor in (1 - step, 1 + step):
                consider(self.scale.round(factor * around))
        return self.scale.store(best)

    def _search_microexponents(self, tiles: Tensor, importance: Tensor | None) -> Tensor:
        """Scales of pairs [..., pairs, 2], tried block by block: its byte and, for each pair, its bit."""
        magnitude = tiles.abs().amax(-1)
        stored = self.scale.store(self.covering(magnitude))
        best = self.scale.value(stored)
        best_error = self.error(tiles, best, None, importance).unflatten(-1, (-1, PAIRS)).sum(-1, keepdim=True)
        top = best.unflatten(-1, (-1, PAIRS)).amax(-1, keepdim=True)
        for step in BINADES:
            upper = self.scale.round((2.0**step * top).expand(*top.shape[:-1], PAIRS).flatten(-2))
            whole = self.error(tiles, upper, None, importance)
            half = self.error(tiles, upper / 2, None, importance)
            error = torch.minimum(whole, half).unflatten(-1, (-1, PAIRS)).sum(-1, keepdim=True)
            better = (error < best_error).expand(*error.shape[:-1], PAIRS).flatten(-2)
            best = torch.where(better, torch.where(half < whole, upper / 2, upper), best)
            best_error = torch.minimum(error, best_error)
        return self.scale.store(best)

    def _search_affine(self, tiles: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = extremes(tiles)
        low, high = low.clamp(max=0), high.clamp(min=0)
        best = RangeSearch(self, low, high, lambda scale, zero: self.error(tiles, scale, zero, importance))
        for share in self.coarse:
            best.consider(share, share)
        for step in REFINE:  # then each end on its own
            around_low, around_high = best.share_low, best.share_high
            for sign in (-step, step):
                best.consider(around_low + sign, around_high)
                best.consider(around_low, around_high + sign)
        assert best.zero is not None
        return self.scale.store(best.scale), best.zero


class RangeSearch:
    """Tries ranges for groups of values and keeps, for each group, the one whose grid costs least so far.

    Args:
        rule: turns ranges into grids.
        low, high: the whole range of each group [...], which is tried first.
        cost: of (scale value [...], zero point [...] or None): [...].
    """

    def __init__(
        self, rule: GridRule, low: Tensor, high: Tensor, cost: Callable[[Tensor, Tensor | None], Tensor]
    ) -> None:
        self._rule = rule
        self._cost = cost
        self.low, self.high = low, high
        self.share_low, self.share_high = torch.ones_like(low), torch.ones_like(high)
        """Of each end, in the best range."""
        stored, self.zero = rule.from_range(low, high)
        self.scale = rule.scale.value(stored)
        """As it is stored, in float32."""
        self.error = cost(self.scale, self.zero)

    def consider(self, share_low: Tensor | float, share_high: Tensor | float) -> None:
        """Try shares of both ends, the same for all groups or one for each [...]."""
        stored, zero = self._rule.from_range(share_low * self.low, share_high * self.high)
        scale = self._rule.scale.value(stored)
        error = self._cost(scale, zero)
        better = error < self.error
        self.scale, self.error = torch.where(better, scale, self.scale), torch.where(better, error, self.error)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)
        self.share_low = torch.where(better, share_low, self.share_low)
        self.share_high = torch.where(better, share_high, self.share_high)


def encode(tiles: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat, rounding: RoundMethod) -> Tensor:
    """Codes of `tiles` [..., n] on the grid of their scale values [...] and zero points [...]."""
    if fmt.is_cast:
        return fmt.encode(tiles)
    steps = tiles.float() / scale.unsqueeze(-1)
    if zero is not None:
        steps += zero.unsqueeze(-1)
    if bool(steps.isnan().any()) and fmt.nan_code is None:
        raise ValueError(f"NaN cannot be encoded as {fmt.name}")
    return fmt.encode(fmt.round_(steps, rounding))


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
