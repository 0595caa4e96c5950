"""Every named scheme from a checkpoint to a run, an export and an evaluation; mixtures; the same bytes either way."""

import json
import math

import pytest
import torch
from walks import TENSOR, TOKEN, WEIGHT, walk

import fewbit
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.config.recipe import Config
from fewbit.config.schemes import KV_CACHES, SCHEMES
from fewbit.config.spec import AttentionConfig, QuantizationSpec
from fewbit.contents import nominal
from fewbit.errors import ConfigError
from fewbit.formats import holding
from fewbit.formats.compressed_tensors import layouts
from fewbit.nn.quantizer import quantize_matrix

IDS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(5))
ALGORITHMS = ["rtn", "gptq"]
# Relative squared error that a weight of so many bits may have; activations add theirs to the divergence only.
WORST = {2: 0.3, 3: 0.07, 4: 0.03, 5: 0.01, 6: 0.004, 8: 2e-3}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, random_model, tokenizer):
    """A bfloat16 checkpoint of one block whose dimensions every scheme's groups divide."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "initializer_range": 0.09}
    shape["head_dim"] = 64  # keys of 128 rows: blocks end where fused linears do
    random_model("llama", **shape).bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def run_of(wide, tmp_path_factory):
    """run_of(scheme, algorithm): directory of a run of the wide checkpoint, made once."""
    made = {}

    def run(scheme, algorithm="rtn"):
        if (scheme, algorithm) not in made:
            output = tmp_path_factory.mktemp("format") / "run"
            made[scheme, algorithm] = walk(wide, output, {"scheme": scheme, "algorithm": algorithm})
        return made[scheme, algorithm]

    return run


def report_of(run):
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def quantized_rows(run):
    return [row for row in report_of(run)["linears"] if row["status"] == "quantized"]


def contents(run):
    """Every tensor of a run's blocks as bytes."""
    return {file.name: file.read_bytes() for file in sorted((run / "blocks").iterdir())}


# --- every scheme ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_quantizes_what_it_says(run_of, name, algorithm):
    run, config = run_of(name, algorithm), SCHEMES[name]
    made = NativeCheckpoint(run)
    assert {spec for spec, _ in made.quantized.values()} == {config.weight}
    assert len(made.quantized) == 7
    inputs = {known.spec for known in made.activations().values()}
    assert inputs == ({config.input_tensors} if config.input_tensors is not None else set())
    for row in quantized_rows(run):
        assert 0 < row["loss"] < WORST[config.weight.bits]
        assert row["fallback"] is None
        rows, columns = made.quantized[f"{row['name']}.weight"][1]
        assert row["bits_per_weight"] * rows * columns == config.weight.stored_bits((rows, columns), torch.bfloat16)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_exported_where_it_says_so_and_the_export_computes_what_the_run_does(
    run_of, wide, name, algorithm
):
    run = fewbit.Run(run_of(name, algorithm))
    ours = fewbit.evaluate(run, IDS, against=wide)
    assert 0 < ours.kl_mean < (1.0 if name.startswith("W2") else 0.3)
    if not holding(nominal(SCHEMES[name])):
        with pytest.raises(ConfigError, match=r"compressed-tensors: .* (e8m0|microexponent) scales"):
            run.export("compressed-tensors")
        return
    theirs = fewbit.evaluate(run.export("compressed-tensors"), IDS, against=wide)
    (verified,) = run.verify()
    assert verified.quantized == 7
    assert verified.activations == (7 if SCHEMES[name].input_tensors is not None else 0)
    assert theirs.perplexity == pytest.approx(ours.perplexity, rel=1e-6)
    assert theirs.kl_mean == pytest.approx(ours.kl_mean, rel=1e-6, abs=1e-9)
    config = json.loads((run.directory / "exports/compressed-tensors/config.json").read_text(encoding="utf-8"))
    assert [config["quantization_config"]["format"]] == layouts(nominal(SCHEMES[name]))


