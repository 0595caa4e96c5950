"""Static scales of activations: what many batches have in common.

An observer sees one batch after another and then says which scale to store. One small class for each way:

    minmax           the range of everything that was seen
    moving-average   after the first batch, each moves the range by 1 % of the way to its own (as torch's
                     MovingAverageMinMaxObserver does). Only here the result depends on how data is batched and ordered
    percentile       the range without its outermost values (numerics/scales.py)
    mse, histogram   the range whose grid has the least squared error: for batches that are gone, that can only be
                     measured on a histogram, hence two names of one observer

Percentiles and errors come from a histogram whose bins do not depend on the data (float_histogram.py), so they are
the same, bit for bit, however the data is batched. Values are known to 0.1 % (less well beyond 128 scales per
activation: 3 % at 4096); the two ends of the range are known exactly.

A dynamic NVFP4 input has a global scale that calibration must find: for it, every observer is minmax.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fewbit.calibration.float_histogram import FloatHistogram
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.numerics.grouping import Tiling
from fewbit.numerics.scales import GridRule, extremes, kept_ranks, unless_zero
from fewbit.numerics.search import PIECE, RangeSearch, joined
from fewbit.tensor import QuantizedActivation

WEIGHT = 0.01  # of the newest batch in moving averages
# Shares of the range that are tried: from √2 of it (a power of two may have to be the next one up) down to 1/256, then
# around the best. Heavy tails are clipped hard at few bits; the error of floats goes up and down within an octave.
OCTAVES = (*(0.5 - step / 16 for step in range(32)), *(-1.5 - step / 4 for step in range(27)))
FINER_OCTAVES = (1 / 8, 1 / 16, 1 / 32, 1 / 64)


class Observer(ABC):
    """Accumulates batches of one activation; see `make_observer`."""

    def __init__(self, spec: QuantizationSpec, dtype: torch.dtype = torch.float32) -> None:
        self.spec, self.dtype = spec, dtype
        self.low: Tensor | None = None
        """Lower end of the range so far, [tiles along rows, tiles along columns]; None before the first batch."""
        self.high: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        """Take a batch [..., channels] of any float dtype into account; an empty one changes nothing."""
        if x.numel() == 0:
            return
        # a dynamic spec finds the scales of its tiles later; only their global scale is observed
        tiling = Tiling(rows=0, columns=0) if self.spec.is_dynamic else self.spec.tiling
        tiles = tiling.split(x.detach().reshape(-1, x.shape[-1]).float())
        if self.low is not None and self.low.shape != tiles.shape[:-1]:
            raise CalibrationError(
                f"a batch of {tuple(x.shape)} has {tuple(tiles.shape[:-1])} scales, batches before it had "
                f"{tuple(self.low.shape)}; a static {self.spec.qscheme} scale needs batches of one width"
            )
        self.accumulate(tiles, *extremes(tiles))

    def accumulate(self, tiles: Tensor, low: Tensor, high: Tensor) -> None:
        """Take tiles [rows, columns, n] float32 and their range [rows, columns] into account."""
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def result(self, name: str = "an activation") -> QuantizedActivation:
        """What calibration found. CalibrationError, which names the activation, if there is nothing to go by. Tiles
        that were always zero (dead channels) get the range of the whole tensor."""
        unknown = "so its static scale is unknown; use other calibration data, is_dynamic=True, or exclude it"
        if self.low is None or self.high is None:
            raise CalibrationError(f"{name} saw no data in calibration, {unknown}")
        low, high = self.low, self.high
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise CalibrationError(f"{name} holds NaN or infinity in calibration; is the model damaged?")
        zero = (low == 0) & (high == 0)
        if bool(zero.all()):
            raise CalibrationError(f"{name} was zero throughout calibration, {unknown}")
        low, high = torch.where(zero, low.min(), low), torch.where(zero, high.max(), high)
        global_scale = self.spec.global_scale(torch.maximum(high, -low))
        if self.spec.is_dynamic:
            return QuantizedActivation(self.spec, global_scale=global_scale)
        rule = self.spec.grid_rule(self.spec.scale_format(self.dtype, global_scale))
        return QuantizedActivation(self.spec, *self.find(rule, low, high), global_scale)

    @abstractmethod
    def find(self, rule: GridRule, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scale and zero point given the range of all data."""


