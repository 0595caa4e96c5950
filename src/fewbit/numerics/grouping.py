"""ONE reshape rule for every granularity: a tensor is cut into equal tiles and each tile has one scale.

per-tensor is a tile as large as the tensor, per-channel and per-token a whole row, per-group a piece of a row,
2-D block a rectangle. Scales of x [..., rows, columns] always have shape [..., rows/tile_rows, columns/tile_columns].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tile size of a matrix's last two axes, 0 being the whole axis. Tiles have to cover the matrix exactly, unless
    `partial` allows tiles at the lower and right edges that are not full, as FP8 blocks of 128 × 128 have them."""

    rows: int = 1
    columns: int = 0
    partial: bool = False
    block: int = 1
    """Tiles along a row that belong together (the pairs of a microexponent's 16): a row has whole blocks of them."""

    @property
    def span(self) -> int:
        """What the number of columns must be a multiple of; 0 if any number is whole."""
        return self.columns * self.block

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Concrete tile size for a matrix of this size; ValueError if the tiles do not cover it exactly."""
        tile_rows, tile_columns = self.rows or rows, self.columns or columns
        span = self.span or columns
        if not self.partial and (rows % tile_rows or columns % span):
            raise ValueError(f"tiles of {tile_rows} × {span} do not divide a matrix of {rows} × {columns}")
        return tile_rows, tile_columns

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        tile_rows, tile_columns = self.tile(shape[-2], shape[-1])
        return (*shape[:-2], -(-shape[-2] // tile_rows), -(-shape[-1] // tile_columns))

    def split(self, x: Tensor) -> Tensor:
        """[..., R, C] → [..., R/r, C/c, r·c]: the last axis holds what shares a scale. A view where r is 1. Partial
        tiles are filled up with zeros."""
        rows, columns = x.shape[-2:]
        r, c = self.tile(rows, columns)
        if rows % r or columns % c:
            x = torch.nn.functional.pad(x, (0, -columns % c, 0, -rows % r))
        *above, down, across = self.scale_shape((*x.shape[:-2], rows, columns))
        tiles = x.reshape(*above, down, r, across, c)
        return tiles.transpose(-3, -2).reshape(*above, down, across, r * c)

    def pieces(self, rows: int, columns: int, elements: int) -> Iterator[tuple[slice, slice]]:
        """Slices of a matrix's rows with some `elements` each, and those of the rows of their scales. (What is done
        element by element takes a third of the time in pieces that fit the cache.)"""
        tile_rows = self.rows or 1
        at_once = tile_rows * max(1, elements // (columns * tile_rows)) if columns else rows
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            yield slice(start, stop), slice(start // tile_rows, -(-stop // tile_rows)) if self.rows else slice(0, 1)

    def merge(self, tiles: Tensor, rows: int, columns: int) -> Tensor:
        """Inverse of `split`: [..., R/r, C/c, r·c] → [..., R, C]."""
        r, c = self.tile(rows, columns)
        *above, down, across, _ = tiles.shape
        x = tiles.reshape(*above, down, across, r, c).transpose(-3, -2).reshape(*above, down * r, across * c)
        return x if x.shape[-2:] == (rows, columns) else x[..., :rows, :columns].contiguous()
