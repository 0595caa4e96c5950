"""ONE reshape rule for every granularity: a tensor is cut into equal tiles and each tile has one scale.

per-tensor is a tile as large as the tensor, per-channel and per-token a whole row, per-group a piece of a row,
2-D block a rectangle. Scales of x [..., rows, columns] always have shape [..., rows/tile_rows, columns/tile_columns].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tile size of a matrix's last two axes. 0 stands for "the whole axis"."""

    rows: int = 1
    columns: int = 0

    def tile(self, rows: int, columns: int) -> tuple[int, int]:
        """Concrete tile size for a matrix of this size; ValueError if the tiles do not cover it exactly."""
        tile_rows, tile_columns = self.rows or rows, self.columns or columns
        if rows % tile_rows or columns % tile_columns:
            raise ValueError(f"tiles of {tile_rows} × {tile_columns} do not divide a matrix of {rows} × {columns}")
        return tile_rows, tile_columns

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`."""
        tile_rows, tile_columns = self.tile(shape[-2], shape[-1])
        return (*shape[:-2], shape[-2] // tile_rows, shape[-1] // tile_columns)

    def split(self, x: Tensor) -> Tensor:
        """[..., R, C] → [..., R/r, C/c, r·c]: the last axis holds what shares a scale. A view where r is 1."""
        rows, columns = x.shape[-2:]
        r, c = self.tile(rows, columns)
        tiles = x.reshape(*x.shape[:-2], rows // r, r, columns // c, c)
        return tiles.transpose(-3, -2).reshape(*x.shape[:-2], rows // r, columns // c, r * c)

    def merge(self, tiles: Tensor, rows: int, columns: int) -> Tensor:
        """Inverse of `split`: [..., R/r, C/c, r·c] → [..., R, C]."""
        r, c = self.tile(rows, columns)
        x = tiles.reshape(*tiles.shape[:-3], rows // r, columns // c, r, c)
        return x.transpose(-3, -2).reshape(*tiles.shape[:-3], rows, columns)

    def expand(self, scale: Tensor, rows: int, columns: int) -> Tensor:
        """Scales [..., R/r, C/c] → one per element [..., R, C]."""
        r, c = self.tile(rows, columns)
        return scale.repeat_interleave(r, -2).repeat_interleave(c, -1)
