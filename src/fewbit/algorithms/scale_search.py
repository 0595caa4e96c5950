"""One search for the scales of input channels: AWQ and SmoothQuant differ only in what they count as error.

AWQ: Lin et al. 2023, arXiv:2306.00978. SmoothQuant: Xiao et al. 2022, arXiv:2211.10438. Linears that share an input X
compute the same from X / s with W · s. Dividing the channels that carry much by s > 1 makes their columns of W larger
than the others of their group, so they are rounded finer (AWQ), and takes outliers out of the activations
(SmoothQuant). Both methods look along one family of curves,

    s = x^α / w^(1 − α)   (duo)      or      s = x^α,

x and w being the size of each channel in the input and in the weights, and keep the α with the least error of the
output (scale_loss.py). SmoothQuant counts the error of the weights and of the input; AWQ counts the weights alone, but
where activations are quantized too, it takes no scale with which both together lose. No scaling is a candidate, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.algorithms.input_error import Scored, scored_tokens
from fewbit.algorithms.scale_loss import Objective, column_costs, targets_of
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import ScaleSearchConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import nearest_power_of_two

ROWS = 128  # of all members together that the error is measured on
WORTH_IT = 0.98  # of the loss before: what gains less is within the estimate's own error, …
WORTH_IT_COMPENSATED = 0.9  # … which is larger where GPTQ follows: alone it wins back most of what scales gain
DISTORTED = 1.05  # of the loss, where storage has spoiled a scale that was asked for: rounding alone stays far below
NEARLY_DEAD = 2.0**-16  # of what channels carry on average


@dataclass(frozen=True)
class ScaleSearch:
    """What was found: the input is divided by `scale`, the weights' columns are multiplied by it."""

    scale: Tensor
    """[in] float32."""
    loss: float
    """Estimated squared error of the output."""
    loss_before: float
    """Without scaling."""
    alpha: float | None = None
    """Best exponent; None where nothing was better than no scaling (`scale` is all ones)."""
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
        statistics: of the unscaled input: H, and for `input_spec` a sample of tokens and the largest ones.
        dtype: what the checkpoint holds the weights in, which their scales may be stored in.
        input_spec: how the input will be quantized, whose error then counts as well (see above).
        tie: [in] int64; channels with the same number get the same scale (the query heads that share a value head).
        power_of_two: only powers of two, which rescale stored numbers exactly.
        compensated: GPTQ will find the codes.
        stored: what storage makes of a scale, [in] → [in] (a channel keeps 1 where its producer cannot be divided by
            as much in its dtype), as which it is scored. None if any scale can be stored.
        rows: how many rows the error is measured on.

    Returns no scaling (all ones) unless that gains at least 2 % of the loss, 10 % where GPTQ follows. An alpha that
    the config fixes is taken as it is, unless storage distorts its scales so that they cost more than they would, and
    more than none.
    """
    moment, scored = statistics.moment, scored_tokens(statistics, input_spec)
    costs = column_costs(moment) if compensated else None
    objective = Objective(targets_of(weights, specs, dtype, rows), moment, costs, scored)
    curves = _curves(weights, specs, statistics, scored, config, tie, power_of_two)
    bar = _Bar.of(objective, config, compensated)
    best = none = ScaleSearch(torch.ones_like(moment[0]), bar.before, bar.before)
    for alpha, duo in _exponents(config):
        scale, *others = (curve.at(alpha, duo) for curve in curves)
        if scale is None:
            return best
        candidate = [scale, *(none.scale if each is None else each for each in others)]
        loss = bar.loss(candidate)
        if loss < bar.enough and stored is not None and not torch.equal(taken := stored(scale), scale):
            loss, wanted = bar.loss([taken, *(stored(each) for each in candidate[1:])]), loss
            if config.alpha is not None and loss > DISTORTED * max(wanted, bar.before):
                continue
            scale = taken
        if loss < bar.enough:
            bar = replace(bar, enough=loss)
            best = ScaleSearch(scale, loss, bar.before, alpha, duo)
    return best


@dataclass(frozen=True)
class _Bar:
    """What a candidate has to beat."""

    objective: Objective
    smooth: bool
    """Whether the inputs' error counts."""
    before: float
    """Loss without scaling."""
    most: float
    """Error of weights and inputs that none may exceed."""
    enough: float
    """Loss to stay below: that of no scaling less what makes it worth it, later that of the best so far."""

    @classmethod
    def of(cls, objective: Objective, config: ScaleSearchConfig, compensated: bool) -> _Bar:
        none = torch.ones_like(objective.moment[0])
        of_weights = objective.weights(none)
        both = of_weights + objective.inputs([none] * len(objective.scored))
        smooth, fixed = config.counts_inputs, config.alpha is not None
        before = both if smooth else of_weights
        enough = math.inf if fixed else (WORTH_IT_COMPENSATED if compensated else WORTH_IT) * before
        return cls(objective, smooth, before, math.inf if smooth or fixed else both, enough)

    def loss(self, scales: Sequence[Tensor]) -> float:
        """Of a scale, followed by those like it for each set of tokens; infinite if it is no better than the best so
        far, or costs the inputs too much."""
        loss = self.objective.weights(scales[0])
        if loss >= self.enough:  # the inputs' error can only add to it
            return math.inf
        both = loss + self.objective.inputs(scales[1:])
        return math.inf if both > self.most else both if self.smooth else loss


