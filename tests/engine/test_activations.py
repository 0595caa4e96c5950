"""Quantized activations in the walk: what linears meet, where static scales come from, what is refused."""

import json

import pytest
import torch
from walks import TENSOR, TOKEN, TOKENS, WEIGHT, batches, counted, emulate, run_through, walk, watch

import fewbit
from fewbit.calibration.observers import make_observer
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.errors import ArchitectureError, CalibrationError, ConfigError

NVFP4 = {
    "dtype": "e2m1", "group_size": 16, "scale_type": "e4m3", "observer": "minmax", "is_dynamic": True,
}  # fmt: skip
INT4_TOKEN = {"dtype": "int4"} | TOKEN
INT4_STATIC = {"dtype": "int4"} | TENSOR
FLOWS = {
    "dynamic": {"input_tensors": INT4_TOKEN},
    "static": {"input_tensors": INT4_STATIC},
    "static, affine": {"input_tensors": {"dtype": "uint4", "symmetric": False} | TENSOR},
    "residual": {"input_tensors": {"dtype": "int2", "residual": True} | TOKEN},
    "groups": {"input_tensors": {"dtype": "int4", "group_size": 16, "observer": "minmax", "is_dynamic": True}},
    "global scale": {"input_tensors": NVFP4},
    "outputs": {"output_tensors": INT4_TOKEN},
    "biases": {"bias": {"dtype": "int2"} | TENSOR},
    "static outputs": {"output_tensors": {"dtype": "int5"} | TENSOR, "input_tensors": INT4_STATIC},
}
KVFP8 = {"scheme": "W8A16KVFP8", "group_size": 32}
CACHE = {"key": INT4_TOKEN, "value": {"dtype": "uint4", "symmetric": False} | TENSOR}


def rows_of(run):
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in report["linears"] if row["status"] == "quantized"}


def contents(run):
    """Every tensor of a run's blocks as bytes."""
    return {file.name: file.read_bytes() for file in sorted((run / "blocks").iterdir())}


def seen_by(run, dequantized, data):
    """What linears are given and, quantized, meet in the finished model: two dicts {name: [tokens, channels] …}."""
    model = dequantized(run)
    given = watch(model)
    emulate(model, NativeCheckpoint(run).activations())
    met = watch(model)
    run_through(model, data)
    return {name: counted(x, data) for name, x in given.items()}, {name: counted(x, data) for name, x in met.items()}


# --- what linears meet ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param({"global_quant_config": {"weight": WEIGHT} | flow}, id=name) for name, flow in FLOWS.items()),
        pytest.param({"global_quant_config": {"weight": WEIGHT}, "attention": CACHE}, id="cache"),
    ],
)
def test_statistics_are_of_inputs_as_the_finished_model_quantizes_them(
    checkpoint, dequantized, tmp_path, recipe, algorithm
):
    # whatever comes before a linear is quantized, and so is what it is given: the finished model shows it again
    model = checkpoint("qwen2")  # it has biases
    run = walk(model, tmp_path / "run", recipe | {"algorithm": algorithm})
    given, met = seen_by(run, dequantized, batches())
    weights, source = NativeCheckpoint(run), SafetensorsSource(model)
    apart = []
    for name, row in rows_of(run).items():
        (original,) = source.read([f"{name}.weight"]).values()
        (quantized,) = weights.read([f"{name}.weight"]).values()
        x, w, delta = torch.cat(met[name]).double(), original.double(), (quantized - original).double()
        assert row["tokens"] == x.shape[0] == TOKENS
        energy, error = ((x @ matrix.T).square().sum().item() for matrix in (w, delta))
        assert row["energy"] == pytest.approx(energy, rel=1e-3), name
        assert row["error"] == pytest.approx(error, rel=1e-3), name
        as_given = (torch.cat(given[name]).double() @ delta.T).square().sum().item()
        apart.append(abs(as_given / error - 1))
    if "input_tensors" in recipe["global_quant_config"]:  # inputs as they come would have been told apart
        assert max(apart) > 5e-3


