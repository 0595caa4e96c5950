"""The table of schemes: names say what specs hold, and compose."""

import dataclasses

import pytest

from fewbit.config.schemes import KV_CACHES, SCHEMES, parse_scheme, scheme_config, takes_group_size, with_group_size
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.contents import nominal
from fewbit.errors import ConfigError
from fewbit.formats.compressed_tensors import layouts

WEIGHT_ONLY = [f"W{bits}A16{form}" for bits in (8, 4, 3, 2) for form in ("", "_ASYM")]
NAMED = ["W8A8", "W8A8_STATIC", "W4A8", "W4A4", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"]
BLOCKS = ["NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP6", "MXFP8", "MXINT8", "MX9", "MX6", "BFP16"]
# bits of the weight (4096 × 4096, bf16 scales), bits of the activations, dynamic
MEANING = {
    "W8A8": (8 + 16 / 4096, 8, True),
    "W8A8_STATIC": (8 + 16 / 4096, 8, False),
    "W4A8": (4.125, 8, True),
    "W4A4": (4.125, 4, True),
    "W4AFP8": (4.125, 8, True),
    "FP8": (8 + 16 / 4096**2, 8, False),
    "FP8_DYNAMIC": (8 + 16 / 4096, 8, True),
    "FP8_BLOCK": (8 + 16 / 128**2, 8, True),
    "NVFP4": (4.5 + 32 / 4096**2, 4, True),
    "MXFP4": (4.25, 4, True),
    "MXFP6": (6.25, 6, True),
    "MXFP8": (8.25, 8, True),
    "MXINT8": (8.25, 8, True),
    "MX9": (9.0, 8, True),
    "MX6": (6.0, 5, True),
    "BFP16": (9.0, 8, True),
}


def test_the_table_holds_every_scheme_that_users_name():
    assert set(WEIGHT_ONLY) | set(NAMED) | set(BLOCKS) <= set(SCHEMES)


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_names_say_bits_and_symmetry(name):
    config = scheme_config(name)
    assert config == QuantizationConfig(weight=config.weight)
    assert config.weight.bits == int(name[1])
    assert config.weight.symmetric != name.endswith("_ASYM")
    assert config.weight.group_size == 128


@pytest.mark.parametrize("name", MEANING)
def test_each_scheme_has_the_bits_of_its_format(name):
    weight, inputs, dynamic = MEANING[name]
    config = scheme_config(name)
    assert nominal(SCHEMES[name]).bits_per_weight == pytest.approx(weight, rel=1e-12)
    assert config.input_tensors.bits == inputs
    assert config.input_tensors.is_dynamic == dynamic


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_a16_is_the_same_weight_without_activations(name):
    assert scheme_config(name + "A16") == dataclasses.replace(scheme_config(name), input_tensors=None)


@pytest.mark.parametrize("name", SCHEMES)
def test_names_may_be_written_in_lower_case(name):
    assert scheme_config(name.lower()) == scheme_config(name)


def test_a_group_size_replaces_the_default():
    assert scheme_config("W4A16", 64).weight.group_size == 64
    assert scheme_config("W4A16-g64", 64) == scheme_config("W4A16", 64)


def test_a_group_size_beside_another_in_the_name_is_refused():
    with pytest.raises(ConfigError, match="group_size 32 contradicts it"):
        scheme_config("W4A16-g64", 32)
    assert scheme_config("W4A16-g64") == scheme_config("W4A16", 64)


def test_minus_one_means_one_scale_per_channel():
    spec = scheme_config("W4A16", -1).weight
    assert (spec.qscheme, spec.group_size) == ("per_channel", None)
    assert with_group_size(scheme_config("W4A16", -1), 128) == scheme_config("W4A16")


def test_minus_one_keeps_the_direction_in_which_groups_ran():
    along_columns = QuantizationConfig(weight=QuantizationSpec(group_size=32, ch_axis=1))
    assert with_group_size(along_columns, -1).weight.tiling.scale_shape((6, 64)) == (6, 1)
    for qscheme in ("per_channel", "per_tensor"):
        rows = QuantizationConfig(weight=QuantizationSpec(qscheme=qscheme))
        assert with_group_size(rows, -1).weight.tiling.scale_shape((6, 64)) == (6, 1)
        assert with_group_size(rows, 32).weight.tiling.scale_shape((6, 64)) == (6, 2)
    written = QuantizationConfig(weight=QuantizationSpec(qscheme="per_channel", ch_axis=0))
    assert with_group_size(written, 32).weight.tiling.scale_shape((6, 64)) == (6, 2)


@pytest.mark.parametrize("size", [0, -2])
def test_other_sizes_below_one_are_refused(size):
    with pytest.raises(ConfigError, match=f"group size.*{size}"):
        scheme_config("W4A16", size)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "FP8_BLOCK", "MX9"])
def test_formats_keep_the_groups_that_they_have(name):
    with pytest.raises(ConfigError, match=r"group_size 64.*groups of its format"):
        scheme_config(name, 64)


@pytest.mark.parametrize("name", ["W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC"])
def test_what_has_no_groups_is_given_none(name):
    for call in (lambda: scheme_config(name, 64), lambda: scheme_config(f"{name}-g64")):
        with pytest.raises(ConfigError, match=r"group_size 64: .* has no groups .*leave it out"):
            call()


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_takes_a_group_size_or_says_that_it_does_not(name):
    if takes_group_size(SCHEMES[name]):
        assert scheme_config(name, 32).weight.group_size == 32
        assert layouts(nominal(SCHEMES[name])) == ["pack-quantized"]  # where engines know groups of several sizes
    else:
        with pytest.raises(ConfigError, match="group_size 32"):
            scheme_config(name, 32)


@pytest.mark.parametrize("suffix", KV_CACHES)
@pytest.mark.parametrize("written", ["W4A8{}", "W4A8+{}", "w4a8{}-g64"])
def test_a_kv_cache_composes_with_a_scheme(suffix, written):
    config, cache = parse_scheme(written.format(suffix))
    assert config == scheme_config("W4A8", 64 if "g64" in written else None)
    assert cache == AttentionConfig(key=KV_CACHES[suffix], value=KV_CACHES[suffix])


def test_a_layers_scheme_names_no_kv_cache():
    with pytest.raises(ConfigError, match="quantized for the whole model"):
        scheme_config("W4A16KV8")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown scheme 'W4A61'; did you mean 'W4A16'"):
        scheme_config("W4A61")


@pytest.mark.parametrize(
    ("name", "size", "bits"), [("W4A16", 64, 4 + 16 / 64), ("W4A16_ASYM", 64, 4 + 20 / 64), ("W8A16", 128, 8.125)]
)
def test_bits_per_weight_count_codes_scale_and_zero_point(name, size, bits):
    assert nominal(scheme_config(name, size)).bits_per_weight == bits


def test_cache_and_group_size_come_in_either_order():
    assert parse_scheme("W4A16-g32+KV8") == parse_scheme("W4A16KV8-g32") == parse_scheme("w4a16-g32kv8")
    with pytest.raises(ConfigError, match="twice"):
        parse_scheme("W4A16-g32KV8-g64")
