"""Methods, one file each. `quantize_weight` dispatches on the algorithm's configuration."""

from __future__ import annotations

from torch import Tensor

from fewbit.algorithms.gptq import gptq
from fewbit.algorithms.outcome import Outcome
from fewbit.algorithms.rtn import rtn
from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import CodeConfig, RTNConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import ScaleFormat


def quantize_weight(
    weight: Tensor,
    statistics: Statistics | None,
    spec: QuantizationSpec,
    scale: ScaleFormat,
    algorithm: CodeConfig,
) -> Outcome:
    """Quantize `weight` [out, in] float32 given the statistics of its input (None if no token was seen).

    Only GPTQ needs H: without it, it falls back to round-to-nearest, and the outcome says so.
    """
    moment = statistics.moment if statistics is not None else None
    if isinstance(algorithm, RTNConfig) or spec.format.is_cast:
        return rtn(weight, moment, spec, scale)
    if statistics is None:
        return Outcome(rtn(weight, None, spec, scale).weight, fallback="round to nearest: no token reached it")
    outcome = gptq(weight, statistics.moment, spec, scale, algorithm, statistics.drift)
    if outcome is None:
        reason = "round to nearest: H could not be factored, not even damped and in float64"
        return Outcome(rtn(weight, moment, spec, scale).weight, fallback=reason)
    return outcome
