"""Quark's ready-made specs are the specs that their names and fields say."""

import dataclasses

import pytest

import fewbit
from fewbit import quark
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.quark import (
    DataTypeSpec,
    FP4PerGroupSpec,
    FP8E4M3PerTensorSpec,
    Int4PerChannelSpec,
    Int4PerGroupSpec,
    Int8PerChannelSpec,
    Int8PerTensorSpec,
    MX6Spec,
    OCP_MXFP4Spec,
    ProgressiveSpec,
    ScaleQuantSpec,
    Uint4PerGroupSpec,
)

ELEMENTS = {name: found for name, found in vars(quark).items() if found in DataTypeSpec.__subclasses__()}


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_name_says_dtype_and_granularity(name):
    fields = {"symmetric": False} if name.startswith("Uint") else {}
    if "PerGroup" in name:
        fields["group_size"] = 32
    spec = ELEMENTS[name](**fields).to_quantization_spec()
    bits = next((digit for digit in name if digit.isdigit()), None)
    if "Int" in name or "int" in name:
        assert spec.dtype == f"{'u' if name.startswith('Uint') else ''}int{bits}" or name == "OCP_MXINT8Spec"
    for word, qscheme in (("PerTensor", "per_tensor"), ("PerChannel", "per_channel"), ("PerGroup", "per_group")):
        assert (word not in name) or spec.qscheme == qscheme
    assert ("OCP_MX" in name or name == "BFP16Spec") == (spec.scale_type == "e8m0")
    assert getattr(fewbit.quark, name) is ELEMENTS[name]


def test_examples_of_quark_s_documentation():
    common = {"symmetric": True, "scale_type": "float", "round_method": "half_even", "is_dynamic": False}
    int8 = Int8PerTensorSpec(observer_method="min_max", **common).to_quantization_spec()
    assert int8 == QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax")
    group = Int4PerGroupSpec(ch_axis=1, is_dynamic=False, scale_type="float", group_size=128).to_quantization_spec()
    assert group == QuantizationSpec(dtype="int4", group_size=128, ch_axis=1, observer="minmax")
    affine = Uint4PerGroupSpec(ch_axis=1, is_dynamic=False, group_size=64).to_quantization_spec()
    assert affine == QuantizationSpec(dtype="uint4", group_size=64, symmetric=False, ch_axis=1, observer="minmax")
    shift = Int8PerChannelSpec(symmetric=True, scale_type="power_of_2", ch_axis=0).to_quantization_spec()
    assert (shift.scale_type, shift.ch_axis) == ("pof2", 0)
    mx = OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    assert dataclasses.replace(mx, ch_axis=None) == QuantizationSpec(
        dtype="e2m1", group_size=32, scale_type="e8m0", observer="minmax"
    )
    assert MX6Spec().to_quantization_spec().scale_type == "microexponent"


def test_two_stages_are_a_config_s_weight():
    progressive = ProgressiveSpec(
        first_stage=FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
        second_stage=Int4PerChannelSpec(symmetric=True, ch_axis=0, is_dynamic=False),
    ).to_quantization_spec()
    weight = QuantizationConfig(weight=progressive).weight
    assert (weight.dtype, weight.first_stage.dtype) == ("int4", "e4m3")
    nvfp4 = ScaleQuantSpec(
        first_stage=FP4PerGroupSpec(group_size=16, is_dynamic=False),
        second_stage=FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
    ).to_quantization_spec()
    assert nvfp4 == QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3", observer="minmax")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Int8PerTensorSpec(ch_axis=0), "Int8PerTensorSpec has no field 'ch_axis'"),
        (
            lambda: Int8PerTensorSpec(observer_method="minmax"),
            "unknown observer_method 'minmax'; did you mean 'min_max'",
        ),
        (lambda: Int4PerGroupSpec(), "per_group needs group_size"),
        (
            lambda: ScaleQuantSpec(FP4PerGroupSpec(group_size=16), Int8PerTensorSpec()).to_quantization_spec(),
            "scales are quantized to e4m3 per_tensor, not to int8 per_tensor",
        ),
    ],
)
def test_what_a_name_does_not_take_is_an_error(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_fields_are_readable():
    spec = Int8PerTensorSpec(symmetric=True)
    assert (spec.symmetric, spec.is_dynamic) == (True, None)
    with pytest.raises(AttributeError, match="no attribute 'bits'"):
        _ = spec.bits
