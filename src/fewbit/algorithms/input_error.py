"""What quantizing an input costs the output, estimated on some of its tokens.

Rounding of activations depends on the single token and cannot be had from H. A dynamic input has the range of the
token (or group) at hand, so every token that was kept tells its own error. A static one has a range that was found on
other tokens than it will meet; the more alike the channels have been made on those, the more channels can exceed it.
Scored on the tokens it was found on, such a scale looks several times better than it is. So the tokens are dealt to a
few parts: for each part, channel scale and range are found on the others.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.calibration.observers import make_observer
from fewbit.calibration.statistics import Statistics
from fewbit.config.spec import ACCUMULATING_OBSERVERS, QuantizationSpec
from fewbit.tensor import QuantizedActivation

PARTS = 4
MIX = -7046029254386353131  # odd: spreads the sums of bit patterns over all bits


@dataclass(frozen=True)
class Scored:
    """Tokens [tokens, in] whose error is measured, and those that a static range is found on."""

    tokens: Tensor
    stands_for: Tensor
    """[tokens] weight of each token's squared error."""
    spec: QuantizationSpec
    fitted: Tensor | None = None
    """[other tokens, in]; None where ranges are dynamic."""

    def deviation(self, scale: Tensor) -> Tensor:
        """e = Q(x/s) − x/s of the tokens [tokens, in], s [in]."""
        scaled, known = self.tokens / scale, QuantizedActivation(self.spec)
        if self.fitted is not None:
            observer = make_observer(self.spec)
            observer(self.fitted / scale)
            known = observer.result()
        quantized = _fake_quantized(scaled, known)
        if self.spec.residual:
            quantized = quantized + _fake_quantized(scaled - quantized, known)
        return quantized.sub_(scaled)


def scored_tokens(statistics: Statistics, spec: QuantizationSpec | None) -> list[Scored]:
    """The sample and the largest tokens, each with its weight: how many it stands for, relative to its own size (a
    block's addition to a token is normalized by that before it is read; else a few huge tokens would decide alone).
    PARTS for a static input, one set for a dynamic one; none if none were kept."""
    sample, outliers = statistics.sample, statistics.outliers
    if spec is None or sample is None:
        return []
    weights = torch.full((sample.shape[0],), statistics.tokens / sample.shape[0], device=sample.device)
    if outliers is not None:
        sample = torch.cat([sample, outliers])
        weights = torch.cat([weights, torch.ones(outliers.shape[0], device=sample.device)])
    energy = sample.square().sum(1)
    mean = (energy * weights).sum() / weights.sum()
    weights = weights * mean / energy.clamp(min=1e-6 * mean + torch.finfo(torch.float32).tiny)
    quick = "minmax" if spec.observer in (*ACCUMULATING_OBSERVERS, "mse") else spec.observer
    if not spec.is_dynamic:
        spec, part = replace(spec, observer=quick), _parts(sample)
        parts = [part == number for number in range(PARTS)]
        if all(bool(sample[~chosen].any()) for chosen in parts):
            return [Scored(sample[chosen], weights[chosen], spec, sample[~chosen]) for chosen in parts]
    return [Scored(sample, weights, replace(spec, is_dynamic=True, observer=quick))]


def _fake_quantized(x: Tensor, known: QuantizedActivation) -> Tensor:
    """Scales are float32 where the spec leaves their dtype to the checkpoint; the global scale of a dynamic input is
    that of the tokens at hand."""
    spec = known.spec
    global_scale = spec.global_scale(x) if spec.is_dynamic else known.global_scale
    return known.fake_quantize(x, spec.scale_format(torch.float32, global_scale))


def _parts(tokens: Tensor) -> Tensor:
    """The part of each token [tokens], by what it holds: the same token is always in the same part."""
    pattern = tokens.contiguous().view(torch.int32).sum(1, dtype=torch.int64)
    return ((pattern * MIX) >> 61) & (PARTS - 1)