@pytest.mark.parametrize("recipe", [{"scheme": "W8A8"}, {"scheme": "W8A8_STATIC"}, KVFP8], ids=str)
def test_activations_of_8_bits_cost_little_and_those_of_2_bits_much(checkpoint, tmp_path, recipe):
    fine = walk(checkpoint("llama"), tmp_path / "fine", recipe)
    coarse = fewbit.Config.from_dict(recipe).to_dict()
    for spec in (coarse["global_quant_config"]["input_tensors"], *(coarse["attention"] or {}).values()):
        if spec is not None:
            spec["dtype"] = "int2"
    coarse["algo_config"] = [{"name": "rtn"}]
    rough = walk(checkpoint("llama"), tmp_path / "rough", coarse)
    ids = batches()[0]["input_ids"]
    little, much = (fewbit.evaluate(run, ids, against=checkpoint("llama")).kl_mean for run in (fine, rough))
    assert little < 5e-3 < 0.05 < much


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "W8A8KVFP8"])
@pytest.mark.parametrize("memory", ["4GiB", "0"])
def test_a_recipe_may_leave_activations_as_they_are_while_it_calibrates(checkpoint, tmp_path, scheme, memory):
    recipe = {"scheme": scheme, "algorithm": "gptq", "calibration": {"quantized_activations": False}}
    run = NativeCheckpoint(walk(checkpoint("llama"), tmp_path / "run", recipe, activation_memory=memory))
    weights = {"weight": fewbit.Config.from_dict({"scheme": scheme}).global_quant_config.weight}
    plain = NativeCheckpoint(
        walk(checkpoint("llama"), tmp_path / "plain", {"global_quant_config": weights, "algorithm": "gptq"})
    )
    for name in plain.quantized:  # the same weights as without quantized activations
        assert torch.equal(run.read_quantized(name).codes, plain.read_quantized(name).codes)
        assert torch.equal(run.read_quantized(name).scale, plain.read_quantized(name).scale)
    for name, known in run.activations().items():  # but with the scales that activations need
        assert (known.scale is None) == known.spec.is_dynamic, name
    ids = batches()[0]["input_ids"]
    assert fewbit.evaluate(run.directory, ids, against=plain.directory).kl_mean > 1e-5


def test_what_is_excluded_meets_its_input_as_it_is(checkpoint, tmp_path):
    run = walk(checkpoint("llama"), tmp_path / "run", {"scheme": "W8A8_STATIC", "exclude": ["*.down_proj", "*.0.*"]})
    names = {name.rpartition(".")[0] for name in NativeCheckpoint(run).activations()}
    assert names == {f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"} | {
        f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")
    }


def test_activations_alone_leave_every_weight_as_it_is(checkpoint, tmp_path):
    run = walk(checkpoint("llama"), tmp_path / "run", {"global_quant_config": {"input_tensors": INT4_STATIC}})
    source, made = SafetensorsSource(checkpoint("llama")), NativeCheckpoint(run)
    assert made.quantized == {}
    assert all(torch.equal(made.read([name])[name], tensor) for name, tensor in source.read(source.info()).items())
    assert len(made.activations()) == 14
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["totals"]["linears"] == {"activations": 14, "skipped": 1}
    assert report["linears"][0]["input"] == "int4 per_tensor"
    ids = batches()[0]["input_ids"]
    assert fewbit.evaluate(run, ids, against=checkpoint("llama")).kl_mean > 1e-3


def test_attention_alone_leaves_every_linear_as_it_is(checkpoint, tmp_path):
    recipe = {"global_quant_config": {}, "attention": {"key": {"dtype": "e4m3"} | TENSOR}}
    made = NativeCheckpoint(walk(checkpoint("llama"), tmp_path / "run", recipe))
    assert made.quantized == {}
    assert set(made.activations()) == {f"model.layers.{n}.self_attn.key" for n in range(2)}


# --- static scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        INT4_STATIC,
        {"dtype": "e4m3"} | TENSOR,
        {"dtype": "uint8", "symmetric": False} | TENSOR,
        {"dtype": "int8"} | TENSOR | {"observer": "percentile", "percentile": 97.0},
        {"dtype": "int4"} | TENSOR | {"observer": "mse"},
        {"dtype": "int8"} | TENSOR | {"observer": "moving-average"},
        {"dtype": "int8", "scale_type": "pof2"} | TENSOR,
        {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 1, "observer": "minmax"},
        NVFP4,
    ],
    ids=lambda spec: f"{spec['dtype']} {spec.get('qscheme', 'groups')} {spec['observer']}",
)
def test_a_static_scale_is_what_its_observer_makes_of_all_batches_without_padding(
    checkpoint, dequantized, tmp_path, spec
):
    recipe = {"global_quant_config": {"weight": WEIGHT, "input_tensors": spec}}
    run = walk(checkpoint("llama"), tmp_path / "run", recipe)
    given, _ = seen_by(run, dequantized, batches())
    activations = NativeCheckpoint(run).activations()
    assert len(activations) == 14
    for name, known in activations.items():
        observer = make_observer(known.spec, torch.float32)
        for x in given[name.removesuffix(".input")]:
            observer(x)
        expected = observer.result()
        assert known.global_scale == expected.global_scale
        if known.spec.is_dynamic:
            assert known.scale is None
            continue
        torch.testing.assert_close(known.scale, expected.scale, rtol=1e-4, atol=0)
        if known.zero_point is not None:
            assert torch.equal(known.zero_point, expected.zero_point)


