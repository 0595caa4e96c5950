import dataclasses

import pytest
import torch

from fewbit.config.recipe import CalibrationConfig, Config, GPTQConfig, RTNConfig
from fewbit.config.schemes import SCHEMES, scheme_config, with_group_size
from fewbit.config.spec import INTEGER_FORMATS, QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError, FewbitError
from fewbit.numerics.grouping import Tiling

GROUPED = QuantizationSpec(dtype="int4", qscheme="per_group", group_size=32)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        pytest.param({"qscheme": "per_group"}, "group_size", id="group-without-size"),
        pytest.param({"qscheme": "per_channel", "group_size": 32}, "group_size 32", id="channel-with-size"),
        pytest.param({"qscheme": "per_tensor", "group_size": 32}, "group_size 32", id="tensor-with-size"),
        pytest.param({"qscheme": "per_group", "group_size": 0}, "group_size", id="size-zero"),
        pytest.param({"qscheme": "per_group", "group_size": -32}, "group_size", id="size-negative"),
        pytest.param({"qscheme": "per_group", "group_size": 32.5}, "group_size", id="size-fractional"),
        pytest.param({"qscheme": "per_row"}, "qscheme", id="unknown-granularity"),
        pytest.param({"qscheme": "per_channel", "dtype": "uint4"}, "symmetric", id="symmetric-unsigned"),
        pytest.param({"qscheme": "per_channel", "dtype": "int9"}, "dtype 'int9'", id="unknown-dtype"),
        pytest.param({"qscheme": "per_channel", "dtype": "e4m3"}, "dtype 'e4m3'", id="not-a-weight-format"),
        pytest.param({"qscheme": "per_channel", "scale_dtype": "int8"}, "scale_dtype", id="unknown-scale-dtype"),
        pytest.param({"qscheme": "per_channel", "observer": "best"}, "observer", id="unknown-rule"),
        pytest.param(
            {"qscheme": "per_channel", "symmetric": False, "observer": "signed-max"},
            "observer signed-max",
            id="affine-signed-max",
        ),
    ],
)
def test_a_contradictory_spec_is_refused_and_the_field_named(fields, named):
    with pytest.raises(ConfigError, match=named) as caught:
        QuantizationSpec(**fields)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("dtype", INTEGER_FORMATS)
@pytest.mark.parametrize("rule", ["search", "minmax"])
def test_every_integer_format_can_be_affine_and_the_signed_ones_symmetric(dtype, rule):
    assert not QuantizationSpec(dtype=dtype, qscheme="per_channel", symmetric=False, observer=rule).symmetric
    if dtype.startswith("int"):
        assert QuantizationSpec(dtype=dtype, qscheme="per_channel", observer=rule).symmetric


def test_an_unknown_dtype_is_answered_with_the_nearest_weight_format():
    with pytest.raises(ConfigError, match="did you mean 'int4'"):
        QuantizationSpec(dtype="in4", qscheme="per_channel")


