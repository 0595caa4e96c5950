import copy
import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.config.algorithms import (
    AWQConfig,
    GPTQConfig,
    RTNConfig,
    ScalingLayer,
    SmoothQuantConfig,
    algorithm_configs,
)
from fewbit.config.recipe import CalibrationConfig, Config, merge_recipe
from fewbit.config.schemes import parse_scheme, scheme_config
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError

FULL = """
global_quant_config:
  weight: {dtype: int4, qscheme: per_group, group_size: 64, observer: signed-max}
layer_type_quant_config:
  Linear: {weight: {dtype: int8, qscheme: per_tensor}}
layer_quant_config:
  "re:.*v_proj": {weight: {dtype: uint8, qscheme: per_channel, symmetric: false, scale_dtype: float16}}
  "*.down_proj": W3A16_ASYM
  "*.o_proj": {weight: null}
  "*.up_proj":
    weight: {dtype: int4, qscheme: per_channel, first_stage: {dtype: fp8_e4m3, qscheme: per_tensor}}
    input_tensors: {dtype: fp8_e4m3, qscheme: per_token, observer: minmax, is_dynamic: true}
    output_tensors: {dtype: int8, qscheme: per_tensor, observer: percentile, percentile: 99.9}
    bias: {dtype: bfloat16}
  "*.gate_proj": {weight: {dtype: e4m3, qscheme: per_block, block_size: [128, 128]}}
exclude: [lm_head, "re:.*gate.*"]
algo_config:
  - {name: awq, n_grid: 5, scaling_layers: [{prev_op: input_layernorm, layers: [self_attn.q_proj, self_attn.k_proj]}]}
  - {name: gptq, damping: 0.05, order: group-aware, block_size: 32, refits: 3}
attention:
  key: &cache {dtype: fp8_e4m3, qscheme: per_tensor, observer: minmax}
  value: *cache
calibration: {num_samples: 7, sequence_length: 99}
seed: 5
"""


def from_text(text: str, directory) -> Config:
    file = directory / "recipe.yaml"
    file.write_text(text)
    return Config.from_yaml(file)


def test_null_means_in_yaml_what_none_means_in_python():
    plain = {"scheme": "W8A8", "algo_config": None, "layer_quant_config": {"*.v_proj": None}}
    config = Config.from_dict(plain)
    assert config.algo_config == (RTNConfig(),)
    assert config.layer_quant_config == {"*.v_proj": QuantizationConfig()}


