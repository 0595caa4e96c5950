"""Methods, one file each. `quantize_weight` hands a stage's weights to the one that the options name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fewbit.algorithms.gptq import gptq
from fewbit.algorithms.outcome import Outcome
from fewbit.algorithms.rtn import rtn
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import CodeConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import ScaleFormat

CodeFinder = Callable[[Tensor, Statistics, QuantizationSpec, ScaleFormat, Any], Outcome | None]
"""(weight [out, in] float32, statistics of its input, spec, scale format, options) → codes, or None if it failed."""

# By the name of their options
CODE_FINDERS: dict[str, CodeFinder] = {
    "rtn": lambda weight, statistics, spec, scale, options: rtn(weight, statistics.moment, spec, scale),
    "gptq": lambda weight, statistics, spec, scale, options: gptq(
        weight, statistics.moment, spec, scale, options, statistics.drift
    ),
}


def quantize_weight(
    weight: Tensor, statistics: Statistics | None, spec: QuantizationSpec, scale: ScaleFormat, algorithm: CodeConfig
) -> Outcome:
    """Quantize `weight` [out, in] float32 given the statistics of its input (None if no token was seen). Where a
    method needs tokens and saw none, or fails, weights are rounded to nearest, and the outcome says so."""
    moment = statistics.moment if statistics is not None else None
    if spec.format.is_cast or (statistics is None and not algorithm.needs.moment):
        return rtn(weight, moment, spec, scale)
    found, reason = None, "round to nearest: no token reached it"
    if statistics is not None:
        found = CODE_FINDERS[algorithm.name](weight, statistics, spec, scale, algorithm)
        reason = "round to nearest: H could not be factored, not even damped and in float64"
    return found or replace(rtn(weight, moment, spec, scale), fallback=reason)
