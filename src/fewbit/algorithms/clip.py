"""Clipping: each group of a weight is cut to the range whose grid costs the output least.

The second half of AWQ (Lin et al. 2023, arXiv:2306.00978). A narrower range has a finer grid; what lies outside pays.
With Δ = Q(W) − W of a group and its block H_gg of H = XᵀX, the error is Δ H_gg Δᵀ: what the other groups do to the
same output is left out, so all groups are searched at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import scales
from fewbit.numerics.scale_format import ScaleFormat

SHARES = tuple(1.0 - 0.05 * step for step in range(11))  # of the range
ELEMENTS = 2**21  # weights that are worked on at a time


def clip(weight: Tensor, moment: Tensor, spec: QuantizationSpec, scale: ScaleFormat) -> Tensor:
    """The weight [out, in] float32, clipped; `moment` is H [in, in] float32 of its input.

    Symmetric grids shrink both ends alike, affine grids also each end on its own. Weights whose rows share a scale
    come back as they are. This is for observers that take the range as they find it (minmax); "search" and GPTQ
    choose ranges themselves.
    """
    tile_rows, columns = spec.tiling.tile(*weight.shape)
    if tile_rows > 1 or spec.format.is_cast:
        return weight
    blocks = torch.stack([moment[at : at + columns, at : at + columns] for at in range(0, weight.shape[1], columns)])
    rows_at_once = max(1, ELEMENTS // weight.shape[1])
    return torch.cat([_clipped(part, blocks, spec, scale) for part in weight.split(rows_at_once)])


def _clipped(weight: Tensor, blocks: Tensor, spec: QuantizationSpec, scale: ScaleFormat) -> Tensor:
    """`clip` of some rows; `blocks` [groups, columns, columns] of H."""
    rule = spec.grid_rule(scale)
    tiles = weight.unflatten(1, (blocks.shape[0], -1)).transpose(0, 1)  # [groups, rows, columns]
    low, high = tiles.aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = [torch.ones_like(low), torch.ones_like(high)]
    least = torch.full_like(low, torch.inf)

    def consider(share_low: Tensor, share_high: Tensor) -> None:
        nonlocal least
        stored, zero = rule.from_range(share_low * low, share_high * high)
        delta = scales.fake_quantize(tiles, scale.value(stored), zero, spec.format, spec.round_method).sub_(tiles)
        error = torch.bmm(delta, blocks).mul_(delta).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        for end, share in enumerate((share_low, share_high)):
            best[end] = torch.where(better, share, best[end])

    for share in SHARES:
        consider(torch.full_like(low, share), torch.full_like(high, share))
    if not spec.symmetric:
        for share in SHARES:
            consider(torch.full_like(low, share), best[1])
        for share in SHARES:
            consider(best[0], torch.full_like(high, share))
    limits = [(share * end).unsqueeze(-1) for share, end in zip(best, (low, high), strict=True)]
    clipped: Tensor = tiles.clamp(*limits)
    return clipped.transpose(0, 1).flatten(1)