class TestYAML:
    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(FULL, id="everything"),
            pytest.param("scheme: W4A16", id="scheme"),
            pytest.param("{scheme: W2A16_ASYM, group_size: -1, algorithm: rtn, exclude: lm_head}", id="shorthands"),
            pytest.param("{scheme: W4A16, algorithm: {name: gptq, refits: 0}}", id="algorithm-options"),
            pytest.param("{scheme: W4A16, algorithm: awq+gptq}", id="two-algorithms"),
            pytest.param("{scheme: W4A8KV4-g64, algorithm: [smoothquant, rtn]}", id="composed-scheme"),
            pytest.param("{scheme: NVFP4}", id="nvfp4"),
        ],
    )
    def test_a_recipe_written_and_read_again_is_the_same(self, text, tmp_path):
        config = from_text(text, tmp_path)
        again = from_text(config.to_yaml(), tmp_path)
        assert again == config
        assert again.to_yaml() == config.to_yaml()
        assert list(again.layer_quant_config) == list(config.layer_quant_config)  # the order of patterns counts

    def test_every_field_of_the_file_arrives(self, tmp_path):
        config = from_text(FULL, tmp_path)
        assert config.global_quant_config.weight == QuantizationSpec(
            dtype="int4", qscheme="per_group", group_size=64, observer="signed-max"
        )
        assert config.layer_type_quant_config["Linear"].weight == QuantizationSpec(dtype="int8", qscheme="per_tensor")
        assert config.layer_quant_config == {
            "re:.*v_proj": QuantizationConfig(
                QuantizationSpec(dtype="uint8", qscheme="per_channel", symmetric=False, scale_dtype="float16")
            ),
            "*.down_proj": scheme_config("W3A16_ASYM"),
            "*.o_proj": QuantizationConfig(weight=None),
            "*.up_proj": QuantizationConfig(
                weight=QuantizationSpec(
                    dtype="int4",
                    qscheme="per_channel",
                    first_stage=QuantizationSpec(dtype="e4m3", qscheme="per_tensor"),
                ),
                input_tensors=QuantizationSpec(dtype="e4m3", qscheme="per_token", observer="minmax", is_dynamic=True),
                output_tensors=QuantizationSpec(
                    dtype="int8", qscheme="per_tensor", observer="percentile", percentile=99.9
                ),
                bias=QuantizationSpec(dtype="bfloat16", qscheme="per_tensor", observer="placeholder"),
            ),
            "*.gate_proj": QuantizationConfig(
                QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(128, 128))
            ),
        }
        assert config.exclude == ("lm_head", "re:.*gate.*")
        linears = ("self_attn.q_proj", "self_attn.k_proj")
        assert config.algo_config == (
            AWQConfig(n_grid=5, scaling_layers=(ScalingLayer("input_layernorm", linears),)),
            GPTQConfig(damping=0.05, order="group-aware", block_size=32, refits=3),
        )
        assert config.codes == config.algo_config[1]
        assert config.scale_searches == config.algo_config[:1]
        cache = QuantizationSpec(dtype="e4m3", qscheme="per_tensor", observer="minmax")
        assert config.attention == AttentionConfig(key=cache, value=cache)
        assert config.calibration == CalibrationConfig(num_samples=7, sequence_length=99)
        assert config.seed == 5

    def test_the_text_is_plain_yaml(self, tmp_path):
        assert "!!" not in from_text(FULL, tmp_path).to_yaml()

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
            Config.from_yaml(tmp_path / "absent.yaml")

    def test_broken_yaml_is_one_sentence(self, tmp_path):
        with pytest.raises(ConfigError, match=r"recipe\.yaml is not YAML") as caught:
            from_text("scheme: [W4A16", tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["- scheme: W4A16", "W4A16", "", "4"])
    def test_a_file_that_is_no_mapping_is_refused(self, text, tmp_path):
        with pytest.raises(ConfigError, match="must be a table of fields"):
            from_text(text, tmp_path)

    def test_a_file_that_is_no_text_is_refused(self, tmp_path):
        (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x80scheme")
        with pytest.raises(ConfigError, match=r"recipe\.yaml"):
            Config.from_yaml(tmp_path / "recipe.yaml")


granularities = [
    {"qscheme": "per_tensor"},
    {"qscheme": "per_channel"},
    {"qscheme": "per_channel", "ch_axis": 1},
    {"qscheme": "per_group", "group_size": 16},
    {"qscheme": "per_group", "group_size": 128, "ch_axis": 0},
    {"qscheme": "per_block", "block_size": (128, 64)},
]
plain_specs = st.builds(
    lambda dtype, granularity, scale_dtype, scale_type, rule, rounding: QuantizationSpec(
        dtype=dtype,
        symmetric=not dtype.startswith("u"),
        scale_type=scale_type,
        scale_dtype=scale_dtype,
        observer=rule,
        round_method=rounding,
        clip_ratio=1.0 if rule != "minmax" else 0.9,
        **granularity,
    ),
    st.sampled_from([f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)] + ["e4m3", "e3m2", "e2m1"]),
    st.sampled_from(granularities),
    st.sampled_from(["checkpoint", "float32", "float16", "bfloat16"]),
    st.sampled_from(["float", "pof2"]),
    st.sampled_from(["search", "minmax", "mse"]),
    st.sampled_from(["half_even", "round", "floor"]),
)
FIXED = [
    QuantizationSpec(dtype="mx", mx_element_dtype="fp4"),
    QuantizationSpec(dtype="mx9"),
    QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    QuantizationSpec(dtype="float16"),
]
specs = plain_specs | st.sampled_from(FIXED)
staged = st.builds(lambda spec, first: dataclasses.replace(spec, first_stage=first), plain_specs, plain_specs)
activations = st.builds(
    lambda spec, fields: QuantizationSpec(**fields, symmetric=spec.symmetric, dtype=spec.dtype),
    plain_specs,
    st.sampled_from(
        [
            {"qscheme": "per_tensor", "observer": "histogram"},
            {"qscheme": "per_tensor", "observer": "percentile", "percentile": 99.5},
            {"qscheme": "per_token", "observer": "minmax", "is_dynamic": True, "residual": True},
            {"qscheme": "per_group", "group_size": 32, "observer": "mse", "is_dynamic": True},
        ]
    ),
)
quant_configs = st.builds(
    QuantizationConfig,
    weight=st.none() | specs | staged,
    input_tensors=st.none() | activations,
    output_tensors=st.none() | activations,
    bias=st.none() | st.just(QuantizationSpec(dtype="int8", qscheme="per_tensor")),
)
attentions = st.builds(AttentionConfig, key=activations, value=st.none() | activations, query=st.none() | activations)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)
codes = st.just(RTNConfig()) | st.builds(
    GPTQConfig,
    damping=st.floats(1e-9, 0.999),
    order=st.sampled_from(["activation", "none", "group-aware"]),
    block_size=st.integers(1, 512),
    refits=st.integers(0, 10),
)
scalings = st.none() | st.just((ScalingLayer("a", ("b", "c")), ScalingLayer("d", ("e",))))
searches = st.builds(
    AWQConfig,
    alpha=st.none() | st.floats(0, 1),
    duo_scale=st.sampled_from([True, False, "both"]),
    clip=st.booleans(),
    scaling_layers=scalings,
) | st.builds(SmoothQuantConfig, sample_tokens=st.integers(1, 10**6), scaling_layers=scalings)
algorithms = st.tuples(codes) | st.tuples(searches, codes)
configs = st.builds(
    Config,
    global_quant_config=quant_configs,
    layer_type_quant_config=st.dictionaries(names, quant_configs, max_size=2),
    layer_quant_config=st.dictionaries(names, quant_configs, max_size=3),
    exclude=st.lists(names, max_size=2).map(tuple),
    algo_config=algorithms,
    attention=st.none() | attentions,
    calibration=st.builds(CalibrationConfig, st.integers(1, 10**6), st.integers(2, 10**6)),
    seed=st.integers(-(2**40), 2**40),
)


