"""GPTQ: columns are quantized one after another, and the error of each is moved into those still to come.

Frantar et al. 2022, arXiv:2210.17323. With H = XᵀX of the input and U the upper Cholesky factor of its damped inverse
(H⁻¹ = UᵀU), column j of W [out, in] goes to the nearest grid point v_j, and every later column k takes over
−(w_j − v_j)·U_jk / U_jj. What this costs is known on the way: the squared output error of a row is exactly

    loss = Σ_j ((w_j − v_j) / U_jj)²         with w_j as it is when its turn comes.

Beyond the paper, three things are done with that (benchmarks/layer_loss.py measures each), and a fourth with the
drift of the inputs (see `drifted`):

1. Scales are chosen by the loss. When the loop reaches a group, the grid that is best for the weights as they are by
   then is searched by Σ ((w_j − v_j) / U_jj)² without compensation inside the group; it and a few others (grids.py)
   are run through the group's columns for real, and each row keeps the one with the least loss. Groups must be
   neighbours for that, so columns are sorted group-wise: groups by their mean diag(H), columns inside them by diag(H).
2. Scales are fitted to the codes. For fixed codes a row's loss is quadratic in its scales, so the best ones solve a
   small linear system (least squares in the norm of H).
3. Codes are found again on the fitted grid, now that it is fixed with the columns in any order (by falling diag(H);
   groups stay where they are, so no g_idx), and each row keeps the better result. Then the scales are fitted again.

Grids that are fixed before the loop (a scale per channel, blocks) are searched by the same Σ ((w_j − v_j) / U_jj)².

In the end each row is compared with itself rounded to nearest, by the true loss, so it is never worse than that.
Scales are always scored as they are stored. The inverse of H, the loop and the fit of the scales are in columns.py.
"""

import torch
from torch import Tensor

from fewbit.algorithms.columns import Factor, Problem, Solution, factored, refit, solve, solve_greedily
from fewbit.algorithms.grids import Grid
from fewbit.algorithms.outcome import Outcome
from fewbit.config.algorithms import GPTQConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import ScaleFormat
from fewbit.numerics.scales import GridRule
from fewbit.numerics.second_moment import importance, quadratic_form
from fewbit.tensor import QuantTensor, find_grid, round_to_nearest

CHUNK_ELEMENTS = 2**23  # in · rows that are worked on at a time: bounds the memory beyond the inputs
# Order in which scales are chosen, by the order in which codes are found: choosing needs whole groups.
_CHOOSING_ORDER = {"activation": "group-aware", "group-aware": "group-aware", "none": "none"}


