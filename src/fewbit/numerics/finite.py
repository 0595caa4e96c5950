"""Whether numbers are numbers."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape, which is not empty, holds neither NaN nor infinity; float16 and wider."""
    low, high = tensor.aminmax()  # both are NaN if any element is
    return bool(torch.isfinite(low) and torch.isfinite(high))
