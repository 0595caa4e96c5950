"""One search for the scales of input channels: AWQ and SmoothQuant differ only in what they count as error.

AWQ: Lin et al. 2023, arXiv:2306.00978. SmoothQuant: Xiao et al. 2022, arXiv:2211.10438. Linears that share an input X
compute the same from X / s with W · s. Dividing the channels that carry much by s > 1 makes their columns of W larger
than the others of their group, so they are rounded finer (AWQ), and takes outliers out of the activations
(SmoothQuant). Both methods look along one family of curves,

    s = x^α / w^(1 − α)   (duo)      or      s = x^α,

x and w being the size of each channel in the input and in the weights, and keep the α with the least error of the
output. That error needs no forward. With Δ = Q(W·s)/s − W, e = Q(X/s) − X/s and H = XᵀX it is

    tr(Δ H Δᵀ)     for weights that are rounded to the nearest code,
    Σ_j Δ_j² p_j   for weights that GPTQ follows: what is left of a column's error when later columns make up for it
                   costs p_j, the squared diagonal of H's Cholesky factor (the variance of channel j given the later
                   ones). Scaling does not change p in the units of W, so one factorization serves all candidates.
    ‖e (W·s)ᵀ‖²    more where activations are quantized, on a sample of tokens: rounding of activations depends on
                   the single token and cannot be had from H. The error of the weights still comes from H, which has
                   seen all tokens; the two are uncorrelated but for the little that e repeats of X, so they add up.
                   Where ranges are static, scale and range are found on other tokens than e (input_error.py).

AWQ counts the weights alone. Where activations are quantized too, it takes no scale with which both together lose.

What makes it cheap: evenly spaced rows stand for all of them, and where the spec searches its scales, a few stand for
those it tries. (They must come near the best one. Where one channel dominates a group, the scale that just meets its
weight is far better than the next, and a search that overlooks that scales too much.) No scaling at all is always
among the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.algorithms.input_error import Scored, scored_tokens
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import ScaleSearchConfig, SmoothQuantConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import matmul, scales
from fewbit.numerics.scale_format import nearest_power_of_two
from fewbit.numerics.scales import GridRule
from fewbit.numerics.search import Best
from fewbit.numerics.second_moment import importance

ROWS = 128  # of all members together that the error is measured on
WORTH_IT = 0.98  # of the loss before: what gains less is within the estimate's own error, …
WORTH_IT_COMPENSATED = 0.9  # … which is larger where GPTQ follows: it wins back most of what scales gain by itself
DISTORTED = 1.05  # of the loss, where storage has spoiled a scale that was asked for: rounding alone stays far below
NEARLY_DEAD = 2.0**-16  # of what channels carry on average
DAMPING = 0.01  # of mean(diag H), as GPTQ's default


@dataclass(frozen=True)
class ScaleSearch:
    """What was found: the input is divided by `scale`, the weights' columns are multiplied by it."""

    scale: Tensor
    """[in] float32."""
    loss: float
    """Estimated squared error of the output with this scale …"""
    loss_before: float
    """… and with none."""
    alpha: float | None = None
    """Exponent that was best; None where nothing was better than no scaling (`scale` is all ones)."""
    duo: bool = False
    """Whether the weights' sizes took part."""


