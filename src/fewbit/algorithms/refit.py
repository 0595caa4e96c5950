"""Scales fitted to GPTQ's codes, and codes found again on the fitted grid."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbit.algorithms.columns import Problem, Solution, solve
from fewbit.algorithms.factor import Factor
from fewbit.config.algorithms import GPTQConfig
from fewbit.numerics import matmul

FIT_ELEMENTS = 2**24  # rows · groups² in one solve for the scales


def refit(problem: Problem, factor: Factor, solution: Solution, config: GPTQConfig) -> Solution:
    """Fit the scales to the codes and find the codes again, `config.refits` times; each row keeps what is better.

    In the end the scales are fitted to the codes that were kept.
    """
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
    grid = replace(solution.grid, scale=fitted_scale(problem, projected, solution))
    return replace(solution, grid=grid)


def fitted_scale(problem: Problem, projected: Tensor, solution: Solution) -> Tensor:
    """Scales [groups, rows] with the least loss for fixed levels t, as they are stored.

    The loss of a row is sᵀAs − 2bᵀs + const with A_gh = t_g H_gh t_h and b_g = (W·H)_g · t_g (`projected` is W·H
    [rows, in], H damped). Rows whose loss does not fall, once rounded, keep their scales; so do groups of zero levels.
    """
    if problem.rule.scale.is_power_of_two:  # too coarse to be fitted: the search has chosen the binade
        return solution.grid.scale
    groups = solution.levels.shape[1] // problem.group
    rows_at_once = max(1, FIT_ELEMENTS // groups**2)
    return torch.cat(
        [
            _fitted_scale(problem, *piece)
            for piece in zip(
                projected.split(rows_at_once),
                solution.levels.split(rows_at_once),
                solution.grid.scale.split(rows_at_once, dim=1),
                strict=True,
            )
        ],
        dim=1,
    )


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
    residual = linear - (quadratic @ scale.T.unsqueeze(-1)).squeeze(-1)
    fitted = scale.T + torch.cholesky_solve(residual.unsqueeze(-1), lower).squeeze(-1)
    fitted = torch.where(empty | ~torch.isfinite(fitted), scale.T, fitted)
    fitted = problem.rule.scale.round(fitted)

    def loss(s: Tensor) -> Tensor:
        return ((quadratic @ s.unsqueeze(-1)).squeeze(-1) - 2 * linear).mul_(s).sum(-1)

    better = (loss(fitted) < loss(scale.T)) & (info == 0)
    return torch.where(better, fitted.T, scale)
