"""Rounding a stage without data, piece by piece, is what rounding its linears as a whole is."""

import pytest
import torch

from fewbit import tensor
from fewbit.config.algorithms import RTNConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.engine.stage_quantizer import Member, quantize_stage, round_stage

SPECS = {
    "int8 per channel": QuantizationSpec(dtype="int8", qscheme="per_channel"),
    "int4 in groups": QuantizationSpec(dtype="int4", group_size=32),
    "uint4 in groups": QuantizationSpec(dtype="uint4", symmetric=False, group_size=32),
    "int3": QuantizationSpec(dtype="int3", qscheme="per_channel"),
    "fp8 per tensor, shared": QuantizationSpec(dtype="e4m3", qscheme="per_tensor"),
    "int8 per tensor": QuantizationSpec(dtype="int8", qscheme="per_tensor"),
    "fp8 blocks": QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(16, 32)),
    "nvfp4": QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    "mxfp4": QuantizationSpec(dtype="e2m1", group_size=32, scale_type="e8m0"),
    "mx6": QuantizationSpec(dtype="mx6"),
    "columns": QuantizationSpec(dtype="int4", qscheme="per_channel", ch_axis=1),
    "cast": QuantizationSpec(dtype="bfloat16"),
}


@pytest.fixture(params=SPECS)
def members(request) -> list[Member]:
    generator = torch.Generator().manual_seed(0)
    weights = [(factor * torch.randn(48, 128, generator=generator)).bfloat16() for factor in (1.0, 0.3, 2.0)]
    return [Member(f"linear{i}", weight, SPECS[request.param], weight.dtype) for i, weight in enumerate(weights)]


def test_codes_scales_and_errors_are_those_of_whole_matrices(members, monkeypatch):
    whole = quantize_stage([Member(m.name, m.weight.float(), m.spec, m.dtype) for m in members], None, RTNConfig())
    monkeypatch.setattr(tensor, "PIECE", 500)
    monkeypatch.setattr("fewbit.engine.stage_quantizer.PIECE", 500)
    for name, found in round_stage(members).items():
        expected = whole[name]
        assert torch.equal(found.weight.codes.view(torch.uint8), expected.weight.codes.view(torch.uint8))
        assert torch.equal(found.weight.scale.float(), expected.weight.scale.float())
        assert found.weight.global_scale == expected.weight.global_scale
        if expected.weight.zero_point is not None:
            assert torch.equal(found.weight.zero_point, expected.weight.zero_point)
        assert found.error == pytest.approx(expected.error, rel=1e-5)
        assert found.energy == pytest.approx(expected.energy, rel=1e-5)


def test_the_error_is_that_of_the_weight_and_what_is_stored(members):
    for member in members:
        found = round_stage(members)[member.name]
        exact = (found.weight.dequantize().double() - member.weight.double()).square().sum()
        assert found.error == pytest.approx(float(exact), rel=1e-5)
        assert found.energy == pytest.approx(float(member.weight.double().square().sum()), rel=1e-5)