@given(configs)
@settings(max_examples=60, deadline=None)
def test_any_config_survives_yaml_and_plain_data(config):
    again = Config.from_dict(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert list(again.layer_quant_config) == list(config.layer_quant_config)
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


class TestShorthands:
    @pytest.mark.parametrize("name", [f"W{bits}A16{form}" for bits in (8, 4, 3, 2) for form in ("", "_ASYM")])
    def test_a_schemes_name_stands_for_its_spec_written_out(self, name):
        weight = {"dtype": ("uint" if name.endswith("_ASYM") else "int") + name[1], "qscheme": "per_group"}
        weight |= {"group_size": 128, "symmetric": not name.endswith("_ASYM")}
        long = Config.from_dict({"global_quant_config": {"weight": weight}})
        assert Config.from_dict({"scheme": name}) == long
        assert Config.from_dict({"global_quant_config": name}) == long

    def test_a_schemes_name_may_hold_the_kv_cache(self):
        config, cache = parse_scheme("W4A16KV8")
        assert Config.from_dict({"scheme": "W4A16KV8"}) == Config(config, attention=cache)
        with pytest.raises(ConfigError, match="either in the scheme or in attention"):
            Config.from_dict({"scheme": "W4A16KV8", "attention": {"key": {"dtype": "float16"}}})

    def test_group_size_changes_the_scheme(self):
        config = Config.from_dict({"scheme": "W4A16", "group_size": 32})
        assert config.global_quant_config == scheme_config("W4A16", 32)

    def test_group_size_minus_one_is_per_channel(self):
        spec = Config.from_dict({"scheme": "W4A16", "group_size": -1}).global_quant_config.weight
        assert (spec.qscheme, spec.group_size) == ("per_channel", None)

    @pytest.mark.parametrize("whole", ["W8A8", "FP8_DYNAMIC", "NVFP4", "FP8_BLOCK"])
    def test_group_size_reaches_only_what_has_groups(self, whole):
        config = Config.from_dict({"scheme": whole, "group_size": 32, "layer_quant_config": {"a": "W4A16"}})
        assert config.global_quant_config == scheme_config(whole)
        assert config.layer_quant_config["a"] == scheme_config("W4A16", 32)
        config = Config.from_dict({"scheme": "W4A16", "group_size": 32, "layer_type_quant_config": {"Linear": whole}})
        assert config.layer_type_quant_config["Linear"] == scheme_config(whole)
        for layers in ({}, {"a": whole}, {"a": {"weight": {"dtype": "int4", "group_size": 16}}}):
            with pytest.raises(ConfigError, match=r"group_size 32.*leave it out"):
                Config.from_dict({"scheme": whole, "group_size": 32, "layer_quant_config": layers})

    def test_group_size_sizes_named_schemes_of_layers_but_not_specs_written_out(self):
        written = {"weight": {"dtype": "int8", "qscheme": "per_group", "group_size": 16}}
        config = Config.from_dict(
            {"scheme": "W4A16", "group_size": 32, "layer_quant_config": {"a": "W8A16", "b": written}}
        )
        assert config.layer_quant_config["a"].weight.group_size == 32
        assert config.layer_quant_config["b"].weight.group_size == 16

    @pytest.mark.parametrize(("name", "algorithm"), [("gptq", GPTQConfig()), ("rtn", RTNConfig())])
    def test_an_algorithms_name_stands_for_its_defaults(self, name, algorithm):
        for field in ("algorithm", "algo_config"):
            assert Config.from_dict({"scheme": "W4A16", field: name}).algo_config == (algorithm,)
            assert Config.from_dict({"scheme": "W4A16", field: [name]}).algo_config == (algorithm,)
            assert Config.from_dict({"scheme": "W4A16", field: {"name": name}}).algo_config == (algorithm,)
        assert algorithm_configs(algorithm) == (algorithm,)

    def test_two_algorithms_are_joined_by_plus_or_listed_and_the_search_goes_first(self):
        expected = (AWQConfig(), GPTQConfig())
        for written in ("awq+gptq", ["awq", "gptq"], ["gptq", {"name": "awq"}], [AWQConfig(), GPTQConfig()]):
            assert Config.from_dict({"scheme": "W4A16", "algorithm": written}).algo_config == expected

    @pytest.mark.parametrize("search", ["awq", "smoothquant"])
    def test_a_search_alone_rounds_to_nearest_after_it(self, search):
        config = Config.from_dict({"scheme": "W4A16", "algorithm": search})
        assert [algorithm.name for algorithm in config.algo_config] == [search, "rtn"]

    def test_without_an_algorithm_it_is_gptq(self):
        assert Config.from_dict({"scheme": "W4A16"}).algo_config == (GPTQConfig(),)

    def test_one_pattern_may_stand_alone(self):
        assert Config.from_dict({"scheme": "W4A16", "exclude": "lm_head"}).exclude == ("lm_head",)

    def test_objects_may_stand_where_data_does(self):
        data = {"global_quant_config": scheme_config("W4A16"), "algo_config": GPTQConfig(refits=2)}
        assert Config.from_dict(data) == Config(scheme_config("W4A16"), algo_config=GPTQConfig(refits=2))
        assert Config.from_dict(data).codes == GPTQConfig(refits=2)

    def test_the_data_given_is_left_as_it_was(self):
        data = yaml.safe_load(FULL)
        before = copy.deepcopy(data)
        Config.from_dict(data)
        assert data == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"scheme": "W5A61"}, "unknown scheme 'W5A61'", id="unknown-scheme"),
        pytest.param({"scheme": "W4A16", "global_quant_config": "W4A16"}, "scheme or global_quant_config", id="both"),
        pytest.param({"algorithm": "rtn", "algo_config": "rtn"}, "algorithm or algo_config", id="both-algorithms"),
        pytest.param({"scheme": None}, "needs a scheme", id="no-scheme"),
        pytest.param({"schema": "W4A16"}, "no field 'schema'; did you mean 'scheme'", id="unknown-field"),
        pytest.param({"algorithm": "gtpq"}, "unknown algorithm 'gtpq'; did you mean 'gptq'", id="unknown-algorithm"),
        pytest.param({"algorithm": {"damping": 0.1}}, "unknown algorithm None", id="nameless-algorithm"),
        pytest.param({"algorithm": {"name": "rtn", "damping": 0.1}}, "no field 'damping'", id="anothers-option"),
        pytest.param({"algorithm": 4}, "must be a name or a table", id="algorithm-number"),
        pytest.param({"algorithm": ["gptq", 4]}, "must be a name or a table", id="algorithm-list-number"),
        pytest.param({"algorithm": "gptq+rtn"}, "gptq, rtn: only one can find the codes", id="two-codes"),
        pytest.param({"algorithm": {"name": "awq", "alhpa": 1}}, "did you mean 'alpha'", id="awq-option"),
        pytest.param({"attention": {}}, "name a spec for key, value", id="attention-empty"),
        pytest.param({"attention": {"keys": {"dtype": "float16"}}}, "did you mean 'key'", id="attention-field"),
        pytest.param({"attention": {"key": {"dtyp": "int8"}}}, "did you mean 'dtype'", id="attention-spec-field"),
        pytest.param({"attention": "KV8"}, "attention", id="attention-text"),
        pytest.param({"calibration": 128}, "calibration: must be a table", id="calibration-number"),
        pytest.param({"calibration": {"num_sample": 1}}, "did you mean 'num_samples'", id="calibration-field"),
        pytest.param({"layer_quant_config": ["a"]}, "layer_quant_config must be a table", id="layers-list"),
        pytest.param({"layer_quant_config": {"a": "W9"}}, "unknown scheme 'W9'", id="layer-scheme"),
        pytest.param({"layer_quant_config": {"a": {"weight": "int4"}}}, "weight: must be a table", id="weight-text"),
        pytest.param({"layer_quant_config": {"a": {"weight": {"bits": 4}}}}, "no field 'bits'", id="spec-field"),
        pytest.param({"layer_quant_config": {1: "W8A16"}}, "layer_quant_config", id="layer-number"),
        pytest.param({"group_size": 0}, "group size", id="group-size-0"),
        pytest.param({"group_size": 32.5}, "group_size", id="group-size-fraction"),
        pytest.param({"group_size": "big"}, r"group.size.*big", id="group-size-text"),
        pytest.param({"exclude": 3}, "exclude", id="exclude-number"),
        pytest.param({"exclude": [3]}, "exclude", id="exclude-numbers"),
        pytest.param({"seed": "x"}, "seed", id="seed-text"),
        pytest.param({3: "x"}, "no field 3", id="field-number"),
        pytest.param({"scheme": {3: "x"}}, "3", id="config-field-number"),
        pytest.param({"scheme": {3: "x"}, "group_size": 32}, "no field 3", id="sized-config-field-number"),
        pytest.param({"scheme": 3, "group_size": 32}, "must be a table", id="sized-scheme-number"),
    ],
)
def test_a_recipe_that_cannot_be_honoured_is_one_sentence(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Config.from_dict({"scheme": "W4A16"} | fields)
    assert "\n" not in str(caught.value)


def test_short_forms_are_read_the_same_wherever_they_stand():
    short = {"scheme": "W4A16KV8", "group_size": 32, "algorithm": "rtn"}
    assert Config(**short) == Config.from_dict(short)
    with pytest.raises(ConfigError, match="group_size needs a scheme"):
        Config(scheme_config("W4A16"), group_size=32)


SHORT = [
    {"scheme": "W8A16"},
    {"group_size": 32},
    {"group_size": -1},
    {"scheme": "W2A16_ASYM", "group_size": 16},
    {"algorithm": "rtn"},
    {"seed": 3},
    {"seed": 0},
]


class TestMergeRecipe:
    """What the command line and `fewbit.quantize` do with their short arguments."""

    @pytest.mark.parametrize("given", SHORT, ids=str)
    @pytest.mark.parametrize("recipe", ["{scheme: W4A16, seed: 9, exclude: [lm_head]}", FULL], ids=["short", "full"])
    def test_short_arguments_are_the_same_fields_written_in_the_recipe(self, given, recipe):
        data = yaml.safe_load(recipe)
        merged = merge_recipe(data, **given)
        if "scheme" in given:
            data.pop("global_quant_config", None)
        if "algorithm" in given:
            data.pop("algo_config", None)
        assert merged == Config.from_dict(data | given)

    @pytest.mark.parametrize("given", SHORT, ids=str)
    def test_a_config_object_merges_like_the_recipe_it_was_read_from(self, given):
        data = {"scheme": "W4A16", "algorithm": {"name": "gptq", "refits": 4}, "seed": 9, "exclude": ["lm_head"]}
        assert merge_recipe(Config.from_dict(data), **given) == merge_recipe(data, **given)

    def test_short_arguments_alone_are_a_recipe(self):
        merged = merge_recipe(None, scheme="W4A16", group_size=64, algorithm="rtn", num_samples=4, sequence_length=8)
        assert merged == Config(
            scheme_config("W4A16", 64), algo_config=RTNConfig(), calibration=CalibrationConfig(4, 8)
        )

    def test_arguments_that_were_not_given_change_nothing(self):
        config = Config.from_dict(yaml.safe_load(FULL))
        nothing = dict.fromkeys(("scheme", "group_size", "algorithm", "num_samples", "sequence_length", "seed"))
        assert merge_recipe(config, **nothing) == config

    def test_each_length_overrides_only_itself(self):
        config = Config.from_dict(yaml.safe_load(FULL))
        merged = merge_recipe(config, num_samples=50)
        assert merged == dataclasses.replace(config, calibration=CalibrationConfig(50, 99))
        merged = merge_recipe(config, sequence_length=50)
        assert merged == dataclasses.replace(config, calibration=CalibrationConfig(7, 50))

    def test_what_the_arguments_do_not_name_stays(self):
        config = Config.from_dict(yaml.safe_load(FULL))
        assert merge_recipe(config, scheme="W8A16") == dataclasses.replace(
            config, global_quant_config=scheme_config("W8A16")
        )

    def test_an_algorithm_object_is_taken_as_it_is(self):
        assert merge_recipe(None, scheme="W4A16", algorithm=GPTQConfig(refits=5)).codes.refits == 5

    def test_naming_the_recipes_algorithms_keeps_their_options(self):
        recipe = {"scheme": "W4A16", "algorithm": [{"name": "awq", "n_grid": 7}, {"name": "gptq", "refits": 4}]}
        kept = merge_recipe(recipe, algorithm="awq+gptq")
        assert kept.algo_config == (AWQConfig(n_grid=7), GPTQConfig(refits=4))
        assert merge_recipe(recipe, algorithm="gptq").algo_config == (GPTQConfig(),)

    def test_nothing_at_all_is_no_recipe(self):
        with pytest.raises(ConfigError, match="needs a scheme"):
            merge_recipe(None)

    def test_arguments_are_checked_like_fields(self):
        with pytest.raises(ConfigError, match="num_samples"):
            merge_recipe(None, scheme="W4A16", num_samples=0)
