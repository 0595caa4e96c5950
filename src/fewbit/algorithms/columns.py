"""GPTQ's loop: columns get their codes one after another, and the error of each is moved into those still to come.
Then scales are fitted to the codes, and codes found again. All of it needs the damped inverse of H.

It works on columns as rows (Wᵀ, contiguous) and on many output channels at once.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from fewbit.algorithms.grids import Grid, candidates
from fewbit.config.algorithms import GPTQConfig
from fewbit.numerics import matmul
from fewbit.numerics.cholesky import inverse_cholesky
from fewbit.numerics.scales import GridRule

DAMPING_STEPS = (1.0, 10.0, 100.0)
FIT_ELEMENTS = 2**24  # rows · groups² in one solve for the scales
LEAF = 8  # columns that are updated one by one; beyond them matrix products are faster


@dataclass(frozen=True)
class Factor:
    """The damped inverse of H for columns in some order: column k of the loop is column order[k] of the weight."""

    order: Tensor
    update: Tensor
    """Rows of U divided by their diagonal: what the error of a column does to later ones."""
    precision: Tensor
    """1/U_jj²: what a squared error of column j costs once later columns have made up for it."""
    damping: float

    @property
    def cost(self) -> Tensor:
        """`precision` in the order of the weight's columns."""
        return self.precision[self.order.argsort()]


@dataclass(frozen=True)
class Solution:
    """Levels [rows, in], their grids [groups, rows], and the loss of each row [rows] under the damped H."""

    levels: Tensor
    grid: Grid
    loss: Tensor


@dataclass(frozen=True)
class Problem:
    """Some rows of a weight [rows, in], H [in, in], and the grid's constants."""

    weight: Tensor
    moment: Tensor
    ridge: float
    """What damping adds to H's diagonal. Scales are fitted under the damped H, too: with fewer tokens than groups, H
    alone says nothing of most scales."""
    group: int
    """Columns per scale."""
    rule: GridRule


def column_order(diagonal: Tensor, group: int, order: str) -> Tensor:
    """Order in which columns are quantized [in], given diag(H): the costliest to get wrong first."""
    if order == "activation":
        return diagonal.argsort(descending=True, stable=True)
    if order == "none" or diagonal.numel() % group:  # blocks may be cut at the edge: no order of whole groups exists
        return torch.arange(diagonal.numel(), device=diagonal.device)
    by_group = diagonal.view(-1, group)
    groups = by_group.mean(1).argsort(descending=True, stable=True)
    inside = by_group[groups].argsort(dim=1, descending=True, stable=True)
    return (groups.unsqueeze(1) * group + inside).flatten()


def factored(moment: Tensor, group: int, order_name: str, damping: float) -> Factor | None:
    """H [in, in], damped and inverted for columns in the named order; None if it cannot be factored at all."""
    order = column_order(moment.diagonal(), group, order_name)
    if (found := inverse_factor(moment, order, damping)) is None:
        return None
    upper, used = found
    diagonal = upper.diagonal().clone()
    return Factor(order, upper.div_(diagonal.unsqueeze(1)), diagonal.square_().reciprocal_(), used)