def search_scales(
    weights: Sequence[Tensor],
    specs: Sequence[QuantizationSpec],
    statistics: Statistics,
    config: ScaleSearchConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    input_spec: QuantizationSpec | None = None,
    tie: Tensor | None = None,
    power_of_two: bool = False,
    compensated: bool = False,
    stored: Callable[[Tensor], Tensor] | None = None,
    rows: int = ROWS,
) -> ScaleSearch:
    """Scale of the input channels of linears that share one input.

    Args:
        weights: [out, in] float32 each.
        specs: how each of them will be quantized.
        statistics: of the unscaled input: H, and for `input_spec` a sample of tokens, which stands for all of them,
            and the largest ones, which stand for themselves.
        config: what is searched. If there are `input_spec` and a sample, SmoothQuantConfig counts the activations'
            error as well, and AWQConfig takes no scale that costs them more than the weights gain.
        dtype: what the checkpoint holds the weights in, which their scales may be stored in.
        input_spec: how the input will be quantized.
        tie: [in] int64; channels with the same number get the same scale (the query heads that share a value head).
        power_of_two: only powers of two, which rescale stored numbers exactly.
        compensated: GPTQ will find the codes.
        stored: what storage makes of a scale, [in] → [in]: where a channel's producer cannot be divided by as much in
            its dtype, the channel keeps 1. Scales are scored as they are stored. None if any scale can be.
        rows: how many rows the error is measured on.

    Returns no scaling (all ones) unless that gains at least 2 % of the loss, 10 % where GPTQ follows. An alpha that
    the config fixes is taken as it is, but if storage distorts its scales so that they cost more than they were to,
    and more than none: then none.
    """
    moment = statistics.moment
    targets = _targets(weights, specs, dtype, rows)
    smooth = isinstance(config, SmoothQuantConfig)
    scored = scored_tokens(statistics, input_spec)
    sizes = [None if each.fitted is None else _channel_size(each.fitted, smooth) for each in scored]
    objective = _Objective(targets, moment, column_costs(moment) if compensated else None, scored)

    none = torch.ones_like(moment[0])
    of_weights, of_inputs = objective.weights(none), objective.inputs([none] * len(scored))
    before = of_weights + of_inputs if smooth else of_weights
    best = ScaleSearch(none, before, before)
    worth_it = WORTH_IT_COMPENSATED if compensated else WORTH_IT
    enough = worth_it * before if config.alpha is None else math.inf
    x = moment.diagonal().clamp(min=0).sqrt()
    if smooth and statistics.largest is not None:
        x = statistics.largest
    w = torch.stack([_column_size(*pair, smooth) for pair in zip(weights, specs, strict=True)]).amax(0)

    def loss_of(scale: Tensor, of_tokens: list[Tensor]) -> float:
        """Of a scale, given those like it for each set of tokens; infinite if it is no better than the best so far, or
        costs the inputs too much."""
        loss = objective.weights(scale)
        if loss >= enough:  # the inputs' error can only add to it
            return math.inf
        both = loss + objective.inputs(of_tokens)
        if smooth:
            return both
        return math.inf if config.alpha is None and both > of_weights + of_inputs else loss

    for alpha, duo in _exponents(config):
        scale = _scale(x, w, alpha, duo, config, tie, power_of_two)
        if scale is None:
            return best
        like = [scale if size is None else _scale(size, w, alpha, duo, config, tie, power_of_two) for size in sizes]
        of_tokens = [none if each is None else each for each in like]
        loss = loss_of(scale, of_tokens)
        if loss < enough and stored is not None and not torch.equal(taken := stored(scale), scale):
            loss, wanted = loss_of(taken, [stored(each) for each in of_tokens]), loss
            if config.alpha is not None and loss > DISTORTED * max(wanted, before):
                continue
            scale = taken
        if loss < enough:
            enough = loss
            best = ScaleSearch(scale, loss, before, alpha, duo)
    return best


def is_cut(spec: QuantizationSpec, shape: tuple[int, ...]) -> bool:
    """Whether blocks are cut at the edges of a weight [out, in], which the search's estimate does not know."""
    blocks = spec.block_size
    return blocks is not None and any(size % block for size, block in zip(shape, blocks, strict=True))


def column_costs(moment: Tensor) -> Tensor:
    """p [in] float32: what a squared error of each column costs when columns are quantized by falling diag(H) and
    those still to come make up for it.

    With the columns in that order and J their reversal, J H J = L Lᵀ, and p is diag(L)²: the part of a channel's
    second moment that later channels do not explain. Falls back to diag(H) where H cannot be factored.
    """
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


def _exponents(config: ScaleSearchConfig) -> Iterator[tuple[float, bool]]:
    """(α, duo) of all scales that are tried."""
    alphas = [step / (config.n_grid - 1) for step in range(config.n_grid)] if config.alpha is None else [config.alpha]
    for duo in (True, False) if config.duo_scale == "both" else (bool(config.duo_scale),):
        for alpha in alphas:
            yield alpha, duo


def _scale(
    x: Tensor, w: Tensor, alpha: float, duo: bool, config: ScaleSearchConfig, tie: Tensor | None, power_of_two: bool
) -> Tensor | None:
    """s [in] of one pair of exponents, 1 in the geometric mean; None if no channel carries anything.

    Channels that carry (nearly) nothing keep 1, however small it is: one of 1e-30 would have a scale to match and move
    the mean of all others.
    """
    if tie is not None:
        combine = _largest_of_tied if isinstance(config, SmoothQuantConfig) else _mean_of_tied
        x, w = combine(x, tie), combine(w, tie)
    carried = x.double() * w
    live = carried > NEARLY_DEAD * carried.mean()
    if not bool(live.any()):
        return None
    log_x, log_w = x[live].log(), w[live].log()
    log_s = alpha * log_x - (1 - alpha) * log_w if duo else alpha * log_x
    scale = torch.ones_like(x)
    scale[live] = (log_s - log_s.mean()).exp()
    scale.clamp_(config.scale_clamp_min, 1 / config.scale_clamp_min)
    return nearest_power_of_two(scale) if power_of_two else scale


def _channel_size(tokens: Tensor, smooth: bool) -> Tensor:
    """How large each channel is in some tokens [tokens, in]: at most for SmoothQuant, on average for AWQ. [in]"""
    return tokens.abs().amax(0) if smooth else tokens.square().mean(0).sqrt()


def _mean_of_tied(x: Tensor, tie: Tensor) -> Tensor:
    """Root mean square over the channels that are tied, at each of them. [in] → [in]"""
    count = int(tie.max()) + 1
    total = torch.zeros(count, dtype=x.dtype, device=x.device).index_add_(0, tie, x.square())
    tied: Tensor = (total / torch.bincount(tie, minlength=count)).sqrt()[tie]
    return tied