@pytest.mark.parametrize(
    ("cls", "wrong", "near"),
    [
        (QuantizationSpec, "groupsize", "group_size"),
        (QuantizationSpec, "scale_rul", "observer"),
        (QuantizationConfig, "weights", "weight"),
        (GPTQConfig, "dampening", "damping"),
        (RTNConfig, "nam", "name"),
        (CalibrationConfig, "num_sample", "num_samples"),
        (Config, "excludes", "exclude"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_known_one(cls, wrong, near):
    with pytest.raises(ConfigError, match=f"{cls.__name__} has no field '{wrong}'; did you mean '{near}'"):
        cls(**{wrong: 1})


def test_a_field_like_no_other_is_answered_with_the_list_of_fields():
    with pytest.raises(ConfigError, match="known: num_samples, sequence_length"):
        CalibrationConfig(zzz=1)


def test_config_errors_are_fewbit_errors_so_that_the_command_line_prints_them():
    assert issubclass(ConfigError, FewbitError)


CONFIGS = [GROUPED, QuantizationConfig(weight=GROUPED), GPTQConfig(), RTNConfig(), CalibrationConfig()]
CONFIGS.append(Config(global_quant_config=QuantizationConfig(weight=GROUPED)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
class TestEveryConfigClass:
    def test_it_is_frozen(self, config):
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, getattr(config, field))

    def test_replace_with_nothing_gives_an_equal_object(self, config):
        assert dataclasses.replace(config) == config

    def test_replace_refuses_an_unknown_field(self, config):
        with pytest.raises(ConfigError, match="has no field 'nonsense'"):
            dataclasses.replace(config, nonsense=1)


class TestReplace:
    def test_it_changes_the_field_and_nothing_else(self):
        wider = dataclasses.replace(GROUPED, group_size=64)
        assert dataclasses.asdict(wider) == dataclasses.asdict(GROUPED) | {"group_size": 64}
        assert GROUPED.group_size == 32

    def test_it_validates_each_field(self):
        with pytest.raises(ConfigError, match="damping"):
            dataclasses.replace(GPTQConfig(), damping=2.0)

    def test_it_validates_what_fields_say_together(self):
        with pytest.raises(ConfigError, match="group_size 32"):
            dataclasses.replace(GROUPED, qscheme="per_channel")


@pytest.mark.parametrize(
    ("cls", "field", "values"),
    [
        (GPTQConfig, "damping", (0, 1, -0.01, "much")),
        (GPTQConfig, "order", ("random", None)),
        (GPTQConfig, "block_size", (0, -1)),
        (GPTQConfig, "refits", (-1, 11)),
        (CalibrationConfig, "num_samples", (0, -1, "all")),
        (CalibrationConfig, "sequence_length", (0, 1)),
    ],
)
def test_options_out_of_range_are_refused_and_the_field_named(cls, field, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"{cls.__name__}.{field}"):
            cls(**{field: value})


class TestDerivedProperties:
    def test_tiling_says_what_shares_a_scale(self):
        assert GROUPED.tiling == Tiling(rows=1, columns=32)
        assert QuantizationSpec(qscheme="per_channel").tiling.scale_shape((6, 8)) == (6, 1)
        assert QuantizationSpec(qscheme="per_tensor").tiling.scale_shape((6, 8)) == (1, 1)

    def test_bits_are_those_of_the_format(self):
        assert QuantizationSpec(dtype="uint3", qscheme="per_channel", symmetric=False).bits == 3

    @pytest.mark.parametrize("weight", [torch.float32, torch.float16, torch.bfloat16])
    def test_scales_are_stored_in_the_weights_dtype_unless_the_spec_says_otherwise(self, weight):
        assert GROUPED.stored_scale_dtype(weight) == weight
        for name in ("float32", "float16", "bfloat16"):
            spec = dataclasses.replace(GROUPED, scale_dtype=name)
            assert spec.stored_scale_dtype(weight) == getattr(torch, name)

    def test_equal_specs_are_one_key(self):
        assert len({GROUPED, dataclasses.replace(GROUPED)}) == 1


class TestSchemes:
    def test_the_table_holds_the_weight_only_schemes_of_this_version(self):
        assert set(SCHEMES) == {f"W{bits}A16{form}" for bits in (8, 4, 3, 2) for form in ("", "_ASYM")}

    @pytest.mark.parametrize("name", SCHEMES)
    def test_the_name_says_what_the_spec_holds(self, name):
        spec = scheme_config(name).weight
        assert spec.bits == int(name[1])
        assert spec.symmetric != name.endswith("_ASYM")
        assert spec.group_size == 128

    @pytest.mark.parametrize("name", SCHEMES)
    def test_names_may_be_written_in_lower_case(self, name):
        assert scheme_config(name.lower()) == scheme_config(name)

    def test_a_group_size_replaces_the_default(self):
        assert scheme_config("W4A16", 64).weight.group_size == 64

    def test_minus_one_means_one_scale_per_channel(self):
        spec = scheme_config("W4A16", -1).weight
        assert (spec.qscheme, spec.group_size) == ("per_channel", None)
        assert with_group_size(scheme_config("W4A16", -1), 128) == scheme_config("W4A16")

    @pytest.mark.parametrize("size", [0, -2])
    def test_other_sizes_below_one_are_refused(self, size):
        with pytest.raises(ConfigError, match=f"group size.*{size}"):
            scheme_config("W4A16", size)

    def test_an_unknown_name_is_answered_with_the_nearest(self):
        with pytest.raises(ConfigError, match="unknown scheme 'W4A61'; did you mean 'W4A16'"):
            scheme_config("W4A61")

    @pytest.mark.parametrize(
        ("name", "size", "bits"), [("W4A16", 64, 4 + 16 / 64), ("W4A16_ASYM", 64, 4 + 20 / 64), ("W8A16", 128, 8.125)]
    )
    def test_bits_per_weight_count_codes_scale_and_zero_point(self, name, size, bits):
        assert dataclasses.replace(SCHEMES[name], config=scheme_config(name, size)).bits_per_weight == bits
