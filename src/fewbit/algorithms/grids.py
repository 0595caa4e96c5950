"""Grids of groups as GPTQ works on them, and which are worth running through a group's columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat, RoundMethod, round_steps_
from fewbit.numerics.scales import GridRule, extremes

RUN = 3  # grids per group that are run through its columns
AFFINE_STEPS = 5  # of a net: shares of either end of an affine range


@dataclass(frozen=True)
class Grid:
    """Grids of groups: a level is what a code stands for, less its zero point; a value is level · scale."""

    scale: Tensor
    """[groups or candidates, rows] float32, holding values that can be stored."""
    low: Tensor | None
    """Level of the smallest code, shaped like `scale`; None for symmetric grids, whose levels are the format's."""
    fmt: NumberFormat
    rounding: RoundMethod

    @classmethod
    def stored(cls, rule: GridRule, scale: Tensor, zero: Tensor | None) -> Grid:
        """Of stored scales [groups, rows] and zero points."""
        low = None if zero is None else rule.fmt.smallest - zero.float()
        return cls(rule.scale.value(scale), low, rule.fmt, rule.rounding)

    def map(self, change: Callable[[Tensor], Tensor]) -> Grid:
        """The same rearrangement of every tensor."""
        return replace(self, scale=change(self.scale), low=None if self.low is None else change(self.low))

    def snap_(self, steps: Tensor, low: Tensor | None) -> Tensor:
        """Values divided by their scale → levels, in place. `low` is that of their groups."""
        if low is None:
            return self.fmt.round_(steps, self.rounding)
        span = self.fmt.largest - self.fmt.smallest
        return torch.clamp(round_steps_(steps, self.rounding), low, low + span, out=steps)


def candidates(w: Tensor, precision: Tensor, rule: GridRule) -> Grid:
    """Grids [candidates, rows] worth running for a group with current weights `w` [g, rows].

    The first is the one that rounding to nearest would take for these weights, an error in column j costing
    `precision` [g] (where no column can make up for another, no grid is better); the others are the best of a net
    cast wide, since compensation inside the group changes which is best. Few scales that are not floats can be stored:
    their net is as fine as the search.
    """
    if rule.scale.type != "float":
        return _most_promising(w, _net(w, rule), precision, RUN)
    scale, zero = rule.find(w.T.contiguous(), precision)
    searched = Grid.stored(rule, scale, zero).map(lambda x: x.unsqueeze(0))
    others = _most_promising(w, _net(w, rule), precision, RUN - 1)
    low = None
    if searched.low is not None and others.low is not None:
        low = torch.cat([searched.low, others.low])
    return replace(searched, scale=torch.cat([searched.scale, others.scale]), low=low)


def _net(w: Tensor, rule: GridRule) -> Grid:
    """Grids [candidates, rows] over all that may be good for a group `w` [g, rows]."""
    low, high = extremes(w, dim=0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if rule.symmetric:
        return Grid(rule.candidates(low, high), None, rule.fmt, rule.rounding)
    span = rule.fmt.largest - rule.fmt.smallest
    shrink = torch.linspace(1.0, rule.fractions[-1], AFFINE_STEPS, device=w.device)
    ends = torch.cartesian_prod(shrink, shrink)  # both ends of the range shrink on their own
    low, high = ends[:, :1] * low, ends[:, 1:] * high
    scale = rule.scale.round((high - low) / span)
    return Grid(scale, (low / scale).round_().clamp_(-span, 0), rule.fmt, rule.rounding)


def _most_promising(w: Tensor, grids: Grid, precision: Tensor, count: int) -> Grid:
    """The `count` grids of each row with the least weighted rounding error, without compensation."""
    errors = torch.empty_like(grids.scale)
    value = torch.empty_like(w)  # [g, rows], small enough for the cache, which is why candidates go one by one
    for number in range(grids.scale.shape[0]):
        one = grids.map(lambda x: x[number])  # noqa: B023
        one.snap_(torch.mul(w, one.scale.reciprocal(), out=value), one.low)
        value.mul_(one.scale).sub_(w).square_()
        torch.mv(value.T, precision, out=errors[number])
    best = errors.topk(min(count, errors.shape[0]), dim=0, largest=False).indices
    return grids.map(lambda x: x.gather(0, best))
