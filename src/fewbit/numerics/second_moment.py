"""H = XᵀX: the one statistic that GPTQ, weighted scale search and exact layer losses need."""

import torch
from torch import Tensor

from fewbit.numerics import matmul

# XᵀX is symmetric, so only tiles on and above the diagonal are computed: of t tiles a share of (t+1)/2t of the full
# product. Narrower tiles save more but multiply less efficiently.
TILES = 8
NARROWEST, WIDEST = 192, 768


def accumulate(moment: Tensor, x: Tensor) -> None:
    """moment += xᵀx in place, upper tiles only; call `symmetrize` once at the end. `moment` [channels, channels] and
    `x` [tokens, channels] are float32 on one device."""
    channels = x.shape[1]
    columns = x.T.contiguous()  # [channels, tokens]
    width = tile_width(channels)
    for start in range(0, channels, width):
        moment[start : start + width, start:] += matmul.linear(columns[start : start + width], columns[start:])


def tile_width(channels: int) -> int:
    """Columns of one tile of an H [channels, channels]."""
    return min(max(channels // TILES, NARROWEST), WIDEST)


def accumulate_product(product: Tensor, x: Tensor, y: Tensor) -> None:
    """product += xᵀy in place; [channels of x, channels of y] float32, x and y [tokens, channels]."""
    product += matmul.linear(x.T.contiguous(), y.T.contiguous())


def symmetrize(moment: Tensor) -> Tensor:
    """Mirror the upper triangle into the lower one, in place."""
    channels = moment.shape[0]
    width = tile_width(channels)
    for start in range(0, channels, width):
        stop = min(start + width, channels)
        tile = moment[start:stop, start:stop]
        tile.copy_(torch.triu(tile) + torch.triu(tile, 1).T)
        moment[stop:, start:stop] = moment[start:stop, stop:].T
    return moment


def quadratic_form(delta: Tensor, moment: Tensor) -> Tensor:
    """δ H δᵀ of each row: the squared output error of `delta` [rows, channels]. Returns float64 [rows]."""
    rows_at_once = max(1, 2**25 // delta.shape[1])  # 128 MB of float32 at a time
    parts = [matmul.linear(part, moment).mul_(part).sum(-1, dtype=torch.float64) for part in delta.split(rows_at_once)]
    return torch.cat(parts)


def importance(moment: Tensor) -> Tensor:
    """What a squared error of each weight's column costs, [in]: diag(H), damped as in GPTQ by 1 % of its mean, since
    channels that calibration hardly saw are not free."""
    diagonal = moment.diagonal()
    return diagonal + 0.01 * diagonal.mean()