def gptq(
    weight: Tensor,
    moment: Tensor,
    spec: QuantizationSpec,
    scale: ScaleFormat,
    config: GPTQConfig,
    drift: Tensor | None = None,
) -> Outcome | None:
    """Quantize `weight` [out, in] float32 given H [in, in] float32; None if H cannot be factored at all. `drift`
    [in, in] float32 is (X̃ − X)ᵀX with X̃ the input in the full-precision model; see `drifted`."""
    _, group = spec.tiling.tile(*weight.shape)
    rule = spec.grid_rule(scale)
    whole = weight.shape[1] % group == 0  # blocks may be cut at the edge
    search = spec.observer == "search" and spec.tiling.rows == 1 and whole
    by_group = search and spec.qscheme == "per_group" and scale.block == 1  # else a scale depends on its neighbours
    choosing = factored(moment, group, _CHOOSING_ORDER[config.order] if by_group else config.order, config.damping)
    solving = choosing
    if by_group and config.refits and _CHOOSING_ORDER[config.order] != config.order:
        solving = factored(moment, group, config.order, config.damping)
    if choosing is None or solving is None:
        return None
    drift = drift if config.drift > 0 else None
    if drift is not None:
        weight = drifted(weight, drift, choosing, config.drift)
    nearest = round_to_nearest(weight, spec, scale, importance(moment))
    fixed = None if by_group else _fixed_grid(weight, choosing.cost, nearest, rule)
    ridge = solving.damping * float(moment.diagonal().mean(dtype=torch.float64))
    parts = []
    rows_at_once = max(64, CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        problem = Problem(weight[rows], moment, ridge, group, rule)
        if fixed is None:
            solution = solve_greedily(problem, choosing)
        else:
            solution = solve(problem, choosing, fixed.map(lambda x: x[:, rows]), config.block_size)  # noqa: B023
        if search and (by_group or not scale.is_power_of_two):  # else nothing can change
            solution = refit(problem, solving, solution, config)
        parts.append(solution)
    found = _to_quant_tensor(parts, spec, scale)
    del parts
    found, error = _better(weight, moment, found, nearest)
    return Outcome(found, max(choosing.damping, solving.damping), error=error if drift is None else None)


def drifted(weight: Tensor, drift: Tensor, factor: Factor, share: float) -> Tensor:
    """The weight that makes up for the drift of its input: W + share · W D H⁻¹, [out, in].

    The input X of a linear comes from layers that are quantized already and differs from X̃, what it would be in the
    full-precision model. ‖X̃Wᵀ − XŴᵀ‖² is least for Ŵ = W X̃ᵀX (XᵀX)⁻¹ = W + W D H⁻¹ with D = (X̃ − X)ᵀX. A part of
    that is overfitted to the calibration data, hence `share`. (GPTAQ, Li et al. 2025, arXiv:2504.02692, has the same
    aim and does it column by column.)
    """
    upper = factor.update * factor.precision.rsqrt().unsqueeze(1)  # U again: H⁻¹ = UᵀU in loop order
    correction = (((weight @ drift)[:, factor.order]) @ upper.T) @ upper
    result = weight.clone()
    result[:, factor.order] += share * correction
    return result


def _fixed_grid(weight: Tensor, cost: Tensor, nearest: QuantTensor, rule: GridRule) -> Grid:
    """Grids [groups, rows] that are fixed before the loop, for every row its own: those of rounding to nearest. If
    rows have their own and they are searched, then by what errors cost in the end (`cost` [in]) instead of by diag(H):
    a column with huge inputs is cheap if its neighbours can make up for it."""
    spec, stored, zero = nearest.spec, nearest.scale, nearest.zero_point
    if rule.rule == "search" and spec.tiling.rows == 1:
        stored, zero = find_grid(weight, spec, rule.scale, cost)
    rows = weight.shape[0]
    tile_rows, _ = spec.tiling.tile(*weight.shape)
    low = None if zero is None else rule.fmt.smallest - zero.float()
    grid = Grid(rule.scale.value(stored), low, rule.fmt, rule.rounding)
    return grid.map(lambda x: x.repeat_interleave(tile_rows, 0)[:rows].T.contiguous())


def _better(weight: Tensor, moment: Tensor, found: QuantTensor, nearest: QuantTensor) -> tuple[QuantTensor, Tensor]:
    """For each row (each tile of rows) what loses less under H as it is, and its loss: float64 [rows]. (Compensation
    is greedy and H damped, so where columns are hardly correlated some rows are better off without.)"""
    error, plain = (quadratic_form(each.dequantize().sub_(weight), moment) for each in (found, nearest))
    tile_rows, _ = found.spec.tiling.tile(*weight.shape)
    tile = torch.arange(len(error), device=error.device) // tile_rows
    gain = error.new_zeros(int(tile[-1]) + 1).index_add_(0, tile, error - plain)
    worse = (gain > 0)[tile]
    if not bool(worse.any()):
        return found, error
    return found.with_rows(worse, nearest), torch.where(worse, plain, error)


def _to_quant_tensor(parts: list[Solution], spec: QuantizationSpec, format: ScaleFormat) -> QuantTensor:
    smallest, fmt = spec.format.smallest, spec.format
    codes, values, zeros = [], [], []
    for part in parts:
        levels, grid = part.levels, part.grid
        if grid.low is not None:
            zero = (smallest - grid.low).T  # [rows, groups]
            zeros.append(zero.to(fmt.code_dtype))
            levels = levels + zero.repeat_interleave(levels.shape[1] // zero.shape[1], 1)
        codes.append(fmt.encode(levels))
        values.append(grid.scale.T)
    joined = torch.cat(codes)
    tile_rows, _ = spec.tiling.tile(*joined.shape)
    scale = format.store(torch.cat(values)[::tile_rows].contiguous())  # the rows of a tile carried the same one
    zero_point = torch.cat(zeros)[::tile_rows].contiguous() if zeros else None
    return QuantTensor(joined, scale, zero_point, spec, format.global_scale)
