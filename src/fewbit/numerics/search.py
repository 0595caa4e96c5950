"""The scale with the least squared error: coarse to fine over shares of the range, each scored as it would be stored.

How far down does a search have to look? With r the end of the grid, s = r / L its step (L: half the number of steps)
and w the elements' weights, rounding costs about Σw · s² / 12 and cutting off Σ w (|x| − r)₊². Where the sum is least,

    Σ w (|x| − r)₊ ≤ r · Σw / (12 L²)

From one element of the left side alone follows r ≥ |x| / (1 + Σw / (12 L² w)), and from
Σ w (|x| − r)₊ ≥ Σ w |x| − r Σw that r is hardly below the mean of |x|. So 64 elements at 4 bits end near 0.9 of their
range, a long row with an outlier of 20 σ at a tenth. The error of few elements is jagged, so the bound has a margin.

A tile's result depends on the tile alone, so it does not matter which tiles are searched together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat
from fewbit.numerics.scale_format import ScaleFormat

PIECE = 2**17  # elements scored at a time: few enough for the cache, whatever the number of candidates
FEW = 256  # elements, up to which the error is jagged
# Share of the range to the next, and then the steps around the best
COARSE = (0.9, (0.05, 0.025, 0.0125, 0.006, 0.003))
COARSE_OF_FEW = (0.9, (0.05, 0.025, 0.0125, 0.00625))
FINE = (0.93, (0.046, 0.023, 0.0115))
LEAST_MARGIN = 0.4
# Floats are as precise an octave up, where they have the exponents; which of its scales suits the largest elements
# best is tried. A finer grid helps only elements that are hardly normal.
OCTAVE, WIDE = 2.0, 4  # bits of exponent
MANTISSAS_ROOM = 4.0


class Best:
    """Of candidates, each a value [...] (a scale, as a rule) and perhaps a zero point, for each group the one with the
    least error; the first of equals."""

    error: Tensor
    value: Tensor
    zero: Tensor | None
    _begun = False

    def consider(self, error: Tensor, value: Tensor, zero: Tensor | None = None) -> Tensor:
        """Returns where the candidate is better: bool, shaped like `error`."""
        if not self._begun:
            self.error, self.value, self.zero, self._begun = error, value, zero, True
            return torch.zeros_like(error, dtype=torch.bool)
        better = error < self.error
        self.error, self.value = torch.where(better, error, self.error), torch.where(better, value, self.value)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)
        return better


class Rule(Protocol):
    """What a search has to know of the grid: scales.py."""

    @property
    def fmt(self) -> NumberFormat: ...
    @property
    def scale(self) -> ScaleFormat: ...
    @property
    def symmetric(self) -> bool: ...
    def covering(self, magnitude: Tensor) -> Tensor: ...
    def ends(self, low: Tensor, high: Tensor) -> list[Tensor]: ...
    def storable(self, low: Tensor, high: Tensor, floor: Tensor) -> Iterator[Tensor]: ...
    def from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def error(self, tiles: Tensor, scale: Tensor, zero: Tensor | None, importance: Tensor | None) -> Tensor: ...


def search(rule: Rule, tiles: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Stored scale [...] and zero point [...] (None when symmetric) of tiles [..., n] with the least squared error,
    each element weighted by `importance` (broadcastable to `tiles`)."""
    weights = None if importance is None else importance.expand_as(tiles)
    at_once = max(1, PIECE * tiles.shape[0] // max(1, tiles.numel()))
    find = _search_affine if not rule.symmetric else _search_jointly if rule.scale.block > 1 else _search_symmetric
    found = []
    for start in range(0, tiles.shape[0], at_once):
        weight = None if weights is None else weights[start : start + at_once]
        best = find(rule, tiles[start : start + at_once].float(), weight)
        zero = None if best.zero is None else rule.fmt.encode(best.zero)
        found.append((rule.scale.store(best.value), zero))
    return joined(found)


def joined(found: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Stored scales and zero points that were found piece by piece."""
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _search_symmetric(rule: Rule, tiles: Tensor, importance: Tensor | None) -> Best:
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    reach = torch.maximum(high, -low)
    best = Best()

    def consider(scale: Tensor) -> None:
        best.consider(rule.error(tiles, scale, None, importance), scale)

    consider(rule.scale.round(rule.covering(reach)))
    floor = least_share(rule, tiles, reach, importance)
    if rule.scale.is_coarse:
        for scale in rule.storable(low, high, floor):
            consider(scale)
        return best
    coarse, steps = _steps(rule, tiles, importance)
    start = OCTAVE if rule.fmt.exponent_bits >= WIDE else 1.0
    for end in rule.ends(low, high):
        for share in shares(coarse, floor, start):
            consider(rule.scale.round(share * end))
    for step in steps:
        around = best.value
        for factor in (1 - step, 1 + step):
            consider(rule.scale.round(factor * around))
    return best


def _search_affine(rule: Rule, tiles: Tensor, importance: Tensor | None) -> Best:
    """The grid's points are multiples of the scale; the zero point says which ones, so for a given scale the error is
    convex in it. The scale is swept from the whole range down, and the zero point follows in single steps."""
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    floor = least_share(rule, tiles, torch.maximum(high, -low), importance)
    coarse, steps = _steps(rule, tiles, importance)
    smallest, largest = rule.fmt.smallest, rule.fmt.largest
    stored, zero_point = rule.from_range(low, high)
    assert zero_point is not None
    whole, zero, best = rule.scale.value(stored), zero_point.float(), Best()
    best.consider(rule.error(tiles, whole, zero, importance), whole, zero)

    def follow(scale: Tensor, zero: Tensor) -> Tensor:
        """Try a scale with a zero point and its neighbours, as far as the grid may have moved; returns the best."""
        here = Best()
        here.consider(rule.error(tiles, scale, zero, importance), zero)
        stride = 2 ** min(4, max(0, rule.fmt.bits - 4))
        while stride:
            for sign in (-stride, stride):
                beside = (here.value + sign).clamp_(smallest, largest)
                here.consider(rule.error(tiles, scale, beside, importance), beside)
            stride //= 4
        best.consider(here.error, scale, here.value)
        return here.value

    for share in shares(coarse, floor):
        zero = follow(rule.scale.round(share * whole), zero)
    for step in steps:
        around, of_best = best.value, best.zero
        assert of_best is not None
        for factor in (1 - step, 1 + step):
            follow(rule.scale.round(factor * around), of_best)
    return best


def _search_jointly(rule: Rule, tiles: Tensor, importance: Tensor | None) -> Best:
    """Scales that are stored jointly [..., tiles], tried block by block: for each state of what a block shares, every
    tile takes what suits it best."""
    covering = rule.covering(tiles.abs().amax(-1))
    best = Best()
    for values in ((rule.scale.round(covering),), *rule.scale.alternatives(covering)):
        of_state = Best()
        for value in values:
            of_state.consider(rule.error(tiles, value, None, importance), value)
        best.consider(rule.scale.pooled(of_state.error), of_state.value)
    return best


def _steps(rule: Rule, tiles: Tensor, importance: Tensor | None) -> tuple[float, tuple[float, ...]]:
    """How coarse a search begins, and how it is refined. The error is jagged where few elements decide it."""
    if rule.fmt.is_integer and importance is None and tiles.shape[-1] > FEW:
        return COARSE
    return COARSE_OF_FEW if rule.fmt.is_integer or importance is None else FINE


def shares(ratio: float, floor: Tensor, start: float = 1.0) -> Iterator[Tensor]:
    """Shares of the range [...] from `start` down, by `ratio`; no tile's goes below its `floor` [...]."""
    lowest = float(floor.min()) if floor.numel() else 1.0
    for step in range(1 + math.ceil(math.log(lowest / start) / math.log(ratio))):
        yield floor.clamp(min=start * ratio**step)


def least_share(rule: Rule, tiles: Tensor, reach: Tensor, importance: Tensor | None) -> Tensor:
    """Share [...] of the largest magnitude `reach` [...] of tiles [..., n] below which no least error is to be
    expected (see the head of this file)."""
    fmt = rule.fmt  # steps of the grid from 0 to its end; of floats, those of the coarsest binade
    half = (2**fmt.bits - 1) / 2 if fmt.is_integer else fmt.largest / 2.0 ** (fmt.emax - fmt.mantissa_bits)
    noise = 12 * half**2
    count = tiles.shape[-1]
    if importance is None:
        mean = sum(part.abs().sum(-1) for part in tiles.split(PIECE, -1)) / count
        alone = reach / (1 + count / noise)
    else:
        total = importance.sum(-1, keepdim=True)
        weighted = tiles.abs()
        mean = (weighted * importance).sum(-1) / total.squeeze(-1)
        alone = weighted.mul_(importance / (importance + total / noise)).amax(-1)
    bound = torch.maximum(alone, mean / (1 + 1 / noise)) / reach
    margin = max(LEAST_MARGIN, 1 - 3 / math.sqrt(max(count, 1)))
    least: Tensor = bound.mul_(margin).nan_to_num_(nan=1.0).clamp_(2.0**-20, 1.0)
    if fmt.is_integer:
        return least
    lowest_normal = 2.0 ** (1 - fmt.bias) / fmt.largest * reach  # of the grid that covers the range
    return torch.maximum(least, (mean / (MANTISSAS_ROOM * lowest_normal)).nan_to_num_(nan=1.0).clamp_(max=1.0))


class RangeSearch(Best):
    """Tries ranges for groups of values, the whole one [low, high] [..., groups along a row] first, and keeps for each
    group the one whose grid costs least. `cost` [...] is a function of (scale value [...], zero point [...] or None).
    """

    def __init__(self, rule: Rule, low: Tensor, high: Tensor, cost: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self._rule, self._cost = rule, cost
        self.low, self.high = low, high
        self.share_low, self.share_high = torch.ones_like(low), torch.ones_like(high)  # of the ends, in the best range
        self.shrink(1.0, 1.0)

    def shrink(self, share_low: Tensor | float, share_high: Tensor | float) -> None:
        """Try shares of both ends, the same for all groups or one for each [...]."""
        stored, zero = self._rule.from_range(share_low * self.low, share_high * self.high)
        scale = self._rule.scale.value(stored)
        better = self.consider(self._rule.scale.pooled(self._cost(scale, zero)), scale, zero)
        self.share_low = torch.where(better, share_low, self.share_low)
        self.share_high = torch.where(better, share_high, self.share_high)

    def sweep(self, shares: Sequence[float]) -> None:
        """Try shares of the whole range; for affine grids then of each end alone."""
        for share in shares:
            self.shrink(share, share)
        for share in () if self._rule.symmetric else shares:
            self.shrink(share, self.share_high)
        for share in () if self._rule.symmetric else shares:
            self.shrink(self.share_low, share)