def _largest_of_tied(x: Tensor, tie: Tensor) -> Tensor:
    """The largest of the channels that are tied, at each of them. [in] → [in]"""
    largest: Tensor = torch.zeros(int(tie.max()) + 1, dtype=x.dtype, device=x.device).scatter_reduce_(
        0, tie, x, "amax"
    )
    return largest[tie]


def _column_size(weight: Tensor, spec: QuantizationSpec, smooth: bool) -> Tensor:
    """How large each column is [in]: SmoothQuant takes its largest magnitude, which is what coarsens a row's scale;
    AWQ the mean magnitude in units of its group's largest, which is what rounding is relative to."""
    magnitude = weight.abs()
    if smooth:
        return magnitude.amax(0)
    _, columns = spec.tiling.tile(*weight.shape)
    grouped: Tensor = magnitude.unflatten(1, (-1, columns))  # [out, groups, columns]
    largest = grouped.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return (grouped / largest).mean(0).flatten()


@dataclass(frozen=True)
class _Target:
    """Rows of one linear that stand for all of it."""

    rows: Tensor
    """[rows, in]."""
    low: Tensor | None
    """[tiles along out, in]: least of each column over the rows of a tile; None where tiles are a row high."""
    high: Tensor | None
    tile_of_row: Tensor | None
    """[rows] index into `low`."""
    extreme: Tensor
    """[in]: largest magnitude of each column of the whole weight."""
    columns: int
    """Of a tile."""
    spec: QuantizationSpec
    dtype: torch.dtype
    stands_for: float
    """Rows of the linear per row here."""

    def deviation(self, scale: Tensor, costs: Tensor) -> Tensor:
        """Δ = Q(W·s)/s − W of the rows [rows, in], on the grid with the least Σ Δ² · costs [in] of each tile."""
        fmt = self.spec.format
        format = self.spec.scale_format(self.dtype, self.spec.global_scale(self.extreme * scale))
        rule = self.spec.grid_rule(format)
        scaled = (self.rows * scale).unflatten(1, (-1, self.columns))  # [rows, groups, columns]
        weights = (costs / scale.square()).view(-1, self.columns)
        if self.low is None or self.high is None:
            low, high = scales.extremes(scaled)
        else:
            low = (self.low * scale).unflatten(1, (-1, self.columns)).amin(-1)
            high = (self.high * scale).unflatten(1, (-1, self.columns)).amax(-1)
        best: Best | None = None
        for value, zero in self._grids(rule, low, high):
            if self.tile_of_row is not None:
                value, zero = value[self.tile_of_row], None if zero is None else zero[self.tile_of_row]
            delta = scales.fake_quantize(scaled, value, zero, fmt, self.spec.round_method).sub_(scaled)
            error = delta.square().mul_(weights).sum(-1)
            error = format.pooled(error).unsqueeze(-1)
            if best is None:
                best = Best(error, delta)
            else:
                best.consider(error, delta)
        assert best is not None
        return best.value.flatten(1) / scale

    def _grids(self, rule: GridRule, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scale values and zero points of the spec's rule, or a few that stand for its search.

        Where rows share a scale the range that covers is the best or close to it.
        """
        if rule.rule not in ("search", "mse") or self.tile_of_row is not None:
            stored, zero = rule.from_range(low, high)
            yield rule.scale.value(stored), zero
            return
        # of either sign where the grid's ends differ: so the largest weight of a group is met, however it falls
        values, zeros = rule.candidates(low.clamp(max=0), high.clamp(min=0), rule.scale.shares)
        yield from zip(values, [None] * len(values) if zeros is None else zeros, strict=True)


def _targets(
    weights: Sequence[Tensor], specs: Sequence[QuantizationSpec], dtype: torch.dtype, rows: int
) -> list[_Target]:
    total = sum(weight.shape[0] for weight in weights)
    targets = []
    for weight, spec in zip(weights, specs, strict=True):
        if spec.format.is_cast:
            continue
        out = weight.shape[0]
        count = min(out, max(1, round(rows * out / total)))
        chosen = torch.arange(count, device=weight.device) * out // count
        tile_rows, columns = spec.tiling.tile(*weight.shape)
        low = high = tile_of_row = None
        if tile_rows > 1:
            by_tile = weight.unflatten(0, (-1, tile_rows))
            low, high = by_tile.amin(1), by_tile.amax(1)
            tile_of_row = chosen // tile_rows
        extreme = weight.abs().amax(0) if spec.stored_as.has_global_scale else weight[0]
        picked = weight[chosen].float()
        targets.append(_Target(picked, low, high, tile_of_row, extreme, columns, spec, dtype, out / count))
    return targets


@dataclass(frozen=True)
class _Objective:
    """What a scale costs: estimated squared errors of the outputs."""

    targets: list[_Target]
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
