"""What is in a run: the plan says before the work what the checkpoint says after it."""

import pytest
import torch

import fewbit
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.recipe import Config
from fewbit.errors import CheckpointError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.runs.plan import make_plan
from fewbit.runs.quantize import open_model

INPUTS = {"dtype": "int8", "qscheme": "per_token", "observer": "minmax", "is_dynamic": True}
RECIPES = {
    "weights": {"scheme": "W4A16", "group_size": 32},
    "mixed": {"scheme": "W8A8_STATIC", "layer_quant_config": {"*.down_proj": "W4A16-g32"}, "exclude": ["*.0.mlp.*"]},
    "cache": {"scheme": "NVFP4KVFP8"},
    "folded scales": {"scheme": "W8A8", "algorithm": "smoothquant+rtn"},
    "inputs alone": {"global_quant_config": {"input_tensors": INPUTS, "output_tensors": INPUTS}},
}


def run_of(model, recipe, output):
    """What the plan said, and the finished run."""
    config = Config.from_dict({"algorithm": "rtn"} | recipe)
    data = torch.randint(1, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    fewbit.quantize(model, config=config, output=output, calibration=data, device="cpu", progress=False)
    return make_plan(open_model(model), config).contents, NativeCheckpoint(output)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_plan_says_before_the_work_what_the_checkpoint_says_after_it(checkpoint, tmp_path, family, recipe):
    planned, made = run_of(checkpoint(family), RECIPES[recipe], tmp_path / "run")
    assert made.contents == planned
    assert planned.activations == {name: known.spec for name, known in made.activations().items()}
    assert {linear.weight_name: (linear.weight, linear.shape) for linear in planned.weights} == made.quantized
    assert planned.model_type == family
    assert planned.tied == ({} if family == "llama" else {"lm_head.weight": "model.embed_tokens.weight"})
    for linear in planned.linears.values():
        inside = linear.block is not None
        assert linear.name == (f"{planned.blocks}.{linear.block}.{linear.role}" if inside else "lm_head")
    assert "lm_head" in planned.unquantized
    assert {known.kind for known in planned.attention.values()} == {type_of_attention(family)}
    assert all(bool(known.specs) == (recipe == "cache") for known in planned.attention.values())


def type_of_attention(family):
    return {"llama": "LlamaAttention", "qwen3": "Qwen3Attention", "gemma3_text": "Gemma3Attention"}[family]


def test_a_familys_fused_linears_are_those_of_one_module_that_share_an_input(random_model, checkpoint):
    def fused(model):
        plan = make_plan(model, Config.from_dict({"scheme": "W4A16", "group_size": 32}))
        return [names for names in plan.contents.fused if ".0." in names[0]]

    attention = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    mlp = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert fused(BlockwiseModel.from_directory(checkpoint("llama"))) == [attention, mlp]
    assert fused(BlockwiseModel.from_module(random_model("phi"))) == [attention]  # its MLP has the same input


@pytest.mark.parametrize("told", [None, {}, [], {"linears": {}}, {"linears": {"m": {"name": 3}}}])
def test_a_manifest_that_does_not_say_what_is_in_the_run_is_named(finished_run, tmp_path, told):
    run = tmp_path / "run"
    run.symlink_to(finished_run("llama"))
    made = NativeCheckpoint(run)
    made.manifest["contents"] = told
    with pytest.raises(CheckpointError, match=r"fewbit\.json is damaged: it does not say what the blocks' files"):
        assert made.contents


def test_bits_per_weight_are_those_of_all_weights(checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    recipe = {"scheme": "W4A16", "group_size": 32, "layer_quant_config": {"*.down_proj": "W8A16"}}
    contents = make_plan(model, Config.from_dict(recipe)).contents
    down = 64 * 128 / (64 * 128 * 3 + 64 * 64 * 2 + 64 * 32 * 2)
    assert contents.bits_per_weight == pytest.approx((1 - down) * 4.5 + down * 8.5)
