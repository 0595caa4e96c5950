"""What scales of input channels cost: the output's squared error, estimated from H, rows and tokens. No forward.

With Δ = Q(W·s)/s − W, e = Q(X/s) − X/s and H = XᵀX it is

    tr(Δ H Δᵀ)     for weights that are rounded to the nearest code,
    Σ_j Δ_j² p_j   for weights that GPTQ follows: what is left of a column's error when later columns make up for it
                   costs p_j, the squared diagonal of H's Cholesky factor (the variance of channel j given the later
                   ones). Scaling does not change p in the units of W, so one factorization serves all candidates.
    ‖e (W·s)ᵀ‖²    more where activations are quantized, on a sample of tokens: rounding of activations depends on
                   the single token and cannot be had from H. The error of the weights still comes from H, which has
                   seen all tokens; the two are uncorrelated but for the little that e repeats of X, so they add up.
                   Where ranges are static, scale and range are found on other tokens than e (input_error.py).

What makes it cheap: evenly spaced rows stand for all of them, and where the spec searches its scales, a few stand for
those it tries. (They must come near the best one: where one channel dominates a group, that just meets its weight.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algorithms.input_error import Scored
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import matmul, scales
from fewbit.numerics.scales import GridRule
from fewbit.numerics.search import Best
from fewbit.numerics.second_moment import importance

DAMPING = 0.01  # of mean(diag H), as GPTQ's default


@dataclass(frozen=True)
class Objective:
    """What a scale costs: estimated squared errors of the outputs."""

    targets: list[Target]
    moment: Tensor
    costs: Tensor | None
    """p of the columns where GPTQ follows."""
    scored: list[Scored]
    """Tokens of the input that tell what its quantization costs."""

    def weights(self, scale: Tensor) -> float:
        """By the error of the weights."""
        total = 0.0
        for target in self.targets:
            if self.costs is None:
                delta = target.deviation(scale, importance(self.moment))
                error = matmul.linear(self.moment, delta).mul_(delta.T).sum(dtype=torch.float64)
            else:
                delta = target.deviation(scale, self.costs)
                error = delta.square_().sum(0, dtype=torch.float64) @ self.costs.double()
            total += float(error) * target.stands_for
        return total

    def inputs(self, scales: Sequence[Tensor]) -> float:
        """By the error of the inputs, with the scale of each set of tokens; 0 where they are not quantized."""
        total = 0.0
        for tokens, scale in zip(self.scored, scales, strict=True):
            noise = tokens.deviation(scale)
            for target in self.targets:
                spread = matmul.linear(noise, target.rows * scale)
                total += float((spread.square_().sum(1) @ tokens.stands_for).double()) * target.stands_for
        return total


@dataclass(frozen=True)
class Target:
    """Rows [rows, in] of one linear that stand for all of it."""

    rows: Tensor
    low: Tensor
    """[tiles along out, in]: least of each column over the rows of a tile."""
    high: Tensor
    tile_of_row: Tensor | None
    """[rows] index into `low`; None where rows are tiles of their own."""
    extreme: Tensor
    """[in]: largest magnitude of each column of the whole weight."""
    tile_columns: int
    spec: QuantizationSpec
    dtype: torch.dtype
    stands_for: float
    """Rows of the linear per row here."""

    def deviation(self, scale: Tensor, costs: Tensor) -> Tensor:
        """Δ = Q(W·s)/s − W of the rows [rows, in], on the grid with the least Σ Δ² · costs [in] of each tile."""
        fmt = self.spec.format
        format = self.spec.scale_format(self.dtype, self.spec.global_scale(self.extreme * scale))
        rule = self.spec.grid_rule(format)
        scaled = (self.rows * scale).unflatten(1, (-1, self.tile_columns))  # [rows, groups, columns]
        weights = (costs / scale.square()).view(-1, self.tile_columns)
        low = (self.low * scale).unflatten(1, (-1, self.tile_columns)).amin(-1)
        high = (self.high * scale).unflatten(1, (-1, self.tile_columns)).amax(-1)
        best = Best()
        for value, zero in self._grids(rule, low, high):
            if self.tile_of_row is not None:
                value, zero = value[self.tile_of_row], None if zero is None else zero[self.tile_of_row]
            delta = scales.fake_quantize(scaled, value, zero, fmt, self.spec.round_method).sub_(scaled)
            error = format.pooled(delta.square().mul_(weights).sum(-1))
            best.consider(error.unsqueeze(-1), delta)
        return best.value.flatten(1) / scale

    def _grids(self, rule: GridRule, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scale values and zero points of the spec's rule, or a few that stand for its search. (Where rows share a
        scale the range that covers is the best or close to it.)"""
        if rule.rule not in ("search", "mse") or self.tile_of_row is not None:
            stored, zero = rule.from_range(low, high)
            yield rule.scale.value(stored), zero
            return
        # of either sign where the grid's ends differ: so the largest weight of a group is met, however it falls
        values, zeros = rule.candidates(low.clamp(max=0), high.clamp(min=0), rule.scale.shares)
        yield from zip(values, [None] * len(values) if zeros is None else zeros, strict=True)


def targets_of(
    weights: Sequence[Tensor], specs: Sequence[QuantizationSpec], dtype: torch.dtype, rows: int
) -> list[Target]:
    """Some `rows` of all weights [out, in] together, evenly spaced, that stand for them; casts lose nothing."""
    total = sum(weight.shape[0] for weight in weights)
    targets = []
    for weight, spec in zip(weights, specs, strict=True):
        if spec.format.is_cast:
            continue
        out = weight.shape[0]
        count = min(out, max(1, round(rows * out / total)))
        chosen = torch.arange(count, device=weight.device) * out // count
        tile_rows, columns = spec.tiling.tile(*weight.shape)
        picked = weight[chosen].float()
        low, high, tile_of_row = picked, picked, None
        if tile_rows > 1:
            low, high = scales.extremes(weight.unflatten(0, (-1, tile_rows)), dim=1)
            tile_of_row = chosen // tile_rows
        extreme = weight.abs().amax(0) if spec.stored_as.has_global_scale else weight[0]
        targets.append(Target(picked, low, high, tile_of_row, extreme, columns, spec, dtype, out / count))
    return targets


def column_costs(moment: Tensor) -> Tensor:
    """p [in] float32: what a squared error of each column costs when columns are quantized by falling diag(H) and
    those still to come make up for it. With J the reversal of that order, J H J = L Lᵀ and p = diag(L)²: the part of a
    channel's second moment that later channels do not explain. diag(H) where H cannot be factored."""
    diagonal = moment.diagonal()
    reverse = diagonal.argsort(descending=True, stable=True).flip(0)
    damped = moment[reverse][:, reverse]
    damped.diagonal().add_(DAMPING * diagonal.mean())
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return diagonal.clone()
    costs = torch.empty_like(diagonal)
    costs[reverse] = lower.diagonal().square()
    return costs
