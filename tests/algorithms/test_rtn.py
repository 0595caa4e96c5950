"""Round to nearest: with statistics the search minds the columns that matter."""

from dataclasses import replace

import pytest
import torch

from fewbit.algorithms.rtn import rtn
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.scale_format import Float

BF16, FP32 = Float(torch.bfloat16), Float(torch.float32)
SPEC = QuantizationSpec(dtype="int4", group_size=32)
SPECS = {
    "int4": SPEC,
    "int2": replace(SPEC, dtype="int2"),
    "uint4": replace(SPEC, dtype="uint4", symmetric=False),
    "fp8-channel": QuantizationSpec(dtype="e4m3", qscheme="per_channel"),
    "fp8-block": QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(32, 32)),
    "fp6": replace(SPEC, dtype="e3m2"),
    "fp4": replace(SPEC, dtype="e2m1"),
    "NVFP4": QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    "MXFP4": replace(SPEC, dtype="e2m1", scale_type="e8m0"),
    "MX6": QuantizationSpec(dtype="mx6"),
    "pof2": replace(SPEC, scale_type="pof2"),
    "columns": QuantizationSpec(dtype="int4", qscheme="per_channel", ch_axis=1),
    "tensor": QuantizationSpec(dtype="int4", qscheme="per_tensor"),
}


def problem():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    shuffled = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    return weight, torch.diag(torch.logspace(-2, 2, 128)[shuffled])


def format_of(spec, weight):
    return spec.scale_format(torch.bfloat16, spec.global_scale(weight))


def weighted_error(weight, moment, outcome):
    return float(((outcome.weight.dequantize() - weight).square() * moment.diagonal()).sum())


@pytest.mark.parametrize("name", SPECS)
def test_statistics_never_harm_the_search_and_no_search_is_worse_than_minmax(name):
    weight, moment = problem()
    spec = SPECS[name]
    format = format_of(spec, weight)
    minmax = weighted_error(weight, moment, rtn(weight, moment, replace(spec, observer="minmax"), format))
    blind = weighted_error(weight, moment, rtn(weight, None, spec, format))
    mse = weighted_error(weight, moment, rtn(weight, moment, replace(spec, observer="mse"), format))
    informed = weighted_error(weight, moment, rtn(weight, moment, spec, format))
    assert mse == blind
    assert informed <= min(minmax, blind) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["int4", "int2", "uint4", "NVFP4"])
def test_search_beats_minmax_and_more_so_with_statistics(name):
    weight, moment = problem()
    spec = SPECS[name]
    format = format_of(spec, weight)
    minmax = weighted_error(weight, moment, rtn(weight, moment, replace(spec, observer="minmax"), format))
    blind = weighted_error(weight, moment, rtn(weight, None, spec, format))
    assert weighted_error(weight, moment, rtn(weight, moment, spec, format)) < blind < minmax


@pytest.mark.parametrize("name", SPECS)
def test_codes_are_the_nearest_of_their_grid(name):
    weight, _ = problem()
    spec = SPECS[name]
    found = rtn(weight, None, spec, format_of(spec, weight)).weight
    fmt = spec.format
    codes = torch.arange(int(fmt.smallest), int(fmt.largest) + 1) if fmt.is_integer else torch.arange(2**fmt.bits)
    levels = fmt.decode(codes)
    levels = levels[levels.isfinite()]
    tiles = spec.tiling.split(weight)
    offset = 0 if found.zero_point is None else found.zero_point.float().unsqueeze(-1).unsqueeze(-1)
    grid = (levels - offset) * found.scale_value.unsqueeze(-1).unsqueeze(-1)
    nearest = (tiles.unsqueeze(-1) - grid).abs().amin(-1)
    error = (spec.tiling.split(found.dequantize()) - tiles).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_only_a_cast(dtype):
    weight, moment = problem()
    found = rtn(weight, moment, QuantizationSpec(dtype=dtype), BF16).weight
    assert torch.equal(found.dequantize(), weight.to(getattr(torch, dtype)).float())


def test_scales_are_stored_in_the_format_that_was_asked_for():
    weight, _ = problem()
    assert rtn(weight, None, SPEC, FP32).weight.scale.dtype == torch.float32
    assert rtn(weight, None, SPEC, BF16).weight.scale.dtype == torch.bfloat16
