"""Clipping: each group of a weight is cut to the range whose grid costs the output least.

The second half of AWQ (Lin et al. 2023, arXiv:2306.00978). A narrower range has a finer grid; what lies outside pays.
With Δ = Q(W) − W of a group and its block H_gg of H = XᵀX, the error is Δ H_gg Δᵀ: what the other groups do to the
same output is left out, so all groups are searched at once.
"""

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import scales
from fewbit.numerics.scale_format import ScaleFormat
from fewbit.numerics.search import RangeSearch

SHARES = tuple(1.0 - 0.05 * step for step in range(1, 11))  # of the range
ELEMENTS = 2**21  # weights that are worked on at a time


def clip(weight: Tensor, moment: Tensor, spec: QuantizationSpec, scale: ScaleFormat) -> Tensor:
    """The weight [out, in] float32, clipped; `moment` is H [in, in] float32 of its input. Weights whose rows share a
    scale, or whose blocks are cut at the edge, come back as they are. This is for observers that take the range as
    they find it (minmax); "search" and GPTQ choose ranges themselves."""
    tile_rows, columns = spec.tiling.tile(*weight.shape)
    if tile_rows > 1 or spec.format.is_cast or weight.shape[1] % columns:
        return weight
    blocks = torch.stack([moment[at : at + columns, at : at + columns] for at in range(0, weight.shape[1], columns)])
    rows_at_once = max(1, ELEMENTS // weight.shape[1])
    return torch.cat([_clipped(part, blocks, spec, scale) for part in weight.split(rows_at_once)])


def _clipped(weight: Tensor, blocks: Tensor, spec: QuantizationSpec, scale: ScaleFormat) -> Tensor:
    """`clip` of some rows; `blocks` [groups, columns, columns] of H."""
    tiles = weight.unflatten(1, (blocks.shape[0], -1)).transpose(0, 1)  # [groups, rows, columns]
    low, high = scales.extremes(tiles)
    low, high = low.T.clamp(max=0), high.T.clamp(min=0)  # [rows, groups], as scales are stored
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high

    def cost(scale_value: Tensor, zero: Tensor | None) -> Tensor:
        zero = None if zero is None else zero.T
        delta = scales.fake_quantize(tiles, scale_value.T, zero, spec.format, spec.round_method).sub_(tiles)
        return torch.bmm(delta, blocks).mul_(delta).sum(-1).T

    best = RangeSearch(spec.grid_rule(scale), low, high, cost)
    best.sweep(SHARES)
    ends = ((share * end).T.unsqueeze(-1) for share, end in ((best.share_low, low), (best.share_high, high)))
    clipped: Tensor = tiles.clamp(*ends)
    return clipped.transpose(0, 1).flatten(1)