def test_linears_with_one_input_have_one_scale(checkpoint, tmp_path):
    for scheme in ("W8A8_STATIC", "NVFP4"):
        made = NativeCheckpoint(walk(checkpoint("llama"), tmp_path / scheme, {"scheme": scheme}))
        activations = made.activations()
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            first, *others = (activations[f"model.layers.1.{name}.input"] for name in group)
            assert all(other.scale == first.scale and other.global_scale == first.global_scale for other in others)
        if scheme == "W8A8_STATIC":
            assert len({float(known.scale) for known in activations.values()}) > 2
        if scheme == "NVFP4":  # weights that engines fuse share their global scale, too
            units = {name: made.read_quantized(f"model.layers.0.self_attn.{name}_proj.weight") for name in "qkv"}
            assert len({weight.global_scale for weight in units.values()}) == 1


def test_linears_with_one_input_and_specs_of_their_own_have_scales_of_their_own(checkpoint, tmp_path):
    other = {"weight": WEIGHT, "input_tensors": {"dtype": "e4m3"} | TENSOR}
    recipe = {"scheme": "W8A8_STATIC", "layer_quant_config": {"*.v_proj": other}}
    activations = NativeCheckpoint(walk(checkpoint("llama"), tmp_path / "run", recipe)).activations()
    q, k, v = (activations[f"model.layers.1.self_attn.{name}_proj.input"] for name in "qkv")
    assert q.scale == k.scale
    torch.testing.assert_close(v.scale * 448, q.scale * 127.5)  # of the same range
    assert v.spec.dtype == "e4m3"


def test_scales_of_activations_have_the_dtype_of_the_checkpoint(checkpoint, tmp_path):
    run = walk(checkpoint("llama", torch.bfloat16), tmp_path / "run", {"scheme": "W8A8_STATICKVFP8"})
    assert {known.scale.dtype for known in NativeCheckpoint(run).activations().values()} == {torch.bfloat16}


