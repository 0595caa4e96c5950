"""What will be done to which linear, decided and checked before any work."""

import re

import pytest

from fewbit.config.recipe import Config
from fewbit.errors import ConfigError
from fewbit.models.architecture import members_of
from fewbit.models.blockwise import BlockwiseModel
from fewbit.runs.plan import make_plan

W8 = "W8A16"


@pytest.fixture(scope="module")
def model(checkpoint):
    return BlockwiseModel.from_directory(checkpoint("llama"))


def plan_of(model, **recipe):
    return make_plan(model, Config.from_dict({"scheme": "W4A16", "group_size": 32} | recipe))


def statuses(plan):
    return {name: linear.status for name, linear in plan.contents.linears.items()}


def test_every_linear_of_the_model_has_a_place_in_the_plan(model):
    plan = plan_of(model)
    assert set(plan.contents.linears) == set(model.linears())
    assert plan.contents.unquantized == ["lm_head"]
    assert plan.contents.linears["lm_head"].status == "skipped"
    assert plan.contents.linears["lm_head"].reason == "outside the blocks' groups"
    assert set(statuses(plan).values()) == {"quantized", "skipped"}
    assert plan.warnings == []


def test_exclude_leaves_out_and_says_by_which_pattern(model):
    plan = plan_of(model, exclude=["*.0.mlp.*", "lm_head"])
    assert {name for name, status in statuses(plan).items() if status == "excluded"} == {
        "lm_head",
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    assert plan.contents.linears["lm_head"].reason == "exclude 'lm_head'"
    quantized = {name for name in statuses(plan) if plan.contents.linears[name].weight is not None}
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    assert quantized == {
        *(f"model.layers.0.{name}" for name in attention),
        *(f"model.layers.1.{name}" for name in members_of(model.groups(1))),
    }


@pytest.mark.parametrize("group_size", [48, 128, 256])
def test_a_group_size_that_does_not_divide_names_layer_and_inputs(model, group_size):
    with pytest.raises(
        ConfigError, match=rf"group size {group_size} does not divide the 64 inputs of '(\S+)'"
    ) as caught:
        plan_of(model, group_size=group_size)
    layer = re.search(r"of '(\S+)'", str(caught.value))[1]
    assert model.linears()[layer].in_features == 64


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group_size"), [(64, 128, 48), (64, 128, 128), (64, 96, 64), (64, 96, 48), (96, 80, 64)]
)
def test_the_group_size_that_is_advised_fits_the_whole_model(random_model, hidden, intermediate, group_size):
    model = BlockwiseModel.from_module(random_model("llama", hidden_size=hidden, intermediate_size=intermediate))
    with pytest.raises(ConfigError, match="does not divide") as caught:
        plan_of(model, group_size=group_size)
    advised = int(re.search(r"--group-size (-?\d+)", str(caught.value))[1])
    assert advised != group_size
    assert set(statuses(plan_of(model, group_size=advised)).values()) == {"quantized", "skipped"}


def test_per_channel_is_advised_where_no_group_size_fits(random_model):
    model = BlockwiseModel.from_module(random_model("llama", hidden_size=68, intermediate_size=68, head_dim=16))
    with pytest.raises(ConfigError, match="use --group-size -1"):
        plan_of(model)
    assert set(statuses(plan_of(model, group_size=-1)).values()) == {"quantized", "skipped"}


def test_an_excluded_layer_need_not_divide(model):
    plan = plan_of(model, group_size=128, exclude=["*.self_attn.*", "*.gate_proj", "*.up_proj"])
    assert [name for name, status in statuses(plan).items() if status == "quantized"] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_groups_of_every_tensor_of_a_linear_are_checked(model):
    def config(**options):
        return {"scheme": None, "global_quant_config": {"weight": {"group_size": 32}} | options}

    bad = {"qscheme": "per_group", "group_size": 48, "observer": "minmax"}
    for options in (
        {"bias": bad},
        {"input_tensors": bad | {"is_dynamic": True}},
        {"output_tensors": bad | {"is_dynamic": True}},
        {"weight": {"group_size": 32, "first_stage": bad | {"dtype": "e4m3"}}},
    ):
        recipe = {name: value for name, value in config(**options).items() if value is not None}
        with pytest.raises(ConfigError, match="group size 48 does not divide"):
            make_plan(model, Config.from_dict(recipe))


@pytest.mark.parametrize("recipe", [{"exclude": ["*"]}, {"exclude": ["*_proj"]}, {"scheme": None}])
def test_a_recipe_that_quantizes_nothing_is_an_error(model, recipe):
    if "scheme" in recipe:
        config = Config.from_dict({"global_quant_config": {"weight": None}})
    else:
        config = Config.from_dict({"scheme": "W4A16", "group_size": 32} | recipe)
    with pytest.raises(ConfigError, match="quantizes nothing"):
        make_plan(model, config)


@pytest.mark.parametrize("pattern", ["lm_head", "*head", "re:lm_.*"])
def test_a_spec_for_a_layer_outside_the_blocks_is_an_error_that_names_it(model, pattern):
    with pytest.raises(ConfigError, match="'lm_head' cannot be quantized: it is in no group"):
        plan_of(model, layer_quant_config={pattern: W8})


@pytest.mark.parametrize("field", ["exclude", "layer_quant_config", "layer_type_quant_config"])
def test_what_matches_nothing_is_an_error_that_names_field_and_pattern(model, field):
    value = ["*.k_porj"] if field == "exclude" else {"*.k_porj": W8}
    with pytest.raises(ConfigError, match=rf"{field}.*'\*\.k_porj'"):
        plan_of(model, **{field: value})


@pytest.mark.parametrize(
    ("recipe", "group"),
    [
        ({"layer_quant_config": {"*.v_proj": W8}}, "self_attn.{q_proj, k_proj, v_proj}"),
        ({"exclude": ["*.up_proj"]}, "mlp.{gate_proj, up_proj}"),
    ],
)
def test_mixed_specs_in_a_group_that_engines_fuse_give_a_warning(model, recipe, group):
    (warning,) = plan_of(model, **recipe).warnings
    assert "2 groups" in warning
    assert f"model.layers.0.{group}" in warning


@pytest.mark.parametrize(
    "recipe",
    [
        {"layer_quant_config": {"*.down_proj": W8}},
        {"layer_quant_config": {"re:.*(q|k|v)_proj": W8}},
        {"exclude": ["model.layers.1.*"]},
    ],
)
def test_unlike_specs_of_different_groups_give_no_warning(model, recipe):
    assert plan_of(model, **recipe).warnings == []


def test_mixed_specs_keep_their_group_size_and_their_shared_stage(model):
    plan = plan_of(model, layer_quant_config={"*.v_proj": W8})
    assert plan.contents.linears["model.layers.1.self_attn.v_proj"].weight.bits == 8
    assert plan.contents.linears["model.layers.1.self_attn.q_proj"].weight.bits == 4


def test_a_search_without_weights_to_quantize_is_refused(model):
    inputs = {"dtype": "int8", "qscheme": "per_token", "observer": "minmax", "is_dynamic": True}
    with pytest.raises(ConfigError, match="smoothquant"):
        make_plan(
            model, Config.from_dict({"global_quant_config": {"input_tensors": inputs}, "algorithm": "smoothquant"})
        )
