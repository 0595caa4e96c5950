"""Products of float32 matrices on the CPU by oneDNN instead of MKL.

torch hands dense float32 products to MKL, which on some processors reaches half of what they can do. A convolution
with a 1 × 1 kernel is the same product, and torch hands that to oneDNN; in the channels-last layout the matrices are
used as they lie, without a copy. Measured by benchmarks/linear_speed.py.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

ROWS_WORTH_IT = 64
WIDTHS = (64, 32, 16, 8, 4, 2, 1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] · weightᵀ [out, in] → [rows, out], in x's dtype."""
    if has_torch_function_unary(x):  # a mode that looks on sees one product
        looked_on: Tensor = handle_torch_function(linear, (x,), x, weight)
        return looked_on
    rows, columns = x.shape
    suited = x.device.type == "cpu" and x.dtype == torch.float32 and columns > 0 and rows >= ROWS_WORTH_IT
    if not suited or not torch.backends.mkldnn.is_available():
        return torch.nn.functional.linear(x, weight)
    width = next(width for width in WIDTHS if rows % width == 0)  # the rows as an image, which may have any shape
    image = x.reshape(1, rows // width, width, columns).permute(0, 3, 1, 2)
    product = torch.nn.functional.conv2d(image, weight.contiguous().view(-1, columns, 1, 1))
    return product.permute(0, 2, 3, 1).reshape(rows, -1)