def inverse_factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Upper triangular U with (H + damping · mean(diag H) · I)⁻¹ = UᵀU for H in `order`, and the damping it took.

    With J the reversal of rows and columns, J H J = L Lᵀ gives H⁻¹ = (J L⁻¹ J)ᵀ (J L⁻¹ J): one Cholesky factor and one
    triangular inverse. Damping grows tenfold while that fails; then float64 is tried; then None is returned.
    """
    mean, reverse = float(moment.diagonal().mean(dtype=torch.float64)), order.flip(0)
    for dtype, step in product((torch.float32, torch.float64), DAMPING_STEPS if mean > 0 else ()):
        reversed_moment = moment[reverse][:, reverse].to(dtype)
        reversed_moment.diagonal().add_(damping * step * mean)
        inverse = inverse_cholesky(reversed_moment)
        if inverse is not None:
            return inverse.flip(0, 1).float(), damping * step
    return None


def solve(problem: Problem, factor: Factor, grid: Grid, block_size: int) -> Solution:
    """Codes on given grids [groups, rows], columns in any order."""
    w = problem.weight.T[factor.order].contiguous()  # [in, rows]
    levels = torch.empty_like(w)
    groups = factor.order // problem.group
    for start in range(0, w.shape[0], block_size):
        block = slice(start, start + block_size)
        here = grid.map(lambda x: x[groups[block]])  # noqa: B023
        _run_columns(w[block], levels[block], factor.update[block, block], here)
        w[block.stop :].addmm_(factor.update[block, block.stop :].T, w[block], alpha=-1)
    loss = torch.mv(w.square_().T, factor.precision)
    return Solution(levels[factor.order.argsort()].T.contiguous(), grid, loss)


def solve_greedily(problem: Problem, factor: Factor) -> Solution:
    """Codes and grids, each group's scale chosen by the loss when the loop reaches it. Groups are contiguous."""
    w = problem.weight.T[factor.order].contiguous()  # [in, rows]
    levels = torch.empty_like(w)
    size, (columns, rows) = problem.group, w.shape
    total = torch.zeros(rows, device=w.device)
    chosen: dict[int, Grid] = {}
    for start in range(0, columns, size):
        block = slice(start, start + size)
        precision = factor.precision[block]
        grids = candidates(w[block], precision, problem.rule)
        count = grids.scale.shape[0]
        # all candidates side by side: [g, candidates · rows]
        work = w[block].repeat(1, count)  # always a copy: it is worked on in place
        trial = torch.empty_like(work)
        _run_columns(work, trial, factor.update[block, block], grids.map(lambda x: x.reshape(1, -1).expand(size, -1)))
        loss, best = torch.mv(work.square().T, precision).view(count, rows).min(0, keepdim=True)  # [1, rows]
        total += loss[0]
        index = best.expand(size, 1, rows)
        levels[block] = trial.view(size, count, rows).gather(1, index)[:, 0]
        error = work.view(size, count, rows).gather(1, index)[:, 0]
        chosen[int(factor.order[start]) // size] = grids.map(lambda x: x.gather(0, best))  # noqa: B023
        w[block.stop :].addmm_(factor.update[block, block.stop :].T, error, alpha=-1)
    grid = Grid.joined([chosen[number] for number in range(columns // size)])
    return Solution(levels[factor.order.argsort()].T.contiguous(), grid, total)


def refit(problem: Problem, factor: Factor, solution: Solution, config: GPTQConfig) -> Solution:
    """Fit the scales to the codes and find the codes again, `config.refits` times; each row keeps what is better. In
    the end the scales are fitted to the codes that were kept."""
    projected = matmul.linear(problem.weight, problem.moment)
    projected.add_(problem.weight, alpha=problem.ridge)  # W·H, damped, needed by every fit
    for _ in range(config.refits):
        grid = replace(solution.grid, scale=fitted_scale(problem, projected, solution))
        found = solve(problem, factor, grid, config.block_size)
        better = found.loss < solution.loss
        solution = Solution(
            torch.where(better.unsqueeze(1), found.levels, solution.levels),
            replace(grid, scale=torch.where(better, grid.scale, solution.grid.scale)),
            torch.where(better, found.loss, solution.loss),
        )
    return replace(solution, grid=replace(solution.grid, scale=fitted_scale(problem, projected, solution)))


def fitted_scale(problem: Problem, projected: Tensor, solution: Solution) -> Tensor:
    """Scales [groups, rows] with the least loss for fixed levels t, as they are stored.

    The loss of a row is sᵀAs − 2bᵀs + const with A_gh = t_g H_gh t_h and b_g = (W·H)_g · t_g (`projected` is W·H
    [rows, in], H damped). Rows whose loss does not fall, once rounded, keep their scales; so do groups of zero levels.
    """
    if problem.rule.scale.is_power_of_two:  # too coarse to be fitted: the search has chosen the binade
        return solution.grid.scale
    groups = solution.levels.shape[1] // problem.group
    at_once = max(1, FIT_ELEMENTS // groups**2)
    rows = projected.split(at_once), solution.levels.split(at_once), solution.grid.scale.split(at_once, dim=1)
    return torch.cat([_fitted_scale(problem, *piece) for piece in zip(*rows, strict=True)], dim=1)


def _fitted_scale(problem: Problem, projected: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """`fitted_scale` of some rows: projected and levels [rows, in], scale [groups, rows]."""
    rows, columns = levels.shape
    size, groups = problem.group, columns // problem.group
    quadratic = torch.zeros(groups, groups, rows, device=levels.device)
    for number in range(groups):
        start = number * size
        image = matmul.linear(levels[:, start : start + size], problem.moment[start:, start : start + size])
        row = image.mul_(levels[:, start:]).view(rows, groups - number, size).sum(-1).T
        quadratic[number, number:] = row
        quadratic[number + 1 :, number] = row[1:]
    quadratic = quadratic.permute(2, 0, 1)  # [rows, groups, groups]
    size_of_levels = levels.view(rows, groups, size).square().sum(-1)
    quadratic.diagonal(dim1=1, dim2=2).add_(size_of_levels, alpha=problem.ridge)
    linear = (projected * levels).view(rows, groups, size).sum(-1)  # [rows, groups]
    diagonal = quadratic.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0
    tiny = 1e-6 * diagonal + empty + torch.finfo(torch.float32).tiny  # each group's own: one may be huge
    lower, info = torch.linalg.cholesky_ex(quadratic + torch.diag_embed(tiny))
    image = (quadratic @ scale.T.unsqueeze(-1)).squeeze(-1)
    fitted = scale.T + torch.cholesky_solve((linear - image).unsqueeze(-1), lower).squeeze(-1)
    fitted = problem.rule.scale.round(torch.where(empty | ~torch.isfinite(fitted), scale.T, fitted))

    def loss(s: Tensor, image: Tensor) -> Tensor:
        return (image - 2 * linear).mul_(s).sum(-1)

    lower_loss = loss(fitted, (quadratic @ fitted.unsqueeze(-1)).squeeze(-1)) < loss(scale.T, image)
    return torch.where(lower_loss & (info == 0), fitted.T, scale)


def _run_columns(w: Tensor, levels: Tensor, update: Tensor, grid: Grid) -> None:
    """The recursion inside a block of columns. `w` [g, rows] becomes the errors w_j − v_j; `levels` is filled.
    `update` is [g, g], `grid` has one entry per column [g, rows]."""
    columns = w.shape[0]
    inverse = grid.scale.reciprocal()
    for leaf in range(0, columns, LEAF):
        stop = min(leaf + LEAF, columns)
        for j in range(leaf, stop):
            level = torch.mul(w[j], inverse[j], out=levels[j])
            grid.snap_(level, None if grid.low is None else grid.low[j])
            w[j].addcmul_(level, grid.scale[j], value=-1)
            if j + 1 < stop:
                w[j + 1 : stop].addr_(update[j, j + 1 : stop], w[j], alpha=-1)
        if stop < columns:
            w[stop:].addmm_(update[leaf:stop, stop:].T, w[leaf:stop], alpha=-1)