@pytest.mark.parametrize("heads", [False, True], ids=["per tensor", "per head"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_static_scales_of_keys_and_values_cover_them_after_rope(checkpoint, dequantized, tmp_path, family, heads):
    spec = {"dtype": "e4m3", "observer": "minmax", "qscheme": "per_channel" if heads else "per_tensor"}
    recipe = {"scheme": "W8A16", "group_size": 32, "attention": {"key": spec, "value": spec, "query": spec}}
    run = walk(checkpoint(family), tmp_path / "run", recipe)
    activations = NativeCheckpoint(run).activations()
    model = emulate(dequantized(run), activations)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("attention_quantizers.key", "attention_quantizers.value", "attention_quantizers.query")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    run_through(model, batches())
    assert len(seen) == len(activations) == 3 * len(model.model.layers)
    for name, tensors in seen.items():  # [batch, heads, tokens, channels]
        tokens = torch.cat(counted([x.transpose(1, 2) for x in tensors], batches()))
        known = activations[name.replace("attention_quantizers.", "")]
        expected = tokens.abs().amax((0, 2))[None] / 448 if heads else tokens.abs().amax()[None, None] / 448
        torch.testing.assert_close(known.scale, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "W8A8_STATIC", "algorithm": "gptq"},
        {"scheme": "NVFP4"},
        KVFP8,
        {
            "global_quant_config": {"weight": WEIGHT},
            "attention": {slot: {"dtype": "int8", "qscheme": "per_channel"} | {"observer": "percentile"}
                          for slot in ("key", "value", "query")},
        },
        {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+rtn"},
        {"global_quant_config": {"weight": WEIGHT, "output_tensors": {"dtype": "int8"} | TENSOR}},
    ],
    ids=lambda recipe: " ".join(str(value) for value in recipe.values())[:40],
)  # fmt: skip
@pytest.mark.parametrize("strategy", ["staged", "replay"])
def test_padding_counts_for_no_scale(checkpoint, tmp_path, recipe, strategy):
    memory = {} if strategy == "staged" else {"activation_memory": 0}
    runs = [
        walk(checkpoint("llama"), tmp_path / str(padding), recipe, calibration=batches(padding), **memory)
        for padding in (7, 250)
    ]
    assert contents(runs[0]) == contents(runs[1])


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(error, words, model, tmp_path, recipe, **arguments):
    """The recipe is refused in one sentence and nothing is written."""
    with pytest.raises(error, match=words) as caught:
        walk(model, tmp_path / "run", recipe, **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "W8A8_STATIC"},
        {"scheme": "FP8"},
        {"scheme": "NVFP4"},
        KVFP8,
        {"global_quant_config": {"weight": WEIGHT, "output_tensors": INT4_STATIC}},
    ],
    ids=str,
)
def test_static_scales_without_calibration_are_refused(checkpoint, tmp_path, recipe):
    refused(
        ConfigError, "static activation scales need calibration data", checkpoint("llama"), tmp_path, recipe,
        calibration="none",
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "MXFP4", "MXINT8", "MX9", "W8A8KV8"])
def test_dynamic_scales_need_no_calibration(checkpoint, tmp_path, scheme):
    run = walk(checkpoint("llama"), tmp_path / "run", {"scheme": scheme}, calibration="none")
    found = fewbit.evaluate(run, batches()[0]["input_ids"], against=checkpoint("llama"))
    assert 0 < found.kl_mean < 0.2


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"global_quant_config": {"weight": WEIGHT, "input_tensors": {"group_size": 48}}}, "group size 48 .* inputs"),
        (
            {"global_quant_config": {"output_tensors": {"group_size": 24}}},
            "group size 24 does not divide the 64 outputs of 'model.layers.0.self_attn.q_proj'; exclude that layer",
        ),
        ({"scheme": "FP8_BLOCK"}, "group size 128 does not divide the 64 inputs of 'model.layers.0.self_attn.q_proj'"),
        ({"scheme": "W8A16KV4", "group_size": 32}, "attention key: group_size 32 does not divide .* 16 channels"),
    ],
)
def test_groups_of_activations_that_do_not_divide_are_refused(checkpoint, tmp_path, recipe, words):
    for specs in (recipe.get("global_quant_config", {}),):
        for slot in ("input_tensors", "output_tensors"):
            if slot in specs:
                specs[slot] |= {"dtype": "int8", "observer": "minmax", "is_dynamic": True}
    refused(ConfigError, words, checkpoint("llama"), tmp_path, recipe)


def test_a_family_whose_attention_cannot_be_reached_is_refused_before_anything_is_written(random_model, tmp_path):
    model, recipe = random_model("bloom", n_head=4), {"scheme": "W8A16KV8", "group_size": 32}
    refused(ArchitectureError, "has no attention .* leave attention", model, tmp_path, recipe)


@pytest.mark.parametrize("slot", ["input", "output", "value"])
def test_an_activation_that_is_always_zero_is_refused_by_name(llama, tmp_path, slot):
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    name = "self_attn.v_proj" if slot == "value" else "mlp.up_proj"
    tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    recipe = {"global_quant_config": {"weight": WEIGHT}}
    if slot == "value":
        recipe["attention"] = {slot: INT4_STATIC}
    else:
        recipe["global_quant_config"] |= {f"{slot}_tensors": INT4_STATIC}
    place = {"input": "mlp.down_proj.input", "output": "mlp.up_proj.output", "value": "self_attn.value"}[slot]
    with pytest.raises(CalibrationError, match=rf"model\.layers\.1\.{place} was zero throughout calibration"):
        walk(llama, tmp_path / "run", recipe)


def test_nan_at_an_activation_is_refused_by_name(random_model, tmp_path):
    model = random_model("qwen2")
    model.model.layers[1].self_attn.q_proj.bias.data[3] = 1e38
    model.model.layers[1].self_attn.k_proj.bias.data[3] = 1e38
    spec = {"dtype": "int8"} | TENSOR
    with pytest.raises(CalibrationError, match=r"NaN or infinity"):
        walk(model, tmp_path / "run", {"global_quant_config": {"weight": WEIGHT, "input_tensors": spec}})


def test_a_bias_without_a_weight_is_refused(random_model, tmp_path):
    recipe = {"global_quant_config": {"bias": {"dtype": "int8"} | TENSOR}}
    refused(ConfigError, "bias", random_model("qwen2"), tmp_path, recipe)
