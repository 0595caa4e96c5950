"""The inverse Cholesky factor L⁻¹ of A = LLᵀ, made of matrix products.

LAPACK reaches a tenth of what products reach on the processors we measured. Halving A leaves little else to do:

    A = [[P, Qᵀ], [Q, R]]     L₁⁻¹ of P,   M = Q L₁⁻ᵀ,   L₂⁻¹ of R − MMᵀ,   L⁻¹ = [[L₁⁻¹, 0], [−L₂⁻¹ M L₁⁻¹, L₂⁻¹]]
"""

import torch
from torch import Tensor

from fewbit.numerics.matmul import linear

LEAF = 192  # rows up to which LAPACK is as fast


def inverse_cholesky(matrix: Tensor) -> Tensor | None:
    """L⁻¹ [n, n] of a matrix, of which the lower triangle is read, in its dtype; None if it is not definite."""
    n = matrix.shape[0]
    if n <= LEAF or matrix.dtype != torch.float32:
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
            return None
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False, out=identity)
        return solved
    half = n // 2
    first = inverse_cholesky(matrix[:half, :half])
    if first is None:
        return None
    below = linear(matrix[half:, :half].contiguous(), first)  # Q L₁⁻ᵀ
    second = inverse_cholesky(matrix[half:, half:] - linear(below, below))
    if second is None:
        return None
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = first
    inverse[half:, half:] = second
    between = linear(second, below.T.contiguous())  # L₂⁻¹ M
    inverse[half:, :half] = linear(between, first.T.contiguous()).neg_()
    return inverse
