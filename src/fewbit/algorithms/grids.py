"""Grids of groups as GPTQ works on them, and which are worth running through a group's columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat, RoundMethod, round_steps_
from fewbit.numerics.scales import GridRule, extremes

RUN = 3  # grids per group that are run through its columns
AFFINE_STEPS = 5  # of a net: shares of either end of an affine range
REFINE, REFINE_AFFINE = (0.025, 0.0125), (0.06, 0.03, 0.015)  # half the net's step and so on


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
    def joined(cls, grids: Sequence[Grid]) -> Grid:
        """Several, one after another along the first axis."""
        lows = [grid.low for grid in grids if grid.low is not None]
        scale = torch.cat([grid.scale for grid in grids])
        return replace(grids[0], scale=scale, low=torch.cat(lows) if lows else None)

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
    """Grids [candidates, rows] worth running for a group with current weights `w` [g, rows]: the best of a net cast
    wide, an error in column j costing `precision` [g], and the best one refined. (Where no column can make up for
    another, that is what counts; with compensation another may be better.) The net of a coarse scale type is as fine
    as it can be."""
    net = _net(w, rule)
    errors = torch.empty_like(net.scale)
    value = torch.empty_like(w)  # [g, rows], small enough for the cache, which is why candidates go one by one
    for number in range(net.scale.shape[0]):
        _score(w, net.map(lambda x: x[number]), precision, value, errors[number])  # noqa: B023
    count = min(RUN, net.scale.shape[0])
    least, best = errors.topk(count, dim=0, largest=False)
    found = net.map(lambda x: x.gather(0, best))
    if rule.scale.is_coarse:
        return found
    refined = _refined(w, found.map(lambda x: x[0]), least[0], precision, rule)
    return Grid.joined([found.map(lambda x: x[:-1]), refined.map(lambda x: x.unsqueeze(0))])  # in place of the last


def _net(w: Tensor, rule: GridRule) -> Grid:
    """Grids [candidates, rows] over all that may be good for a group `w` [g, rows]."""
    low, high = extremes(w, dim=0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if rule.symmetric:
        return Grid(rule.candidates(low, high)[0], None, rule.fmt, rule.rounding)
    span = rule.fmt.largest - rule.fmt.smallest
    shrink = torch.linspace(1.0, rule.fractions[-1], AFFINE_STEPS, device=w.device)
    ends = torch.cartesian_prod(shrink, shrink)  # both ends of the range shrink on their own
    low, high = ends[:, :1] * low, ends[:, 1:] * high
    scale = rule.scale.round((high - low) / span)
    return Grid(scale, (low / scale).round_().clamp_(-span, 0), rule.fmt, rule.rounding)


def _refined(w: Tensor, best: Grid, least: Tensor, precision: Tensor, rule: GridRule) -> Grid:
    """The best grids found [rows], each moved in smaller and smaller steps as long as its error, `least`, falls."""
    value, error = torch.empty_like(w), torch.empty_like(least)
    span = rule.fmt.largest - rule.fmt.smallest
    for step in REFINE if best.low is None else REFINE_AFFINE:
        around = best
        for factor in (1 - step, 1 + step):
            scale = rule.scale.round(factor * around.scale)
            centre = None if around.low is None else (around.low / factor).round_()
            for beside in (None,) if centre is None else (0, -1, 1):
                low = None if centre is None or beside is None else (centre + beside).clamp_(-span, 0)
                trial = replace(best, scale=scale, low=low)
                _score(w, trial, precision, value, error)
                better = error < least
                least = torch.where(better, error, least)
                kept = None if low is None or best.low is None else torch.where(better, low, best.low)
                best = replace(best, scale=torch.where(better, scale, best.scale), low=kept)
    return best


def _score(w: Tensor, grid: Grid, precision: Tensor, value: Tensor, error: Tensor) -> None:
    """Weighted rounding error of each row on a grid [rows], without compensation, into `error`; `value` is scratch."""
    grid.snap_(torch.mul(w, grid.scale.reciprocal(), out=value), grid.low)
    value.mul_(grid.scale).sub_(w).square_()
    torch.mv(value.T, precision, out=error)
