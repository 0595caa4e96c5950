import copy
import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.api import merge_recipe
from fewbit.config.recipe import CalibrationConfig, Config, GPTQConfig, RTNConfig, algorithm_config
from fewbit.config.schemes import SCHEMES, scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
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
exclude: [lm_head, "re:.*gate.*"]
algo_config: {name: gptq, damping: 0.05, order: group-aware, block_size: 32, refits: 3}
calibration: {num_samples: 7, sequence_length: 99}
seed: 5
"""


def from_text(text: str, directory) -> Config:
    file = directory / "recipe.yaml"
    file.write_text(text)
    return Config.from_yaml(file)


class TestYAML:
    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(FULL, id="everything"),
            pytest.param("scheme: W4A16", id="scheme"),
            pytest.param("{scheme: W2A16_ASYM, group_size: -1, algorithm: rtn, exclude: lm_head}", id="shorthands"),
            pytest.param("{scheme: W4A16, algorithm: {name: gptq, refits: 0}}", id="algorithm-options"),
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
        }
        assert config.exclude == ("lm_head", "re:.*gate.*")
        assert config.algo_config == GPTQConfig(damping=0.05, order="group-aware", block_size=32, refits=3)
        assert config.calibration == CalibrationConfig(num_samples=7, sequence_length=99)
        assert config.seed == 5

    def test_the_text_is_plain_yaml(self, tmp_path):
        assert "!!" not in from_text(FULL, tmp_path).to_yaml()

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file"):
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


specs = st.builds(
    lambda dtype, granularity, scale_dtype, rule: QuantizationSpec(
        dtype=dtype,
        qscheme=granularity[0],
        group_size=granularity[1],
        symmetric=not dtype.startswith("u"),
        scale_dtype=scale_dtype,
        observer=rule,
    ),
    st.sampled_from([f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)]),
    st.sampled_from([("per_tensor", None), ("per_channel", None), ("per_group", 16), ("per_group", 128)]),
    st.sampled_from(["checkpoint", "float32", "float16", "bfloat16"]),
    st.sampled_from(["search", "minmax"]),
)
quant_configs = st.builds(QuantizationConfig, weight=st.none() | specs)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)
algorithms = st.just(RTNConfig()) | st.builds(
    GPTQConfig,
    damping=st.floats(1e-9, 0.999),
    order=st.sampled_from(["activation", "none", "group-aware"]),
    block_size=st.integers(1, 512),
    refits=st.integers(0, 10),
)
configs = st.builds(
    Config,
    global_quant_config=quant_configs,
    layer_type_quant_config=st.dictionaries(names, quant_configs, max_size=2),
    layer_quant_config=st.dictionaries(names, quant_configs, max_size=3),
    exclude=st.lists(names, max_size=2).map(tuple),
    algo_config=algorithms,
    calibration=st.builds(CalibrationConfig, st.integers(1, 10**6), st.integers(2, 10**6)),
    seed=st.integers(-(2**40), 2**40),
)


@given(configs)
@settings(max_examples=30, deadline=None)
def test_any_config_survives_yaml_and_plain_data(config):
    again = Config.from_dict(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert list(again.layer_quant_config) == list(config.layer_quant_config)
    assert Config.from_dict(config.to_dict()) == config


class TestShorthands:
    @pytest.mark.parametrize("name", SCHEMES)
    def test_a_schemes_name_stands_for_its_spec_written_out(self, name):
        weight = {"dtype": ("uint" if name.endswith("_ASYM") else "int") + name[1], "qscheme": "per_group"}
        weight |= {"group_size": 128, "symmetric": not name.endswith("_ASYM")}
        long = Config.from_dict({"global_quant_config": {"weight": weight}})
        assert Config.from_dict({"scheme": name}) == long
        assert Config.from_dict({"global_quant_config": name}) == long

    def test_group_size_changes_the_scheme(self):
        config = Config.from_dict({"scheme": "W4A16", "group_size": 32})
        assert config.global_quant_config == scheme_config("W4A16", 32)

    def test_group_size_minus_one_is_per_channel(self):
        spec = Config.from_dict({"scheme": "W4A16", "group_size": -1}).global_quant_config.weight
        assert (spec.qscheme, spec.group_size) == ("per_channel", None)

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
            assert Config.from_dict({"scheme": "W4A16", field: name}).algo_config == algorithm
            assert Config.from_dict({"scheme": "W4A16", field: {"name": name}}).algo_config == algorithm
        assert algorithm_config(algorithm) is algorithm

    def test_one_pattern_may_stand_alone(self):
        assert Config.from_dict({"scheme": "W4A16", "exclude": "lm_head"}).exclude == ("lm_head",)

    def test_objects_may_stand_where_data_does(self):
        data = {"global_quant_config": scheme_config("W4A16"), "algo_config": GPTQConfig(refits=2)}
        assert Config.from_dict(data) == Config(scheme_config("W4A16"), algo_config=GPTQConfig(refits=2))

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
        pytest.param({"algorithm": ["gptq"]}, "must be a table", id="algorithm-list"),
        pytest.param({"calibration": 128}, "calibration must be a table", id="calibration-number"),
        pytest.param({"calibration": {"num_sample": 1}}, "did you mean 'num_samples'", id="calibration-field"),
        pytest.param({"layer_quant_config": ["a"]}, "layer_quant_config must be a table", id="layers-list"),
        pytest.param({"layer_quant_config": {"a": "W9"}}, "unknown scheme 'W9'", id="layer-scheme"),
        pytest.param({"layer_quant_config": {"a": {"weight": "int4"}}}, "weight must be a table", id="weight-text"),
        pytest.param({"layer_quant_config": {"a": {"weight": {"bits": 4}}}}, "no field 'bits'", id="spec-field"),
        pytest.param({"layer_quant_config": {1: "W8A16"}}, "layer_quant_config", id="layer-number"),
        pytest.param({"group_size": 0}, "group size", id="group-size-0"),
        pytest.param({"group_size": 32.5}, "group_size", id="group-size-fraction"),
        pytest.param({"group_size": "big"}, r"group.size.*big", id="group-size-text"),
        pytest.param({"exclude": 3}, "exclude", id="exclude-number"),
        pytest.param({"exclude": None}, "exclude", id="exclude-nothing"),
        pytest.param({"exclude": [3]}, "exclude", id="exclude-numbers"),
        pytest.param({"seed": "x"}, "seed", id="seed-text"),
        pytest.param({3: "x"}, "no field 3", id="field-number"),
        pytest.param({"scheme": {3: "x"}}, "3", id="config-field-number"),
    ],
)
def test_a_recipe_that_cannot_be_honoured_is_one_sentence(fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Config.from_dict({"scheme": "W4A16"} | fields)
    assert "\n" not in str(caught.value)


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
        assert merge_recipe(None, scheme="W4A16", algorithm=GPTQConfig(refits=5)).algo_config.refits == 5

    def test_nothing_at_all_is_no_recipe(self):
        with pytest.raises(ConfigError, match="needs a scheme"):
            merge_recipe(None)

    def test_arguments_are_checked_like_fields(self):
        with pytest.raises(ConfigError, match="num_samples"):
            merge_recipe(None, scheme="W4A16", num_samples=0)
