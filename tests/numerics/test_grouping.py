import pytest
import torch

from fewbit.numerics.grouping import Tiling

TENSOR, CHANNEL = Tiling(0, 0), Tiling(1, 0)
CASES = [  # tiling, rows, columns, tile it means
    pytest.param(TENSOR, 6, 8, (6, 8), id="per-tensor"),
    pytest.param(CHANNEL, 6, 8, (1, 8), id="per-channel"),
    pytest.param(Tiling(1, 4), 6, 8, (1, 4), id="per-group"),
    pytest.param(Tiling(2, 4), 6, 8, (2, 4), id="block"),
    pytest.param(Tiling(3, 3), 3, 9, (3, 3), id="square-block"),
    pytest.param(Tiling(0, 2), 6, 8, (6, 2), id="columns"),
    pytest.param(Tiling(1, 1), 2, 3, (1, 1), id="per-element"),
]
LEADING = pytest.mark.parametrize("leading", [(), (2,), (3, 2)], ids=["matrix", "batch", "two-batch-axes"])


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


@LEADING
@pytest.mark.parametrize(("tiling", "rows", "columns", "tile"), CASES)
class TestEveryGranularity:
    def test_merge_undoes_split(self, tiling, rows, columns, tile, leading):
        x = numbered(*leading, rows, columns)
        assert torch.equal(tiling.merge(tiling.split(x), rows, columns), x)

    def test_each_tile_holds_its_rectangle_of_the_matrix(self, tiling, rows, columns, tile, leading):
        r, c = tile
        x = numbered(*leading, rows, columns)
        tiles = tiling.split(x)
        for i in range(rows // r):
            for j in range(columns // c):
                rectangle = x[..., i * r : (i + 1) * r, j * c : (j + 1) * c]
                assert torch.equal(tiles[..., i, j, :], rectangle.flatten(-2))

    def test_there_is_one_scale_per_tile(self, tiling, rows, columns, tile, leading):
        x = numbered(*leading, rows, columns)
        expected = (*leading, rows // tile[0], columns // tile[1])
        assert tiling.scale_shape(tuple(x.shape)) == expected
        assert tuple(tiling.split(x).shape) == (*expected, tile[0] * tile[1])


def test_splitting_into_groups_copies_nothing():
    x = numbered(4, 8)
    assert Tiling(1, 4).split(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("tiling", [Tiling(1, 5), Tiling(4, 4), Tiling(4, 5), Tiling(12, 0)])
def test_tiles_that_do_not_cover_the_matrix_exactly_are_refused(tiling):
    tile = f"{tiling.rows} × {tiling.columns or 8} do not divide a matrix of 6 × 8"
    with pytest.raises(ValueError, match=tile):
        tiling.split(numbered(6, 8))
    with pytest.raises(ValueError, match=tile):
        tiling.scale_shape((6, 8))