@pytest.mark.parametrize("name", ["MX9", "W8A8KV8", "W4A16KV4"])
def test_an_export_that_is_impossible_is_refused_before_the_work(wide, tmp_path, name):
    with pytest.raises(ConfigError, match="compressed-tensors: "):
        walk(wide, tmp_path / "run", {"scheme": name}, export=["compressed-tensors"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", KV_CACHES)
@pytest.mark.parametrize("base", ["W8A16", "W4A8"])
def test_every_cache_composes_with_a_scheme(run_of, wide, dequantized, suffix, base):
    spec = KV_CACHES[suffix]
    run = fewbit.Run(run_of(f"{base}{suffix}"))
    activations = NativeCheckpoint(run.directory).activations()
    assert activations["model.layers.0.self_attn.key"].spec == spec
    assert activations["model.layers.0.self_attn.value"].spec == spec
    ours, plain = (fewbit.evaluate(found, IDS, against=wide) for found in (run, run_of(base)))
    assert fewbit.evaluate(run, IDS, against=dequantized(run.directory)).kl_mean > 1e-6  # more than its weights
    assert ours.kl_mean < plain.kl_mean + (0.3 if suffix == "KV4" else 0.01)
    inside = AttentionConfig(key=spec, value=spec)
    assert run.report["attention"] == {"modules": 1, "key": spec.summary, "value": spec.summary}
    assert report_of(run_of(base))["attention"] is None
    if not holding(nominal(attention=inside)):
        with pytest.raises(ConfigError, match="a dynamic KV cache"):
            run.export("compressed-tensors")
    else:
        assert fewbit.evaluate(run.export("compressed-tensors"), IDS, against=wide) == ours
        assert run.verify()[0].activations == len(activations)


def test_a_composed_name_is_the_scheme_with_that_group_size_and_cache(run_of):
    made = NativeCheckpoint(run_of("W4A8KV4-g64"))
    assert {spec.group_size for spec, _ in made.quantized.values()} == {64}
    assert made.activations()["model.layers.0.mlp.up_proj.input"].spec == SCHEMES["W4A8"].input_tensors
    assert made.activations()["model.layers.0.self_attn.key"].spec == KV_CACHES["KV4"]


@pytest.mark.parametrize("name", ["W4A16", "NVFP4A16", "MXFP4A16", "W3A16_ASYM"])
def test_gptq_loses_less_than_rounding_on_grids_of_every_kind(run_of, name):
    plain, compensated = (report_of(run_of(name, algorithm))["totals"]["loss"] for algorithm in ALGORITHMS)
    assert compensated < 0.9 * plain


# --- mixtures -------------------------------------------------------------------------------------------------------

MIXTURES = {
    "FP4 MLP, FP8 attention": ({"scheme": "FP8_DYNAMIC", "layer_quant_config": {"*.mlp.*": "NVFP4"}}, 7),
    "FP8 cache, INT8 down": (
        {"scheme": "W4A16KVFP8", "layer_quant_config": {"*.down_proj": "W8A8_STATIC", "*.o_proj": "MXFP4"}}, 4,
    ),
    "only the MLP": ({"scheme": "NVFP4", "exclude": ["*.self_attn.*", "lm_head"]}, 3),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_what_its_rules_say_and_survives_its_export(wide, tmp_path, name, algorithm):
    recipe, inputs = MIXTURES[name]
    run = fewbit.Run(walk(wide, tmp_path / "run", recipe | {"algorithm": algorithm}))
    warnings = report_of(run.directory)["warnings"]
    assert [warning for warning in warnings if "calibration tokens are fewer" not in warning] == []
    made = NativeCheckpoint(run.directory)
    specs = {key.removeprefix("model.layers.0.").removesuffix(".weight"): spec for key, (spec, _) in
             made.quantized.items()}  # fmt: skip
    if name == "FP4 MLP, FP8 attention":
        assert {key.partition(".")[0]: spec.dtype for key, spec in specs.items()} == {
            "self_attn": "e4m3", "mlp": "e2m1",
        }  # fmt: skip
    if name == "FP8 cache, INT8 down":
        assert (specs["mlp.down_proj"].dtype, specs["self_attn.o_proj"].scale_type) == ("int8", "e8m0")
    ours = fewbit.evaluate(run, IDS, against=wide)
    assert 0 < ours.kl_mean < 0.3
    assert fewbit.evaluate(run.export("compressed-tensors"), IDS, against=wide) == ours
    (verified,) = run.verify()
    assert verified.activations == inputs == len(made.activations())


def test_a_recipe_written_out_says_the_same_as_its_names(wide, run_of, tmp_path):
    recipe = Config.from_dict({"scheme": "FP8KVFP8", "algorithm": "rtn"}).to_dict()
    assert contents(walk(wide, tmp_path / "run", recipe)) == contents(run_of("FP8KVFP8"))


# --- two stages, biases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["per_tensor", "per_channel", "per_block"])
def test_the_first_of_two_stages_is_that_of_each_weight_alone(wide, tmp_path, first):
    stage = {"dtype": "e4m3", "qscheme": first} | ({"block_size": [128, 128]} if first == "per_block" else {})
    weight = {"dtype": "int4", "group_size": 64, "first_stage": stage}
    config = {"weight": weight, "input_tensors": {"dtype": "e4m3"} | TOKEN}
    run = NativeCheckpoint(walk(wide, tmp_path / "run", {"global_quant_config": config}, calibration="none"))
    source = SafetensorsSource(wide)
    for name, (spec, _) in run.quantized.items():
        expected = quantize_matrix(source.read([name])[name], spec)
        assert torch.equal(run.read_quantized(name).codes, expected.codes), name
        assert torch.equal(run.read_quantized(name).scale, expected.scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_with_a_spec_holds_values_of_its_grid_and_everything_else_is_as_without(checkpoint, tmp_path, dtype):
    recipe = {"global_quant_config": {"weight": WEIGHT}}
    plain = walk(checkpoint("qwen2", dtype), tmp_path / "plain", recipe)
    recipe["global_quant_config"]["bias"] = {"dtype": "int3"} | TENSOR
    run = walk(checkpoint("qwen2", dtype), tmp_path / "run", recipe)
    made, before = NativeCheckpoint(run), NativeCheckpoint(plain)
    biases = [name for name in made.info() if name.endswith(".bias")]
    assert len(biases) == 6
    for name in biases:
        ours, theirs = made.read([name])[name], before.read([name])[name]
        assert ours.dtype == theirs.dtype == dtype
        assert len(ours.unique()) <= 8 < len(theirs.unique())
        assert (ours - theirs).abs().max() < 0.6 * theirs.abs().max() / 3
    assert len(quantized_rows(run)) == len(quantized_rows(plain)) == 14
    found = fewbit.evaluate(run, IDS, against=plain)
    assert found.kl_mean > 1e-4  # the quantized biases are those that the next layers were calibrated behind
    exported = fewbit.Run(run).export("compressed-tensors")
    assert fewbit.evaluate(exported, IDS) == fewbit.evaluate(run, IDS)


# --- the same bytes, whatever is in memory --------------------------------------------------------------------------

STATIC_OUTPUTS = {"weight": WEIGHT, "output_tensors": {"dtype": "int8"} | TENSOR}
SAME = {
    "static": {"scheme": "W8A8_STATIC", "algorithm": "gptq"},
    "global scale": {"scheme": "NVFP4", "algorithm": "gptq"},
    "blocks": {"scheme": "MXFP4", "algorithm": "gptq"},
    "cache": {"scheme": "W8A8KVFP8", "algorithm": "gptq"},
    "outputs": {"global_quant_config": STATIC_OUTPUTS},
    "averaged": {"global_quant_config": {"weight": WEIGHT, "input_tensors":
                                         {"dtype": "int8"} | TENSOR | {"observer": "moving-average"}}},
    "smoothquant": {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+rtn"},
    "smoothquant with cache": {"scheme": "W8A8KV8", "algorithm": "smoothquant+gptq"},
    "drift": {"scheme": "W4A8", "group_size": 32, "algorithm": {"name": "gptq", "drift": 0.5}},
    "drift, static": {"scheme": "W8A8_STATICKVFP8", "algorithm": {"name": "gptq", "drift": 0.5, "drift_data": 0.6}},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_staged_and_replay_give_the_same_bytes(checkpoint, tmp_path, name):
    runs = {
        memory: walk(checkpoint("llama"), tmp_path / memory, SAME[name], activation_memory=memory)
        for memory in ("4GiB", "0")
    }
    assert [report_of(run)["run"]["forward"] for run in runs.values()] == ["staged", "replay"]
    assert contents(runs["4GiB"]) == contents(runs["0"])
    if "smoothquant" in name:
        assert any(row.get("scaling") is not None for row in report_of(runs["0"])["linears"])


def test_the_loss_of_finer_grids_is_smaller(run_of):
    for names in (("W2A16", "W3A16", "W4A16", "W8A16"), ("MXFP4A16", "NVFP4A16", "FP8_DYNAMIC"), ("MX6", "MX9")):
        losses = [report_of(run_of(name))["totals"]["loss"] for name in names]
        assert losses == sorted(losses, reverse=True), names
        assert all(math.isfinite(loss) for loss in losses)


def test_scales_of_a_run_have_the_dtype_of_their_kind(run_of):
    stored = {
        "W4A16": torch.bfloat16,
        "FP8_BLOCK": torch.bfloat16,
        "NVFP4": torch.float8_e4m3fn,
        "MXFP4": torch.float8_e8m0fnu,
        "MX9": torch.float8_e8m0fnu,
    }
    for name, dtype in stored.items():
        made = NativeCheckpoint(run_of(name))
        assert {made.read_quantized(weight).scale.dtype for weight in made.quantized} == {dtype}
    spec = QuantizationSpec(dtype="int8", qscheme="per_channel")
    assert spec.stored_scale_dtype(torch.bfloat16) == torch.bfloat16
