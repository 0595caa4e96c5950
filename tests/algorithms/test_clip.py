"""Clipping: less error in the output, groups on their own, the range that was found and no other."""

from dataclasses import replace

import pytest
import torch

from fewbit.algorithms.clip import clip
from fewbit.algorithms.rtn import rtn
from fewbit.config.spec import QuantizationSpec
from fewbit.numerics.second_moment import quadratic_form

INT3 = QuantizationSpec(dtype="int3", group_size=32, observer="minmax")
UINT2 = QuantizationSpec(dtype="uint2", group_size=32, symmetric=False, observer="minmax")


def problem(rows=64, columns=128):
    """Weights with heavy tails, skewed, under correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    weight = weight + 0.3 * weight.square()
    weight[:, ::16] *= 3
    return weight, x.T @ x


def loss(weight, quantized_from, moment, spec):
    found = rtn(quantized_from, None, spec, spec.scale_format(torch.float32)).weight.dequantize()
    return float(quadratic_form(found - weight, moment).sum())


@pytest.mark.parametrize(
    "spec",
    [
        INT3,
        UINT2,
        replace(INT3, dtype="int2"),
        QuantizationSpec(dtype="int4", qscheme="per_channel", observer="minmax"),
        QuantizationSpec(dtype="e2m1", group_size=32, scale_type="e8m0", observer="minmax"),
    ],
)
def test_the_output_loses_less(spec):
    weight, moment = problem()
    clipped = clip(weight, moment, spec, spec.scale_format(torch.float32))
    assert loss(weight, clipped, moment, spec) < 0.97 * loss(weight, weight, moment, spec)


def test_affine_grids_gain_from_ends_of_their_own():
    weight, moment = problem()
    clipped = clip(weight, moment, UINT2, UINT2.scale_format(torch.float32))
    low, high = (x.unflatten(1, (-1, 32)) for x in (clipped, weight))
    shares = [low.amin(-1) / high.amin(-1), low.amax(-1) / high.amax(-1)]
    assert (shares[0] - shares[1]).abs().max() > 0.1
    assert all(float(share.min()) >= 0.499 and float(share.max()) <= 1.0 for share in shares)


def test_only_what_lies_outside_the_range_changes():
    weight, moment = problem()
    clipped = clip(weight, moment, INT3, INT3.scale_format(torch.float32))
    limit = clipped.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    kept = weight.abs() <= limit
    assert torch.equal(clipped[kept], weight[kept])
    assert 0.8 < kept.float().mean() < 1.0


def test_groups_do_not_depend_on_each_other():
    weight, moment = problem()
    clipped = clip(weight, moment, INT3, INT3.scale_format(torch.float32))
    part = clip(weight[10:20, 32:64].contiguous(), moment[32:64, 32:64], INT3, INT3.scale_format(torch.float32))
    torch.testing.assert_close(clipped[10:20, 32:64], part)


def test_rows_that_share_a_scale_are_left_alone():
    weight, moment = problem()
    spec = QuantizationSpec(dtype="int4", qscheme="per_tensor", observer="minmax")
    assert clip(weight, moment, spec, spec.scale_format(torch.float32)) is weight
