"""Whether numbers are numbers."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape holds neither NaN nor infinity; float16 and wider."""
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # both are NaN if any element is
    return bool(torch.isfinite(low) and torch.isfinite(high))