def is_cut(spec: QuantizationSpec, shape: tuple[int, ...]) -> bool:
    """Whether blocks are cut at the edges of a weight [out, in], which the search's estimate does not know."""
    blocks = spec.block_size
    return blocks is not None and any(size % block for size, block in zip(shape, blocks, strict=True))


def _exponents(config: ScaleSearchConfig) -> Iterator[tuple[float, bool]]:
    """(α, duo) of all scales that are tried."""
    alphas = [step / (config.n_grid - 1) for step in range(config.n_grid)] if config.alpha is None else [config.alpha]
    for duo in (True, False) if config.duo_scale == "both" else (bool(config.duo_scale),):
        for alpha in alphas:
            yield alpha, duo


@dataclass(frozen=True)
class _Curve:
    """Scales s [in] of all exponents, for channels of sizes x [in] in the input and w [in] in the weights."""

    x: Tensor
    w: Tensor
    clamp_min: float
    power_of_two: bool

    def at(self, alpha: float, duo: bool) -> Tensor | None:
        """s [in] of one pair of exponents, 1 in the geometric mean; None if no channel carries anything. Channels that
        carry nearly nothing keep 1: one of 1e-30 would have a scale to match and move the mean of all others."""
        carried = self.x.double() * self.w
        live = carried > NEARLY_DEAD * carried.mean()
        if not bool(live.any()):
            return None
        log_x, log_w = self.x[live].log(), self.w[live].log()
        log_s = alpha * log_x - (1 - alpha) * log_w if duo else alpha * log_x
        scale = torch.ones_like(self.x)
        scale[live] = (log_s - log_s.mean()).exp()
        scale.clamp_(self.clamp_min, 1 / self.clamp_min)
        return nearest_power_of_two(scale) if self.power_of_two else scale


def _curves(
    weights: Sequence[Tensor],
    specs: Sequence[QuantizationSpec],
    statistics: Statistics,
    scored: Sequence[Scored],
    config: ScaleSearchConfig,
    tie: Tensor | None,
    power_of_two: bool,
) -> list[_Curve]:
    """That of the whole input, and for each set of scored tokens that of the tokens its static range is found on."""
    smooth = config.counts_inputs
    x = statistics.moment.diagonal().clamp(min=0).sqrt()
    if smooth and statistics.largest is not None:
        x = statistics.largest
    w = torch.stack([_column_size(*pair, smooth) for pair in zip(weights, specs, strict=True)]).amax(0)
    sizes = [x, *(x if each.fitted is None else _channel_size(each.fitted, smooth) for each in scored)]
    if tie is not None:
        *sizes, w = (_of_tied(size, tie, smooth) for size in (*sizes, w))
    return [_Curve(size, w, config.scale_clamp_min, power_of_two) for size in sizes]


def _channel_size(tokens: Tensor, smooth: bool) -> Tensor:
    """How large each channel is in some tokens [tokens, in]: at most for SmoothQuant, on average for AWQ. [in]"""
    return tokens.abs().amax(0) if smooth else tokens.square().mean(0).sqrt()


def _of_tied(x: Tensor, tie: Tensor, smooth: bool) -> Tensor:
    """The largest (SmoothQuant) or the root mean square (AWQ) of the channels that are tied, at each of them. [in]"""
    count = int(tie.max()) + 1
    found = torch.zeros(count, dtype=x.dtype, device=x.device)
    if smooth:
        found.scatter_reduce_(0, tie, x, "amax")
    else:
        found = (found.index_add_(0, tie, x.square()) / torch.bincount(tie, minlength=count)).sqrt()
    return found[tie]


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
