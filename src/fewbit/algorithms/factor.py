"""The damped inverse of H that GPTQ's loop needs, for columns in some order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.numerics.cholesky import inverse_cholesky

DAMPING_STEPS = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Factor:
    """The damped inverse of H for columns in some order: column k of the loop is column order[k] of the weight."""

    order: Tensor
    update: Tensor
    """Rows of U divided by their diagonal: what the error of a column does to later ones."""
    precision: Tensor
    """1/U_jj²: what a squared error of column j costs once later columns have made up for it."""
    damping: float

    @property
    def cost(self) -> Tensor:
        """`precision` in the order of the weight's columns. (diag(H) is what an error costs that no column makes
        up for.)"""
        return torch.empty_like(self.precision).index_copy_(0, self.order, self.precision)


def column_order(diagonal: Tensor, group: int, order: str) -> Tensor:
    """Order in which columns are quantized [in], given diag(H): the costliest to get wrong first."""
    if order == "none":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    if order == "activation":
        return diagonal.argsort(descending=True, stable=True)
    if diagonal.numel() % group:  # the last group of blocks may be partial: no order of whole groups exists
        return torch.arange(diagonal.numel(), device=diagonal.device)
    by_group = diagonal.view(-1, group)
    groups = by_group.mean(1).argsort(descending=True, stable=True)
    inside = by_group[groups].argsort(dim=1, descending=True, stable=True)
    return (groups.unsqueeze(1) * group + inside).flatten()


def factored(moment: Tensor, group: int, order_name: str, damping: float) -> Factor | None:
    """H [in, in], damped and inverted for columns in the named order; None if it cannot be factored at all."""
    order = column_order(moment.diagonal(), group, order_name)
    found = inverse_factor(moment, order, damping)
    if found is None:
        return None
    upper, used = found
    diagonal = upper.diagonal().clone()
    return Factor(order, upper.div_(diagonal.unsqueeze(1)), diagonal.square_().reciprocal_(), used)


def inverse_factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Upper triangular U with (H + damping · mean(diag H) · I)⁻¹ = UᵀU for H in `order`, and the damping it took.

    With J the reversal of rows and columns, J H J = L Lᵀ gives H⁻¹ = (J L⁻¹ J)ᵀ (J L⁻¹ J): one Cholesky factor and one
    triangular inverse. Damping grows tenfold while that fails; then float64 is tried; then None is returned.
    """
    mean = float(moment.diagonal().mean(dtype=torch.float64))
    if not mean > 0:
        return None
    reverse = order.flip(0)
    for dtype in (torch.float32, torch.float64):
        for step in DAMPING_STEPS:
            reversed_moment = moment[reverse][:, reverse].to(dtype)
            reversed_moment.diagonal().add_(damping * step * mean)
            inverse = inverse_cholesky(reversed_moment)
            if inverse is not None:
                return inverse.flip(0, 1).float(), damping * step
    return None
