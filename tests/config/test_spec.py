import dataclasses

import pytest
import torch

from fewbit.config.algorithms import AWQConfig, GPTQConfig, RTNConfig, ScalingLayer, SmoothQuantConfig
from fewbit.config.recipe import CalibrationConfig, Config
from fewbit.config.spec import (
    AttentionConfig,
    QuantizationConfig,
    QuantizationSpec,
)
from fewbit.errors import ConfigError, FewbitError
from fewbit.numerics.formats import FORMATS
from fewbit.numerics.grouping import Tiling

INTEGER_FORMATS = [name for name, fmt in FORMATS.items() if fmt.is_integer]
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
        pytest.param({"qscheme": "per_channel", "dtype": "int99"}, "dtype 'int99'", id="unknown-dtype"),
        pytest.param({"qscheme": "per_channel", "dtype": "e8m0"}, "dtype 'e8m0'", id="scales-only"),
        pytest.param({"qscheme": "per_channel", "dtype": "e4m3", "symmetric": False}, "symmetric", id="affine-float"),
        pytest.param({"dtype": "bfloat16", "symmetric": False}, "symmetric", id="affine-cast"),
        pytest.param({"dtype": "bfloat16", "qscheme": "per_channel"}, "qscheme", id="cast-per-channel"),
        pytest.param({"dtype": "float16", "observer": "minmax"}, "observer minmax", id="cast-with-observer"),
        pytest.param({"dtype": "float16", "scale_type": "e8m0"}, "scale_type", id="cast-with-scales"),
        pytest.param({"dtype": "float16", "clip_ratio": 0.9}, "clip_ratio", id="cast-clipped"),
        pytest.param({"qscheme": "per_block"}, "block_size", id="block-without-size"),
        pytest.param({"qscheme": "per_channel", "block_size": (2, 2)}, "block_size", id="channel-with-block"),
        pytest.param({"qscheme": "per_block", "block_size": (0, 2)}, "block_size", id="block-of-nothing"),
        pytest.param({"qscheme": "per_block", "block_size": (2,)}, "block_size", id="block-of-one-axis"),
        pytest.param({"qscheme": "per_block", "block_size": (2, 2), "group_size": 2}, "group_size", id="block-group"),
        pytest.param({"qscheme": "per_tensor", "ch_axis": 0}, "ch_axis", id="axis-of-a-tensor"),
        pytest.param({"qscheme": "per_token", "ch_axis": 0}, "ch_axis", id="axis-of-a-token"),
        pytest.param({"qscheme": "per_channel", "ch_axis": 2}, "ch_axis 2 is out of range", id="axis-2"),
        pytest.param({"group_size": 8, "ch_axis": -3}, "ch_axis -3 is out of range", id="axis-minus-3"),
        pytest.param({"group_size": -1, "ch_axis": 5}, "ch_axis 5 is out of range", id="axis-of-the-whole"),
        pytest.param({"qscheme": "per_channel", "percentile": 50}, "percentile", id="percentile-50"),
        pytest.param({"qscheme": "per_channel", "percentile": 100.1}, "percentile", id="percentile-above-100"),
        pytest.param({"qscheme": "per_channel", "clip_ratio": 0, "observer": "minmax"}, "clip_ratio", id="clip-0"),
        pytest.param({"qscheme": "per_channel", "clip_ratio": 2, "observer": "minmax"}, "clip_ratio", id="clip-2"),
        pytest.param({"qscheme": "per_channel", "clip_ratio": 0.9}, "clip_ratio", id="clip-and-search"),
        pytest.param(
            {"qscheme": "per_channel", "clip_ratio": 0.9, "observer": "mse"}, "clip_ratio", id="clip-and-mse"
        ),
        pytest.param({"qscheme": "per_channel", "scale_type": "e5m2"}, "scale_type", id="unknown-scale-type"),
        pytest.param({"group_size": 8, "exponent_mode": "up"}, "exponent_mode", id="unknown-mode"),
        pytest.param({"qscheme": "per_channel", "round_method": "up"}, "round_method", id="unknown-rounding"),
        pytest.param(
            {"group_size": 8, "scale_type": "e8m0", "scale_dtype": "float16"}, "scale_dtype", id="two-scale-dtypes"
        ),
        pytest.param(
            {"group_size": 8, "scale_type": "e4m3", "dtype": "uint4", "symmetric": False},
            "scale_type e4m3",
            id="nv-asym",
        ),
        pytest.param({"group_size": 16, "scale_type": "microexponent"}, "group_size 2", id="microexponents-of-16"),
        pytest.param(
            {"group_size": 2, "scale_type": "microexponent", "dtype": "e2m1"}, "microexponent", id="micro-float"
        ),
        pytest.param(
            {"group_size": 2, "scale_type": "microexponent", "ch_axis": 0}, "ch_axis 0", id="micro-along-rows"
        ),
        pytest.param(
            {"group_size": 8, "scale_type": "e8m0", "observer": "signed-max"}, "observer signed-max", id="signed-mx"
        ),
        pytest.param(
            {"qscheme": "per_channel", "dtype": "e2m1", "observer": "signed-max"},
            "observer signed-max",
            id="signed-fp4",
        ),
        pytest.param({"qscheme": "per_channel", "observer": "placeholder"}, "observer placeholder", id="no-observer"),
        pytest.param(
            {"qscheme": "per_tensor", "observer": "histogram", "is_dynamic": True},
            "is_dynamic",
            id="dynamic-histogram",
        ),
        pytest.param(
            {"qscheme": "per_tensor", "observer": "moving-average", "is_dynamic": True},
            "is_dynamic",
            id="dynamic-average",
        ),
        pytest.param(
            {"qscheme": "per_channel", "first_stage": {"qscheme": "per_token", "is_dynamic": True}},
            "first_stage",
            id="dynamic-first-stage",
        ),
        pytest.param(
            {"qscheme": "per_channel", "first_stage": {"qscheme": "per_tensor", "observer": "histogram"}},
            "first_stage: observer histogram",
            id="accumulating-first-stage",
        ),
        pytest.param({"qscheme": "per_channel", "first_stage": {"group": 3}}, "no field 'group'", id="first-stage"),
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


