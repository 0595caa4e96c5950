"""Round to nearest: every weight goes to the nearest code of its group's grid.

The only choice is the grid. With the spec's scale_rule "search" it is the one with the least squared error, each
column weighted by diag(H) = Σ x² of its input (all columns alike without calibration data).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.algorithms.outcome import Outcome
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import scales
from fewbit.tensor import quantize


def rtn(weight: Tensor, moment: Tensor | None, spec: QuantizationSpec, scale_dtype: torch.dtype) -> Outcome:
    """Quantize `weight` [out, in] float32; `moment` is H = XᵀX [in, in] float32 or None."""
    importance = None
    if moment is not None:
        importance = spec.tiling.split(moment.diagonal().expand_as(weight))
    scale, zero = scales.find_scale(
        spec.tiling.split(weight),
        spec.format,
        scale_dtype,
        rule=spec.scale_rule,
        symmetric=spec.symmetric,
        importance=importance,
    )
    return Outcome(quantize(weight, spec, scale, zero))
