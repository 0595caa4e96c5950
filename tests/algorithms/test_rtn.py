"""Round to nearest: with statistics the search minds the columns that matter."""

from dataclasses import replace

import torch

from fewbit.algorithms.rtn import rtn
from fewbit.config.spec import QuantizationSpec

SPEC = QuantizationSpec(dtype="int4", group_size=32)


def weighted_error(weight, moment, outcome):
    return float(((outcome.weight.dequantize() - weight).square() * moment.diagonal()).sum())


def test_search_beats_minmax_and_more_so_with_statistics():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    moment = torch.diag(torch.logspace(-2, 2, 128))
    plain = weighted_error(weight, moment, rtn(weight, moment, replace(SPEC, observer="minmax"), torch.bfloat16))
    blind = weighted_error(weight, moment, rtn(weight, None, SPEC, torch.bfloat16))
    informed = weighted_error(weight, moment, rtn(weight, moment, SPEC, torch.bfloat16))
    assert informed < blind < plain


def test_codes_are_the_nearest_of_their_grid():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    found = rtn(weight, None, SPEC, torch.float32).weight
    grid = torch.arange(-8, 8.0)
    scale = found.scale.repeat_interleave(32, 1)
    nearest = (weight.unsqueeze(-1) - grid * scale.unsqueeze(-1)).abs().min(-1).values
    torch.testing.assert_close((found.dequantize() - weight).abs(), nearest, rtol=1e-5, atol=1e-6)
