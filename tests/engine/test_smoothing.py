"""Scales of channels in the walk: what is folded computes the same, and nothing is folded that must not be."""

import copy
import json

import pytest
import torch
from walks import TENSOR, TOKEN, WEIGHT, batches, counted, emulate, run_through, walk, watch

import fewbit
from fewbit.algorithms.scale_search import ScaleSearch
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.engine.stages import Stage
from fewbit.errors import ConfigError
from fewbit.nn.linear import Linear
from fewbit.numerics.scale_format import nearest_power_of_two

# Each weight has a scale of its own, at which it is the largest code: quantized, but as it was.
LOSSLESS = {"dtype": "e2m1", "group_size": 1, "observer": "minmax"}
IDS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(5))
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture
def any_scale(monkeypatch):
    """The search finds random scales, of the kind that was asked for, wherever it is asked."""

    def found(weights, specs, statistics, config, *, tie=None, power_of_two=False, **options):
        channels = statistics.moment.shape[0]
        scale = torch.exp2(torch.randn(channels, generator=torch.Generator().manual_seed(channels)))
        if tie is not None:
            scale = scale[: int(tie.max()) + 1][tie]
        if power_of_two:
            scale = nearest_power_of_two(scale)
        return ScaleSearch(scale, 0.0, 1.0, alpha=0.5)

    monkeypatch.setattr("fewbit.engine.channel_scaler.search_scales", found)


