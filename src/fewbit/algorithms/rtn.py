"""Round to nearest: every weight goes to the nearest code of its group's grid.

The only choice is the grid. The observer "search" takes the one with the least squared error, each column weighted by
diag(H) = Σ x² of its input, slightly damped (all columns alike without calibration data).
"""

from torch import Tensor

from fewbit.algorithms.outcome import Outcome
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import ScaleFormat
from fewbit.numerics.second_moment import importance
from fewbit.tensor import round_to_nearest


def rtn(weight: Tensor, moment: Tensor | None, spec: QuantizationSpec, scale: ScaleFormat) -> Outcome:
    """Quantize `weight` [out, in] float32; `moment` is H = XᵀX [in, in] float32 or None."""
    return Outcome(round_to_nearest(weight, spec, scale, None if moment is None else importance(moment)))
