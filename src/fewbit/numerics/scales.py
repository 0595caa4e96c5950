"""How the scale of a group is found. Every rule returns the scale as it will be STORED (rounded to `dtype`).

All rules work on tiles [..., n] (the last axis shares a scale, see grouping.py) and return one scale, and for affine
grids one integer zero point, per tile. A group of zeros gets the scale 1, so that nothing divides by zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.numerics.formats import NumberFormat

# Shrink factors of the search, relative to the scale at which the largest magnitude just reaches the end of the grid.
# Below 1 the largest values are clipped; slightly above 1 the grid is stretched, which pays off when few matter.
SHRINK_FACTORS = tuple(1.05 - 0.05 * step for step in range(12))  # 1.05 … 0.5
PIECE = 2**17  # elements scored at a time


def store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a scale to its stored dtype; where that leaves zero (or there was nothing to scale), 1 takes its place."""
    stored = scale.to(dtype)
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def amax(tiles: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> Tensor:
    """Symmetric: the largest magnitude maps to the middle of ±2^(b−1): amax / ((2^b − 1) / 2).

    The convention of compressed-tensors: both ends of the two's complement range are used, one of them half a step
    beyond the other.
    """
    return store(tiles.abs().amax(-1).float() / ((2**fmt.bits - 1) / 2), dtype)


def signed_max(tiles: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> Tensor:
    """Symmetric: the element of largest magnitude maps to −2^(b−1), so the scale is negative if it is positive.

    The other side of the grid then ends at 2^(b−1) − 1 steps: the full range is used without clipping the largest.
    """
    low, high = tiles.aminmax(dim=-1)
    extreme = torch.where(high > -low, high, low).float()
    return store(extreme / fmt.smallest, dtype)


def affine(tiles: Tensor, fmt: NumberFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Affine: the range, widened to include 0, maps to all 2^b codes. Returns scale and zero point (code dtype)."""
    low, high = tiles.aminmax(dim=-1)
    scale = store((high.clamp(min=0).float() - low.clamp(max=0).float()) / (2**fmt.bits - 1), dtype)
    return scale, zero_point(low.clamp(max=0), scale, fmt)


def zero_point(low: Tensor, scale: Tensor, fmt: NumberFormat) -> Tensor:
    """The code that stands for 0 when `low` maps to the smallest code."""
    return fmt.encode(fmt.smallest - low.float() / scale.float())


def search_symmetric(tiles: Tensor, fmt: NumberFormat, dtype: torch.dtype, importance: Tensor | None = None) -> Tensor:
    """The signed scale with the least Σ importance·(x̂ − x)² among both signs and all SHRINK_FACTORS.

    Args:
        tiles: [..., n] float32.
        importance: weight of each element's squared error, broadcastable to `tiles` (diag(H) for a linear's weight);
            None weighs all alike.
    """
    magnitude = tiles.abs().amax(-1).float()
    best = signed_max(tiles, fmt, dtype)
    best_error = grid_error(tiles, best, None, fmt, importance)
    for end in (fmt.smallest, fmt.largest):  # the largest magnitude, if positive, goes to this end of the grid
        for factor in SHRINK_FACTORS:
            candidate = store(factor * magnitude / end, dtype)
            error = grid_error(tiles, candidate, None, fmt, importance)
            better = error < best_error
            best = torch.where(better, candidate, best)
            best_error = torch.where(better, error, best_error)
    return best


def search_affine(
    tiles: Tensor, fmt: NumberFormat, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least weighted squared error when both ends of the range shrink together.

    Arguments as for `search_symmetric`.
    """
    low, high = tiles.aminmax(dim=-1)
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    best, best_zero = affine(tiles, fmt, dtype)
    best_error = grid_error(tiles, best, best_zero, fmt, importance)
    for factor in SHRINK_FACTORS:
        candidate = store(factor * (high - low) / (2**fmt.bits - 1), dtype)
        zero = zero_point(factor * low, candidate, fmt)
        error = grid_error(tiles, candidate, zero, fmt, importance)
        better = error < best_error
        best, best_zero = torch.where(better, candidate, best), torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best, best_zero


def find_scale(
    tiles: Tensor,
    fmt: NumberFormat,
    dtype: torch.dtype,
    *,
    rule: str,
    symmetric: bool,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None when symmetric) of each tile by a rule's name: search, minmax or signed-max."""
    if rule == "search":
        return _search_in_pieces(tiles, fmt, dtype, symmetric, importance)
    if not symmetric:
        return affine(tiles, fmt, dtype)
    return (signed_max if rule == "signed-max" else amax)(tiles, fmt, dtype), None


def _search_in_pieces(
    tiles: Tensor, fmt: NumberFormat, dtype: torch.dtype, symmetric: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The search over some rows at a time, so that dozens of candidates are scored in the cache."""
    weights = None if importance is None else importance.expand_as(tiles)
    at_once = max(1, PIECE * tiles.shape[0] // max(1, tiles.numel()))
    found_scales, found_zeros = [], []
    for start in range(0, tiles.shape[0], at_once):
        piece = tiles[start : start + at_once]
        weight = None if weights is None else weights[start : start + at_once]
        if symmetric:
            found_scales.append(search_symmetric(piece, fmt, dtype, weight))
        else:
            scale, zero = search_affine(piece, fmt, dtype, weight)
            found_scales.append(scale)
            found_zeros.append(zero)
    return torch.cat(found_scales), None if symmetric else torch.cat(found_zeros)


def encode(tiles: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> Tensor:
    """Codes of `tiles` [..., n] on the grid of their scale [...] and zero point [...]."""
    steps = tiles.float() / scale.float().unsqueeze(-1)
    if zero is not None:  # the zero point is an integer: adding it before or after rounding is the same but for ties
        steps = steps.round_().add_(zero.unsqueeze(-1))
    return fmt.encode(steps)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat) -> Tensor:
    """Values (float32) of codes [..., n] with scales and zero points [...]."""
    steps = fmt.decode(codes)
    if zero is not None:
        steps -= zero.unsqueeze(-1)
    return steps.mul_(scale.float().unsqueeze(-1))


def grid_error(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, fmt: NumberFormat, importance: Tensor | None
) -> Tensor:
    """Weighted squared error of each tile when its elements go to the nearest point of its grid: float32 [...]."""
    steps = tiles * scale.float().reciprocal().unsqueeze(-1)
    if zero is None:
        values = steps.round_().clamp_(fmt.smallest, fmt.largest)
    else:
        offset = zero.float().unsqueeze(-1)
        values = steps.round_().add_(offset).clamp_(fmt.smallest, fmt.largest).sub_(offset)
    error = values.mul_(scale.float().unsqueeze(-1)).sub_(tiles).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)