class MinMaxObserver(Observer):
    """The range of everything."""

    def find(self, rule: GridRule, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        return rule.from_range(low, high)


class MovingAverageObserver(MinMaxObserver):
    """The average of the batches' ranges, `weight` being that of the newest."""

    def __init__(self, spec: QuantizationSpec, dtype: torch.dtype = torch.float32, weight: float = WEIGHT) -> None:
        super().__init__(spec, dtype)
        self.weight = weight

    def accumulate(self, tiles: Tensor, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else self.low + self.weight * (low - self.low)
        self.high = high if self.high is None else self.high + self.weight * (high - self.high)


class HistogramObserver(Observer):
    """Base of those that need more than the range."""

    histogram: FloatHistogram
    count: int = 0
    """Values of each tile."""

    def accumulate(self, tiles: Tensor, low: Tensor, high: Tensor) -> None:
        super().accumulate(tiles, low, high)
        if not self.count:
            self.histogram = FloatHistogram(low.numel(), low.device)
        self.histogram.add(tiles.reshape(low.numel(), -1))
        self.count += tiles.shape[-1]


class PercentileObserver(HistogramObserver):
    """The range that holds `spec.percentile` percent of the values; everything where these are zeros alone."""

    def find(self, rule: GridRule, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        first, last = kept_ranks(self.count, rule.percentile, rule.symmetric)
        if rule.symmetric:
            top = self.histogram.magnitude_at(last).view_as(low)
            bottom = -top
        else:
            bottom = self.histogram.value_at(first, upper=False).view_as(low)
            top = self.histogram.value_at(last, upper=True).view_as(low)
        bottom, top = unless_zero(bottom, top, low, high)
        return rule.from_range(torch.maximum(bottom, low), torch.minimum(top, high))


class LeastErrorObserver(HistogramObserver):
    """The range with the least squared error."""

    def find(self, rule: GridRule, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        points, counts = self.histogram.points()
        block = rule.scale.block
        at_once = block * max(1, PIECE // max(1, block * points.numel()))
        parts = (x.split(at_once) for x in (low.flatten(), high.flatten(), counts))
        stored, zero = joined([_least_error(rule, points, *part) for part in zip(*parts, strict=True)])
        return stored.view_as(low), None if zero is None else zero.view_as(low)


def _least_error(
    rule: GridRule, points: Tensor, low: Tensor, high: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Stored scale [tiles] and zero point of the range, within [low, high] [tiles], that has the least squared error
    of the points [n], which stand for `counts` [tiles, n] values each. Never worse than the whole range."""
    # no value lies outside the range, whatever the width of the bins at its ends
    tiles = points.expand(low.numel(), -1).clamp(low.unsqueeze(-1), high.unsqueeze(-1))
    best = RangeSearch(rule, low, high, lambda scale, zero: rule.error(tiles, scale, zero, counts))
    best.sweep([2**octaves for octaves in OCTAVES])
    for step in FINER_OCTAVES:
        around_low, around_high = best.share_low, best.share_high
        for factor in (2**-step, 2**step):
            best.shrink(around_low * factor, around_high * factor)
            if not rule.symmetric:
                best.shrink(around_low * factor, around_high)
                best.shrink(around_low, around_high * factor)
    return rule.scale.store(best.value), best.zero


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving-average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "histogram": LeastErrorObserver,
    "mse": LeastErrorObserver,
}


def make_observer(spec: QuantizationSpec, dtype: torch.dtype = torch.float32) -> Observer:
    """The observer that `spec` asks for, in a model whose weights (and so the scales) are of `dtype`. ConfigError if
    the spec needs no data, or its observer is for weights."""
    if not spec.needs_data:
        raise ConfigError(f"an activation of {spec.dtype} with is_dynamic={spec.is_dynamic} has nothing to calibrate")
    if spec.is_dynamic:
        return MinMaxObserver(spec, dtype)
    if spec.observer not in OBSERVERS:
        raise ConfigError(f"observer {spec.observer} is for weights; static activations take {', '.join(OBSERVERS)}")
    return OBSERVERS[spec.observer](spec, dtype)