def scaled(run):
    """Linears of a run whose input channels were scaled."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return {row["name"] for row in report["linears"] if row.get("scaling") is not None}


def tensors_of(run):
    made = NativeCheckpoint(run)
    return made.read(made.info())


# --- the function stays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["awq+rtn", "smoothquant+rtn"])
def test_the_folded_checkpoint_is_the_function_that_the_model_was(any_scale, checkpoint, family, tmp_path, algorithm):
    recipe = {"global_quant_config": {"weight": LOSSLESS}, "algorithm": algorithm}
    run = walk(checkpoint(family), tmp_path / "run", recipe)
    blocks = json.loads((run / "report.json").read_text(encoding="utf-8"))["run"]["blocks"]
    assert scaled(run) == {f"model.layers.{block}.{name}" for block in range(blocks) for name in LINEARS}
    original = SafetensorsSource(checkpoint(family))
    for name, tensor in tensors_of(run).items():  # nothing but norms, linears and their biases changed
        (before,) = original.read([name]).values()
        changed = not torch.allclose(tensor, before, rtol=1e-3)
        folded_into = name.endswith(("_proj.weight", "v_proj.bias", "up_proj.bias", "layernorm.weight"))
        assert changed <= folded_into, name
        if name.endswith(("q_proj.weight", "input_layernorm.weight", "v_proj.weight", "v_proj.bias")):
            assert changed, name
    found = fewbit.evaluate(run, IDS, against=checkpoint(family))
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-5)
    assert found.kl_mean < 1e-7


def test_a_checkpoint_of_16_bits_is_folded_as_exactly(any_scale, random_model, tokenizer, tmp_path):
    random_model("qwen2").bfloat16().save_pretrained(tmp_path / "model")
    spec = LOSSLESS | {"scale_dtype": "float32"}
    recipe = {"global_quant_config": {"weight": spec}, "algorithm": "awq+rtn"}
    run = walk(tmp_path / "model", tmp_path / "run", recipe)
    assert len(scaled(run)) == 14
    assert {tensor.dtype for tensor in NativeCheckpoint(run).read(["model.norm.weight"]).values()} == {torch.bfloat16}
    found = fewbit.evaluate(run, IDS, against=tmp_path / "model")
    assert found.kl_mean < 1e-7


def test_an_export_of_a_folded_run_is_evaluated_alike(any_scale, checkpoint, evaluation_file, tmp_path):
    recipe = {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+gptq"}
    run = walk(checkpoint("qwen2", torch.bfloat16), tmp_path / "run", recipe)
    exported = fewbit.Run(run).export("compressed-tensors")
    assert fewbit.Run(run).verify()[0].quantized == 14
    assert fewbit.evaluate(exported, IDS) == fewbit.evaluate(run, IDS)


@pytest.mark.parametrize(
    "recipe",
    [
        {"scheme": "W4A16", "group_size": 32, "algorithm": "awq+gptq"},
        {"scheme": "W8A8_STATICKVFP8", "algorithm": "smoothquant+gptq"},
        {"scheme": "W4A8", "group_size": 32, "algorithm": ["awq", {"name": "gptq", "drift": 0.5}]},
    ],
    ids=str,
)
def test_staged_and_replay_fold_to_the_same_bytes(any_scale, checkpoint, tmp_path, files_of, recipe):
    runs = [walk(checkpoint("qwen2"), tmp_path / memory, recipe, activation_memory=memory) for memory in ("4GiB", "0")]
    assert scaled(runs[0])
    assert files_of(runs[0]) == files_of(runs[1])


# --- what is reported and calibrated is what is stored --------------------------------------------------------------


@pytest.mark.parametrize("inputs", [{}, TOKEN, TENSOR], ids=["as they are", "dynamic", "static"])
@pytest.mark.parametrize("algorithm", ["awq+rtn", "awq+gptq", "smoothquant+gptq"])
def test_the_reported_loss_of_scaled_linears_is_that_of_the_folded_model(
    any_scale, checkpoint, dequantized, tmp_path, algorithm, inputs
):
    quantized = {"input_tensors": {"dtype": "int8"} | inputs} if inputs else {}
    recipe = {"global_quant_config": {"weight": WEIGHT} | quantized, "algorithm": algorithm}
    run = walk(checkpoint("llama"), tmp_path / "run", recipe)
    source, made = SafetensorsSource(checkpoint("llama")), NativeCheckpoint(run)
    model = emulate(dequantized(run), made.activations())
    seen = watch(model)
    run_through(model, batches())
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["linears"]}
    for block in range(2):
        for norm, readers in (  # values and up are divided themselves later on
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj",)),
        ):
            name = f"model.layers.{block}.{norm}.weight"
            columns = source.read([name])[name].double() / made.read([name])[name].double()
            for reader in readers:
                weight = f"model.layers.{block}.{reader}.weight"
                wanted = source.read([weight])[weight].double() * columns
                delta = made.read([weight])[weight].double() - wanted
                x = torch.cat(counted(seen[weight.removesuffix(".weight")], batches())).double()
                row = rows[weight.removesuffix(".weight")]
                assert row["error"] == pytest.approx((x @ delta.T).square().sum().item(), rel=1e-3)
                assert row["energy"] == pytest.approx((x @ wanted.T).square().sum().item(), rel=1e-3)


def test_static_scales_are_of_inputs_as_the_folded_model_gives_them(any_scale, checkpoint, dequantized, tmp_path):
    run = walk(checkpoint("llama"), tmp_path / "run", {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+rtn"})
    assert len(scaled(run)) == 14
    activations = NativeCheckpoint(run).activations()
    model = dequantized(run)
    given = watch(model)
    emulate(model, activations)
    run_through(model, batches())
    for name, known in activations.items():
        largest = torch.cat(counted(given[name.removesuffix(".input")], batches())).abs().max()
        torch.testing.assert_close(known.scale, largest.view(1, 1) / 127.5, rtol=2e-3, atol=0)


# --- what must not be scaled ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        ({"attention": {"value": {"dtype": "int8"} | TOKEN}}, {"self_attn.o_proj"}),
        (
            {"attention": {"value": {"dtype": "e4m3"} | TENSOR, "key": {"dtype": "e4m3"} | TENSOR}},
            {"self_attn.o_proj"},
        ),
        ({"attention": {"key": {"dtype": "int8"} | TOKEN, "query": {"dtype": "int8"} | TOKEN}}, set()),
        ({"exclude": ["*.k_proj"]}, {"self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj"}),
        ({"exclude": ["*.gate_proj"]}, {"mlp.gate_proj", "mlp.up_proj"}),
        ({"exclude": ["*.v_proj"]}, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ({"exclude": ["*.o_proj"]}, {"self_attn.o_proj"}),
        (
            {"layer_quant_config": {"*.v_proj": {"weight": LOSSLESS, "output_tensors": {"dtype": "int8"} | TOKEN}}},
            {"self_attn.o_proj"},
        ),
        (
            {"layer_quant_config": {"*.up_proj": {"weight": LOSSLESS, "output_tensors": {"dtype": "int8"} | TENSOR}}},
            {"mlp.down_proj"},
        ),
        (  # rows that share a scale cannot be divided once they are quantized
            {"layer_quant_config": {"*.up_proj": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}}},
            {"mlp.down_proj"},
        ),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_channels_that_somebody_else_reads_or_that_are_quantized_keep_their_scale(
    any_scale, checkpoint, tmp_path, change, left_out
):
    recipe = {"global_quant_config": {"weight": LOSSLESS}, "algorithm": "awq+rtn"} | change
    run = walk(checkpoint("llama"), tmp_path / "run", recipe)
    assert scaled(run) == {f"model.layers.{n}.{name}" for n in range(2) for name in set(LINEARS) - left_out}
    found = fewbit.evaluate(run, IDS, against=checkpoint("llama"))
    assert found.kl_mean < (0.05 if "attention" in change or "layer_quant_config" in change else 1e-7)


def test_a_norm_with_an_unquantized_reader_is_left_bit_for_bit(any_scale, checkpoint, tmp_path):
    recipe = {"scheme": "W8A16", "group_size": 32, "algorithm": "awq+rtn", "exclude": ["*.0.self_attn.k_proj"]}
    run = NativeCheckpoint(walk(checkpoint("llama"), tmp_path / "run", recipe))
    source = SafetensorsSource(checkpoint("llama"))
    names = [f"model.layers.{n}.input_layernorm.weight" for n in range(2)]
    ours, before = run.read(names), source.read(names)
    assert torch.equal(ours[names[0]], before[names[0]])
    assert not torch.equal(ours[names[1]], before[names[1]])


def test_scaling_layers_of_the_recipe_replace_the_familys(any_scale, checkpoint, tmp_path):
    layers = [{"prev_op": "mlp.up_proj", "layers": ["mlp.down_proj"]}]
    for name in ("awq", "smoothquant"):
        recipe = {
            "global_quant_config": {"weight": LOSSLESS},
            "algo_config": [{"name": name, "scaling_layers": layers}, {"name": "rtn"}],
        }
        run = walk(checkpoint("llama"), tmp_path / name, recipe)
        assert scaled(run) == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}


NOTHING_TO_GAIN = {
    "weights": {"scheme": "W8A16", "group_size": 32},
    "dynamic": {"scheme": "W8A8"},
    "static": {"scheme": "W8A8_STATIC"},
    "global scale": {"scheme": "NVFP4"},
}


@pytest.mark.parametrize("codes", [{"name": "rtn"}, {"name": "gptq"}, {"name": "gptq", "drift": 0.5}], ids=str)
@pytest.mark.parametrize("recipe", NOTHING_TO_GAIN)
def test_a_search_that_gains_nothing_leaves_everything_as_without(checkpoint, tmp_path, files_of, recipe, codes):
    clamped = {"name": "awq", "scale_clamp_min": 1.0}  # every scale is one
    recipes = (NOTHING_TO_GAIN[recipe] | {"algo_config": algorithms} for algorithms in ([codes], [clamped, codes]))
    plain, searched = (
        walk(checkpoint("llama"), tmp_path / name, each)
        for name, each in zip(("plain", "searched"), recipes, strict=True)
    )
    assert scaled(searched) == set()
    assert files_of(plain) == files_of(searched)
    reports = [json.loads((run / "report.json").read_text(encoding="utf-8")) for run in (plain, searched)]
    losses = [[row.get("loss") for row in report["linears"]] for report in reports]
    assert losses[0] == losses[1]


def test_drift_is_that_of_the_input_as_it_is_divided():
    generator = torch.Generator().manual_seed(0)
    x, reference, columns = (torch.rand(64, 8, generator=generator) + 0.5 for _ in range(3))
    columns = columns[0]
    linear = Linear(8, 4)
    stage = Stage(0, {"linear": linear}, lambda stage: None)
    stage.add(x, None, reference)
    plain = stage.statistics.scaled(columns)
    stage.reset()
    linear.divide(columns)
    stage.add(x / columns, None, reference)
    torch.testing.assert_close(stage.statistics.moment.triu(), plain.moment.triu())
    torch.testing.assert_close(stage.statistics.drift, plain.drift)


# --- the search is worth it -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outliers(random_model):
    """A llama some of whose channels are far larger than the others behind each norm."""
    model = random_model("llama")
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[[3, 17, 40]] *= 30
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                       layer.mlp.gate_proj, layer.mlp.up_proj):  # fmt: skip
            linear.weight.data[:, [3, 17, 40]] /= 10
    return model


def divergence(outliers, output, recipe):
    return fewbit.evaluate(walk(outliers, output, recipe), IDS, against=outliers).kl_mean


@pytest.mark.parametrize(("codes", "most"), [("rtn", 0.8), ("gptq", 1.05)], ids=["wins back", "costs GPTQ nothing"])
def test_what_awq_does_where_outliers_cost_weights(outliers, tmp_path, codes, most):
    recipe = {"scheme": "W3A16", "group_size": -1}
    plain = divergence(outliers, tmp_path / "plain", recipe | {"algorithm": codes})
    searched = divergence(outliers, tmp_path / "awq", recipe | {"algorithm": f"awq+{codes}"})
    assert searched < most * plain


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC"])
def test_smoothquant_wins_back_what_outliers_cost_activations(outliers, tmp_path, scheme):
    plain = divergence(outliers, tmp_path / "plain", {"scheme": scheme})
    smoothed = divergence(outliers, tmp_path / "smooth", {"scheme": scheme, "algorithm": "smoothquant+rtn"})
    assert smoothed < 0.5 * plain


@pytest.mark.parametrize("scheme", [{"scheme": "W8A8"}, {"scheme": "W8A16", "group_size": 32}], ids=str)
@pytest.mark.parametrize("memory", ["4GiB", "0"])
def test_a_fixed_alpha_is_the_published_formula_over_all_tokens(outliers, dequantized, tmp_path, scheme, memory):
    recipe = scheme | {"algorithm": [{"name": "smoothquant", "alpha": 0.5}, "rtn"]}
    run = walk(outliers, tmp_path / "run", recipe, activation_memory=memory)
    model = copy.deepcopy(outliers)
    seen = watch(model)
    run_through(model, batches())
    after = NativeCheckpoint(run).read(["model.layers.0.input_layernorm.weight"])
    layer = outliers.model.layers[0]
    ratio = layer.input_layernorm.weight / after["model.layers.0.input_layernorm.weight"]
    largest = torch.cat(counted(seen["model.layers.0.self_attn.q_proj"], batches())).abs().amax(0)
    weights = torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]).abs().amax(0)
    published = (largest / weights).sqrt()
    torch.testing.assert_close(ratio / ratio[0], published / published[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_scales_that_half_precision_cannot_hold_cost_nothing(random_model, tmp_path, alpha):
    """What makes the values and the input of `down` is so small that its scales are subnormal: some rows cannot be
    divided, and stay as they are beside rows that can."""
    model = random_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= torch.logspace(-4, 0, 128).unsqueeze(1) * 1e-2
        layer.self_attn.v_proj.weight.data *= torch.logspace(-4, 0, 32).unsqueeze(1) * 1e-2
    model.half().save_pretrained(tmp_path / "model")
    recipe = {"scheme": "W4A16", "group_size": 32}

    def losses(name, algorithm):
        run = walk(tmp_path / "model", tmp_path / name, recipe | {"algorithm": algorithm})
        rows = json.loads((run / "report.json").read_text(encoding="utf-8"))["linears"]
        return {row["name"]: row["loss"] for row in rows if "loss" in row}

    plain = losses("plain", "rtn")
    for name, loss in losses("scaled", [{"name": "awq", "alpha": alpha}, "rtn"]).items():
        assert loss < 1.2 * plain[name], name


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["awq", "smoothquant+rtn"])
def test_a_search_without_calibration_is_refused_before_anything_is_written(checkpoint, tmp_path, algorithm):
    recipe = {"scheme": "W4A16", "group_size": 32, "algorithm": algorithm}
    with pytest.raises(ConfigError, match="needs calibration data"):
        walk(checkpoint("llama"), tmp_path / "run", recipe, calibration="none")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"prev_op": "mlp.gate_proj", "layers": ["mlp.down_proj"]}, "scaling_layers: with 'mlp.gate_proj' divided"),
        ({"prev_op": "self_attn.w_proj", "layers": ["self_attn.o_proj"]}, "no module 'self_attn.w_proj'; did you"),
        ({"prev_op": "input_layernorm", "layers": ["self_attn.q_proj"]}, "name every layer that reads"),
    ],
)
def test_scaling_layers_that_change_the_model_are_refused(checkpoint, tmp_path, layer, words):
    recipe = {
        "scheme": "W4A16",
        "group_size": 32,
        "algo_config": [{"name": "awq", "scaling_layers": [layer]}, {"name": "rtn"}],
    }
    with pytest.raises(ConfigError, match=words):
        walk(checkpoint("llama"), tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()