DYNAMIC = {"qscheme": "per_token", "observer": "minmax", "is_dynamic": True}
STATIC = {"qscheme": "per_tensor", "observer": "minmax"}
TWO_STAGE = {"first_stage": {"dtype": "e4m3", "qscheme": "per_tensor"}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        pytest.param({"weight": STATIC | {"is_dynamic": True}}, "weight: is_dynamic", id="dynamic-weight"),
        pytest.param({"weight": {"qscheme": "per_token"}}, "weight: per_token", id="weight-per-token"),
        pytest.param({"weight": STATIC | {"residual": True}}, "weight: residual", id="weight-residual"),
        pytest.param(
            {"weight": STATIC | {"observer": "histogram"}}, "weight: observer histogram", id="weight-histogram"
        ),
        pytest.param({"bias": STATIC | {"is_dynamic": True}}, "bias: is_dynamic", id="dynamic-bias"),
        *(
            pytest.param({slot: spec}, f"{slot}: {reason}", id=f"{slot}-{reason.split()[-1]}")
            for slot in ("input_tensors", "output_tensors")
            for spec, reason in (
                (DYNAMIC | {"observer": "search"}, "observer search"),
                (DYNAMIC | {"observer": "signed-max"}, "observer signed-max"),
                (DYNAMIC | {"is_dynamic": False}, "qscheme per_token"),
                (DYNAMIC | {"is_dynamic": False, "qscheme": "per_channel"}, "qscheme per_channel"),
                (STATIC | {"qscheme": "per_group", "group_size": 8}, "qscheme per_group"),
                (STATIC | {"qscheme": "per_block", "block_size": (8, 8)}, "qscheme per_block"),
                (STATIC | TWO_STAGE, "first_stage"),
            )
        ),
    ],
)
def test_a_contradictory_module_config_is_refused_and_the_field_named(fields, named):
    with pytest.raises(ConfigError, match=named) as caught:
        QuantizationConfig(**{slot: QuantizationSpec(**spec) for slot, spec in fields.items()})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slot", ["key", "value", "query", "probabilities"])
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (DYNAMIC | {"observer": "search"}, "observer search"),
        (DYNAMIC | {"is_dynamic": False}, "qscheme per_token"),
        (STATIC | {"qscheme": "per_group", "group_size": 8}, "qscheme per_group"),
        (STATIC | TWO_STAGE, "first_stage"),
    ],
)
def test_a_contradictory_attention_config_is_refused_and_the_field_named(slot, spec, reason):
    with pytest.raises(ConfigError, match=f"attention {slot}: {reason}"):
        AttentionConfig(**{slot: QuantizationSpec(**spec)})


def test_an_attention_config_says_something():
    with pytest.raises(ConfigError, match="name a spec for key, value, query or probabilities"):
        AttentionConfig()


@pytest.mark.parametrize(
    "spec",
    [
        DYNAMIC,
        STATIC,
        STATIC | {"observer": "histogram"},
        STATIC | {"qscheme": "per_channel", "ch_axis": 1},
        DYNAMIC | {"qscheme": "per_group", "group_size": 8, "clip_ratio": 0.9},
        {"dtype": "bfloat16"},
    ],
)
def test_what_makes_sense_for_activations_is_accepted(spec):
    made = QuantizationSpec(**spec)
    assert QuantizationConfig(input_tensors=made, output_tensors=made).activations == {
        "input_tensors": made,
        "output_tensors": made,
    }


