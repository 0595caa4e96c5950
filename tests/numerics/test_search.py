"""Searched scales of long rows against a fine sweep: outliers may ask for a small share of the range."""

from dataclasses import replace

import pytest
import torch

from fewbit.nn.quantizer import Quantizer
from fewbit.numerics import search
from fewbit.numerics.formats import FORMATS
from fewbit.numerics.scale_format import E4M3, SCALE_TYPES, Float
from fewbit.numerics.scales import GridRule

TOLERANCE = 1.02
FEW_DECIDE = 1.08  # of a row whose error is decided by few elements, so that its least is one of many dips
ROWS, COLUMNS = 4, 2048
DATA = ["gaussian", "laplace", "one-outlier", "outliers", "one-sided-outlier", "shifted"]
ELEMENTS = ["int2", "int3", "int4", "int8", "e2m1", "e4m3"]


def rows_of(data: str, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    if data == "laplace":
        x = x.sign() * x.square()
    elif data == "one-outlier":
        x[:, 7] = torch.tensor([20.0, -20.0, 45.0, 8.0]).repeat(rows)[:rows]
    elif data == "outliers":
        x[:, ::100] *= 10
    elif data == "one-sided-outlier":
        x[:, 5] = 30.0
        x[:, 6] = 31.0
    elif data == "shifted":
        x += 1.5
    return x


def weights_of(weighting: str | None, columns: int = COLUMNS) -> torch.Tensor | None:
    if weighting is None:
        return None
    weights = torch.randn(columns, generator=torch.Generator().manual_seed(1)).square() + 0.01
    if weighting == "cheap-outliers":
        weights[5:8] = 1e-3
    return weights


def least_error(rule: GridRule, tiles: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Of a fine sweep over both signs of the scale, or over both ends of the range."""
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    reach = torch.maximum(high, -low)
    sweep = torch.logspace(0.03, -1.7, 120 if rule.symmetric else 36)
    if rule.symmetric:
        found = [(rule.scale.round(share * end), None) for end in rule.ends(low, high) for share in sweep]
    else:
        found = [
            rule.from_range(torch.maximum(low, -a * reach), torch.minimum(high, sweep.unsqueeze(1) * reach))
            for a in sweep
        ]
    errors = [rule.error(tiles, rule.scale.value(scale), zero, importance) for scale, zero in found]
    return torch.stack([error.view(-1, len(tiles)).amin(0) for error in errors]).amin(0)


def searched_error(rule: GridRule, tiles: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    stored, zero = rule.find(tiles, importance)
    return rule.error(tiles, rule.scale.value(stored), zero, importance)


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("weighting", [None, "per-column", "cheap-outliers"])
def test_symmetric_scales_of_long_rows_have_the_least_error(name, data, weighting):
    tiles, importance = rows_of(data), weights_of(weighting)
    rule = GridRule(FORMATS[name], Float())
    found, least = searched_error(rule, tiles, importance), least_error(rule, tiles, importance)
    assert found.sum() <= TOLERANCE * least.sum()
    assert (found <= FEW_DECIDE * least).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("weighting", [None, "cheap-outliers"])
def test_affine_scales_of_long_rows_have_the_least_error(bits, data, weighting):
    tiles, importance = rows_of(data, 2, 1024), weights_of(weighting, 1024)
    rule = GridRule(FORMATS[f"uint{bits}"], Float(), symmetric=False)
    found, least = searched_error(rule, tiles, importance), least_error(rule, tiles, importance)
    assert found.sum() <= TOLERANCE * least.sum() or bits == 8
    assert (found <= FEW_DECIDE * least).all()


@pytest.mark.parametrize("kind", ["pof2", "e8m0"])
@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "e2m1"])
@pytest.mark.parametrize("data", DATA)
def test_powers_of_two_of_long_rows_are_the_best_there_are(kind, name, data):
    tiles = rows_of(data)
    dtype = torch.float8_e8m0fnu if kind == "e8m0" else torch.bfloat16
    rule = GridRule(FORMATS[name], SCALE_TYPES[kind](dtype))
    signs = (1, -1) if rule.scale.may_be_negative and rule.fmt.is_integer else (1,)
    powers = [sign * torch.full((ROWS,), 2.0**power) for power in range(-12, 8) for sign in signs]
    least = torch.stack([rule.error(tiles, power, None, None) for power in powers]).amin(0)
    assert (searched_error(rule, tiles, None) <= (1 + 1e-6) * least).all()


@pytest.mark.parametrize("data", DATA)
def test_e4m3_scales_of_long_rows_are_the_best_there_are(data):
    tiles = rows_of(data)
    rule = GridRule(FORMATS["e2m1"], E4M3(torch.float8_e4m3fn, 2.0**-6))
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    errors = [rule.error(tiles, rule.scale.value(code.expand(ROWS)), None, None) for code in codes]
    assert (searched_error(rule, tiles, None) <= 1.001 * torch.stack(errors).amin(0)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tile_longer_than_a_piece_is_searched_like_any_other(symmetric, monkeypatch):
    tiles = rows_of("one-outlier")
    rule = GridRule(FORMATS["int3" if symmetric else "uint3"], Float(), symmetric)
    whole, zero = rule.find(tiles)
    monkeypatch.setattr(search, "PIECE", 300)
    monkeypatch.setattr("fewbit.numerics.scales.PIECE", 300)
    stored, zero_in_pieces = rule.find(tiles)
    torch.testing.assert_close(stored, whole)
    assert symmetric or torch.equal(zero, zero_in_pieces)


@pytest.mark.parametrize("name", ["int2", "int8", "uint3", "e2m1", "e4m3"])
@pytest.mark.parametrize("kind", ["float", "e8m0", "e4m3"])
@pytest.mark.parametrize("columns", [32, 1024])
def test_what_a_tile_gets_does_not_depend_on_the_tiles_beside_it(name, kind, columns):
    if name == "uint3" and kind != "float":
        return  # bytes are for symmetric grids
    dtypes = {"float": torch.float32, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
    rule = GridRule(FORMATS[name], SCALE_TYPES[kind](dtypes[kind]), symmetric=name != "uint3")
    tiles = torch.cat([rows_of("one-outlier", 4, columns), rows_of("gaussian", 4, columns)])
    importance = weights_of("cheap-outliers", columns)
    together, zero = rule.find(tiles, importance)
    for row in range(len(tiles)):
        alone, zero_alone = rule.find(tiles[row : row + 1], importance)
        assert torch.equal(alone.float(), together[row : row + 1].float())
        assert zero is None or torch.equal(zero_alone, zero[row : row + 1])


@pytest.mark.parametrize("columns", [1, 2, 64, 1024])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-42, 3.0, -3.0, 1e38])
def test_constant_rows_come_through(columns, symmetric, value):
    rule = GridRule(FORMATS["int4" if symmetric else "uint4"], Float(), symmetric)
    tiles = torch.full((2, columns), value)
    stored, _ = rule.find(tiles, weights_of("per-column", columns))
    assert stored.isfinite().all()
    assert (stored != 0).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_dynamic_activations_are_searched_as_far(bits):
    tokens = rows_of("one-outlier")
    found = Quantizer(bits, "per-token", observer="mse")(tokens)
    rule = replace(GridRule(FORMATS[f"int{bits}"], Float()), signed=False)
    assert ((found - tokens).square().sum(-1) <= TOLERANCE * least_error(rule, tokens, None)).all()