@pytest.mark.parametrize(
    ("spec", "needs"),
    [
        (STATIC, True),
        (DYNAMIC, False),
        ({"dtype": "float16"}, False),
        (DYNAMIC | {"dtype": "e2m1", "qscheme": "per_group", "group_size": 16, "scale_type": "e4m3"}, True),
        (DYNAMIC | {"dtype": "e2m1", "qscheme": "per_group", "group_size": 32, "scale_type": "e8m0"}, False),
    ],
)
def test_static_scales_and_global_scales_need_data(spec, needs):
    made = QuantizationSpec(**spec)
    assert made.needs_data == needs
    assert QuantizationConfig(input_tensors=made).needs_data == needs
    assert not QuantizationConfig(weight=QuantizationSpec(qscheme="per_channel")).needs_data


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
        (QuantizationSpec, "observe", "observer"),
        (QuantizationSpec, "is_dynamik", "is_dynamic"),
        (QuantizationConfig, "weights", "weight"),
        (GPTQConfig, "dampening", "damping"),
        (RTNConfig, "nam", "name"),
        (AWQConfig, "duo_scal", "duo_scale"),
        (SmoothQuantConfig, "alpa", "alpha"),
        (ScalingLayer, "prev_opp", "prev_op"),
        (AttentionConfig, "keys", "key"),
        (CalibrationConfig, "num_sample", "num_samples"),
        (Config, "excludes", "exclude"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_known_one(cls, wrong, near):
    with pytest.raises(ConfigError, match=f"{cls.__name__} has no field '{wrong}'; did you mean '{near}'"):
        cls(**{wrong: 1})


def test_a_field_like_no_other_is_answered_with_the_list_of_fields():
    with pytest.raises(ConfigError, match="known: num_samples, quantized_activations, sequence_length"):
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
        assert QuantizationSpec(qscheme="per_token").tiling.scale_shape((6, 8)) == (6, 1)
        for axis in (1, -1):
            assert QuantizationSpec(qscheme="per_channel", ch_axis=axis).tiling.scale_shape((6, 8)) == (1, 8)
            assert QuantizationSpec(group_size=4, ch_axis=axis).tiling.scale_shape((6, 8)) == (6, 2)
        for axis in (0, -2):
            assert QuantizationSpec(qscheme="per_channel", ch_axis=axis).tiling.scale_shape((6, 8)) == (6, 1)
            assert QuantizationSpec(group_size=3, ch_axis=axis).tiling.scale_shape((6, 8)) == (2, 8)
        assert QuantizationSpec(qscheme="per_block", block_size=(3, 2)).tiling.scale_shape((6, 8)) == (2, 4)

    def test_bits_are_those_of_the_format(self):
        assert QuantizationSpec(dtype="uint3", qscheme="per_channel", symmetric=False).bits == 3

    @pytest.mark.parametrize("weight", [torch.float32, torch.float16, torch.bfloat16])
    def test_scales_are_stored_in_the_weights_dtype_unless_the_spec_says_otherwise(self, weight):
        assert GROUPED.stored_scale_dtype(weight) == weight
        for name in ("float32", "float16", "bfloat16"):
            spec = dataclasses.replace(GROUPED, scale_dtype=name)
            assert spec.stored_scale_dtype(weight) == getattr(torch, name)

    @pytest.mark.parametrize(("kind", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e8m0", torch.float8_e8m0fnu)])
    def test_byte_scales_have_the_dtype_of_their_type(self, kind, dtype):
        spec = QuantizationSpec(dtype="e2m1", group_size=16, scale_type=kind)
        assert spec.stored_scale_dtype(torch.float32) == dtype
        assert spec.scale_format(torch.bfloat16).dtype == dtype

    def test_the_grid_rule_knows_all_that_the_spec_says_about_grids(self):
        spec = QuantizationSpec(
            dtype="uint3",
            qscheme="per_channel",
            symmetric=False,
            observer="percentile",
            percentile=99.0,
            clip_ratio=0.8,
            round_method="floor",
            exponent_mode="ceil",
            scale_type="pof2",
        )
        rule = spec.grid_rule(spec.scale_format(torch.float16))
        assert rule.fmt.name == "uint3"
        assert (rule.symmetric, rule.rule, rule.percentile, rule.clip_ratio) == (False, "percentile", 99.0, 0.8)
        assert (rule.rounding, rule.mode) == ("floor", "ceil")
        assert (rule.scale.name, rule.scale.dtype) == ("pof2", torch.float16)

    @pytest.mark.parametrize("dtype", FORMATS)
    def test_every_element_format_makes_a_spec(self, dtype):
        cast = dtype in ("bfloat16", "float16")
        qscheme = "per_tensor" if cast else "per_channel"
        spec = QuantizationSpec(dtype=dtype, qscheme=qscheme, symmetric=not dtype.startswith("u"))
        assert spec.format.name == dtype
        assert spec.stored_bits((16, 4096)) >= spec.bits * 16 * 4096

    def test_equal_specs_are_one_key(self):
        assert len({GROUPED, dataclasses.replace(GROUPED)}) == 1
