"""ModelQuantizer(config).quantize_model(model, dataloader): in place, and the same model as a run's."""

import copy

import pytest
import torch
from torch import nn

import fewbit
from fewbit import Config, ModelQuantizer, QuantizationConfig, QuantizationSpec, quark
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.algorithms import GPTQConfig, RTNConfig
from fewbit.errors import ArchitectureError, CalibrationError, ConfigError
from fewbit.formats.table import open_any
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.fake_quant import FakeQuantConv2d, FakeQuantLinear
from fewbit.nn.quant_linear import QuantLinear

IDS = torch.randint(1, 300, (4, 24), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
RTN = {"algorithm": "rtn"}
RECIPES = {
    "W8A8 static": {"scheme": "W8A8_STATIC"} | RTN,
    "gptq": {"scheme": "W4A16", "group_size": 32, "algorithm": "gptq"},
    "cache": {"scheme": "W8A16KV8", "group_size": 32} | RTN,
    "static cache": {"scheme": "FP8KVFP8"} | RTN,
    "two levels": {"scheme": "NVFP4", "algorithm": "gptq"},
    "affine": {"scheme": "W4A16_ASYM", "group_size": 32} | RTN,
    "searched": {"scheme": "W4A8", "group_size": 32, "algorithm": "awq+gptq"},
    "smoothed": {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+rtn"},
    "mixed": {"scheme": "W8A8", "exclude": ["*.0.mlp.*"], "layer_quant_config": {"*.v_proj": "MXFP4"}} | RTN,
    "activations": {"global_quant_config": {"input_tensors": {
        "dtype": "int8", "qscheme": "per_token", "observer": "minmax", "is_dynamic": True}}} | RTN,
}  # fmt: skip


@torch.no_grad()
def logits_of_run(directory, ids):
    """What `fewbit.evaluate` computes: the run's blocks one by one."""
    model = open_any(directory)
    (inputs,) = model.enter([{"input_ids": ids}])
    hidden = inputs.hidden
    for index, call in enumerate(inputs.calls):
        with model.loaded(index) as block:
            hidden = model.call_block(block, hidden, call)
    with model.head_loaded() as head:
        return head(hidden)


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def quantized(model, recipe, data=(IDS,)):
    return ModelQuantizer(Config.from_dict(recipe)).quantize_model(model, list(data))


def run_of(model, recipe, output):
    return fewbit.quantize(model, config=recipe, output=output, calibration=[{"input_ids": IDS}], progress=False,
                           device="cpu").directory  # fmt: skip


# --- transformers models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_quantized_in_memory_computes_what_its_run_does(random_model, tmp_path, name):
    model = random_model("llama")
    expected = logits_of_run(run_of(model, RECIPES[name], tmp_path / "run"), IDS[:2])
    before = logits_of(model, IDS[:2])
    assert quantized(model, RECIPES[name]) is model
    after = logits_of(model, IDS[:2])
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert (after - expected).norm() < 0.05 * (after - before).norm()


def test_every_family_computes_what_its_run_does(random_model, family, tmp_path):
    recipe, model = {"scheme": "W4A8KVFP8", "group_size": 32, "algorithm": "smoothquant+gptq"}, random_model(family)
    expected = logits_of_run(run_of(model, recipe, tmp_path / "run"), IDS[:2])
    quantized(model, recipe)
    torch.testing.assert_close(logits_of(model, IDS[:2]), expected, rtol=2e-3, atol=2e-3)


def test_linears_become_packed_ones_and_everything_else_is_the_same_object(random_model):
    model = random_model("qwen2")
    kept = {name: module for name, module in model.named_modules() if not isinstance(module, nn.Linear)}
    head, norm = model.lm_head, model.model.norm.weight
    quantized(model, {"scheme": "W4A16", "group_size": 32} | RTN)
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(packed) == 14
    assert all(dict(model.named_modules())[name] is module for name, module in kept.items())
    assert model.lm_head is head
    assert type(model.lm_head) is nn.Linear
    assert model.model.norm.weight is norm
    assert isinstance(model.model.layers[0].self_attn.q_proj.bias, nn.Parameter)
    assert not model.model.layers[0].mlp.up_proj.training


def test_weights_that_stay_keep_their_class_and_quantize_what_flows(random_model):
    model = random_model("llama")
    quantized(model, RECIPES["activations"])
    linears = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    assert len(linears) == 14
    assert all(type(linear) is FakeQuantLinear and linear.config.weight is None for linear in linears)


def test_a_tied_head_keeps_its_embeddings(random_model):
    model = random_model("qwen3")
    before = model.lm_head.weight.clone()
    quantized(model, {"scheme": "W8A8"} | RTN)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(
    "data",
    [
        [IDS[:2], IDS[2:]],
        [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:], "labels": IDS[2:]}],
        [(IDS[:2],), [IDS[2:]]],
        torch.utils.data.DataLoader(IDS, batch_size=2),
        (IDS[part] for part in (slice(0, 2), slice(2, 4))),
    ],
    ids=["tensors", "mappings", "tuples", "loader", "generator"],
)
def test_batches_may_come_in_any_usual_form(random_model, data):
    model, reference = random_model("llama"), random_model("llama")
    config = Config.from_dict({"scheme": "W8A8_STATIC"} | RTN)
    ModelQuantizer(config).quantize_model(model, data)
    ModelQuantizer(config).quantize_model(reference, [IDS[:2], IDS[2:]])
    assert torch.equal(logits_of(model), logits_of(reference))


def test_padding_of_a_batch_does_not_count(random_model):
    mask = torch.ones_like(IDS)
    mask[:, 18:] = 0
    found = []
    for padding in (7, 200):
        model = random_model("llama")
        ids = torch.where(mask.bool(), IDS, padding)
        quantized(model, {"scheme": "W8A8_STATIC", "algorithm": "gptq"}, [{"input_ids": ids, "attention_mask": mask}])
        found.append(logits_of(model))
    assert torch.equal(*found)


def test_without_data_dynamic_and_weight_only_recipes_work(random_model, tmp_path):
    model, recipe = random_model("llama"), {"scheme": "W8A8KV8"} | RTN
    run = fewbit.quantize(model, config=recipe, output=tmp_path / "run", calibration="none", progress=False).directory
    ModelQuantizer(Config.from_dict(recipe)).quantize_model(model)
    torch.testing.assert_close(logits_of(model), logits_of_run(run, IDS), rtol=1e-3, atol=1e-3)


def test_quarks_words_make_the_model_that_fewbits_do(random_model):
    weight = QuantizationSpec(dtype=quark.Dtype.int8, observer_cls=quark.PerChannelMinMaxObserver, symmetric=True)
    tensor = QuantizationSpec(dtype=quark.Dtype.int8, observer_cls=quark.PerTensorMinMaxObserver, is_dynamic=False)
    theirs = Config(
        global_quant_config=QuantizationConfig(weight=weight, input_tensors=tensor),
        exclude=("lm_head",),
        algo_config=None,
    )
    fields = {"dtype": "int8", "observer": "minmax"}
    plain = {
        "global_quant_config": {
            "weight": fields | {"qscheme": "per_channel"}, "input_tensors": fields | {"qscheme": "per_tensor"},
        },
        "exclude": ["lm_head"],
    } | RTN  # fmt: skip
    models = random_model("llama"), random_model("llama")
    ModelQuantizer(theirs).quantize_model(models[0], [IDS])
    quantized(models[1], plain)
    assert torch.equal(*(logits_of(model) for model in models))


def test_a_model_in_half_precision_stays_in_it(random_model):
    model = random_model("llama").bfloat16()
    before = logits_of(model)
    quantized(model, {"scheme": "W8A8_STATICKVFP8", "algorithm": "smoothquant+gptq"})
    after = logits_of(model)
    assert after.dtype == torch.bfloat16
    assert (after - before).float().norm() < 0.1 * before.float().norm()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_quantized_model_generates_with_a_cache_what_it_computes_without(random_model):
    model = random_model("llama")
    quantized(model, {"scheme": "W8A16KV8", "group_size": 32} | RTN)
    made = model.generate(IDS[:1, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    ids = IDS[:1, :8]
    for _ in range(4):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize(
    ("recipe", "data", "error", "words"),
    [
        ({"scheme": "W8A8_STATIC"} | RTN, None, ConfigError, "static activation scales need calibration data"),
        ({"scheme": "W4A16", "group_size": 32}, None, ConfigError, "gptq needs calibration data"),
        ({"scheme": "W8A8"} | RTN, [], CalibrationError, "the dataloader gave no batch"),
        ({"scheme": "W8A8"} | RTN, ["text"], CalibrationError, "token ids or a mapping with input_ids, not str"),
        ({"scheme": "W8A8"} | RTN, [torch.rand(2, 3)], CalibrationError, "token ids must be integers"),
        ({"scheme": "W8A8", "exclude": ["*.x_proj"]} | RTN, [IDS], ConfigError, r"exclude: '\*\.x_proj' matches no"),
    ],
)
def test_what_cannot_be_used_is_refused_and_the_model_stays(random_model, recipe, data, error, words):
    model = random_model("llama")
    before = logits_of(model)
    with pytest.raises(error, match=words):
        ModelQuantizer(Config.from_dict(recipe)).quantize_model(model, data)
    assert torch.equal(logits_of(model), before)
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


def test_a_family_whose_attention_cannot_be_reached_stays_as_it_is(random_model):
    model = random_model("bloom", n_head=4)
    before = logits_of(model)
    with pytest.raises(ArchitectureError, match="leave attention"):
        quantized(model, {"scheme": "W8A16KV8", "group_size": 32} | RTN)
    assert torch.equal(logits_of(model), before)


# --- other modules --------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()


def static(dtype="int8"):
    return {
        "global_quant_config": {
            "weight": {"dtype": dtype, "qscheme": "per_channel"},
            "input_tensors": {"dtype": "int8", "qscheme": "per_tensor", "observer": "minmax"},
        },
    } | RTN


def distance(model, reference):
    with torch.no_grad():
        expected = reference(IMAGES)
        return float((model(IMAGES) - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize(
    "data", [[IMAGES], [(IMAGES[:2],), (IMAGES[2:],)], [{"input": IMAGES}]], ids=["tensor", "tuples", "mapping"]
)
def test_a_convolutional_network_is_quantized_in_place_with_static_inputs(data):
    model = network()
    assert quantized(model, static(), data) is model
    assert [type(model[index]) for index in (0, 3, 5)] == [FakeQuantConv2d, FakeQuantLinear, FakeQuantLinear]
    assert 0 < distance(model, network()) < 1e-3
    largest = IMAGES.abs().max()
    torch.testing.assert_close(model[0].input_quantizer.scale, largest.view(1, 1) / 127.5)


def test_rules_of_a_config_hold_for_other_modules(tmp_path):
    recipe = static() | {
        "layer_type_quant_config": {"Conv2d": {"weight": {"dtype": "int4", "qscheme": "per_channel"}}},
        "exclude": ["5"],
    }
    model = quantized(network(), recipe, [IMAGES])
    assert type(model[5]) is nn.Linear
    assert model[0].config.weight.dtype == "int4"
    assert model[0].input_quantizer is None
    assert isinstance(model[3].input_quantizer, ActivationQuantizer)


def test_a_network_without_static_activations_needs_no_data():
    model = network()
    ModelQuantizer(Config.from_dict({"scheme": "W8A16", "group_size": -1} | RTN)).quantize_model(model)
    assert 0 < distance(model, network()) < 1e-3


@pytest.mark.parametrize(
    ("recipe", "data", "error", "words"),
    [
        (static() | {"algorithm": "gptq"}, [IMAGES], ConfigError, "run_gptq_for_sequential_layers"),
        (static() | {"algorithm": "smoothquant"}, [IMAGES], ConfigError, "only round to nearest"),
        ({"scheme": "W8A8KV8"} | RTN, [IMAGES], ConfigError, "its attention cannot be quantized"),
        (static(), None, CalibrationError, "static activation scales need calibration data"),
        (static() | {"exclude": ["7"]}, [IMAGES], ConfigError, "exclude: '7' matches no"),
        (static() | {"exclude": ["*"]}, [IMAGES], ConfigError, "quantizes nothing"),
        ({"scheme": "W4A16"} | RTN, None, ConfigError, "0: the weight cannot be quantized"),
    ],
)
def test_what_other_modules_cannot_have_is_refused_and_they_stay(recipe, data, error, words):
    model = network()
    with pytest.raises(error, match=words):
        ModelQuantizer(Config.from_dict(recipe)).quantize_model(model, data)
    assert [type(model[index]) for index in (0, 3, 5)] == [nn.Conv2d, nn.Linear, nn.Linear]
    assert distance(model, network()) == 0


def test_a_module_that_is_itself_a_linear_is_refused():
    with pytest.raises(ConfigError, match="itself a Linear"):
        ModelQuantizer(Config.from_dict({"scheme": "W8A8"} | RTN)).quantize_model(nn.Linear(16, 16))


def test_the_default_algorithm_is_gptq_and_said_by_the_config():
    assert Config.from_dict({"scheme": "W8A8"}).codes == GPTQConfig()
    config = Config(global_quant_config=QuantizationConfig(), algo_config=None)
    assert config.algo_config == (RTNConfig(),)


def test_a_kept_run_can_be_exported(random_model, tmp_path):
    model = random_model("llama")
    config = Config.from_dict(RECIPES["smoothed"])
    ModelQuantizer(config).quantize_model(model, [IDS], output=tmp_path / "run")
    run = fewbit.Run(tmp_path / "run")
    run.export("compressed-tensors")
    assert run.verify()[0].quantized == 14
    assert torch.equal(logits_of_run(run.directory, IDS), logits_of(model))


def test_no_run_is_written_of_other_modules(tmp_path):
    config = Config.from_dict({"scheme": "W8A8", "algorithm": "rtn"})
    with pytest.raises(ConfigError, match="leave output out"):
        ModelQuantizer(config).quantize_model(nn.Sequential(nn.Linear(4, 4)), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_quantizing_a_copy_leaves_the_model_it_was_copied_from(random_model):
    model = random_model("llama")
    copied = copy.deepcopy(model)
    before = logits_of(model)
    quantized(copied, RECIPES["cache"])
    assert torch.equal(logits_of(model), before)
    assert not torch.equal(logits_of(copied), before)


def test_the_run_of_a_module_is_that_of_its_checkpoint(random_model, checkpoint, tmp_path):
    runs = [
        NativeCheckpoint(run_of(model, RECIPES["static cache"], tmp_path / str(number)))
        for number, model in enumerate((random_model("llama"), checkpoint("llama")))
    ]
    ours, theirs = (run.activations() for run in runs)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name].scale, theirs[name].scale) for name in ours)


def test_scales_inside_attention_are_part_of_the_state(random_model):
    models = [random_model("llama") for _ in range(2)]
    for model, ids in zip(models, (IDS, IDS.flip(0) // 2), strict=True):
        quantized(model, RECIPES["static cache"], [ids])
    assert not torch.equal(logits_of(models[0]), logits_of(models[1]))
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(logits_of(models[0]), logits_of(models[1]))


def test_a_network_whose_calibration_fails_is_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = list(model)
    config = Config.from_dict({"scheme": "W8A8_STATIC", "algorithm": "rtn"})
    with pytest.raises(CalibrationError):
        ModelQuantizer(config).quantize_model(model, [torch.zeros(2, 8)])
    assert list(model) == before
    ModelQuantizer(config).quantize_model(model, [torch.ones(2, 8)])
    assert isinstance(model[0], FakeQuantLinear)


def test_calibration_of_a_network_leaves_its_mode_and_its_running_statistics():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 4))
    network[1].eval()
    mean = network[1].running_mean.clone()
    static = {"dtype": "int8", "qscheme": "per_tensor", "observer": "minmax"}
    config = fewbit.Config(global_quant_config={"input_tensors": static}, algo_config=None)
    fewbit.ModelQuantizer(config).quantize_model(network, [torch.randn(2, 3, 8, 8)])
    assert torch.equal(network[1].running_mean, mean)
    assert [module.training for module in network] == [True, False, True, True, True]


@pytest.mark.parametrize("given", [None, {"scheme": "W8A16"}, "W8A16"], ids=str)
def test_what_is_no_config_is_refused(given):
    with pytest.raises(ConfigError, match=r"takes a Config, not .*; Config\.from_dict makes one"):
        ModelQuantizer(given)


def test_a_layer_in_two_places_is_refused_by_name(random_model):
    model = random_model("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj are one Linear"
    ):
        quantized(model, {"scheme": "W8A8"} | RTN)


def test_what_stays_as_it_is_is_logged(random_model, caplog):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 10))
    quantized(net, static(), [IMAGES])
    assert "1.weight (ConvTranspose2d, 8 × 4 × 3 × 3," in caplog.text
    caplog.clear()
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    quantized(random_model("qwen2_moe", **moe), {"scheme": "W8A8"} | RTN)
    assert "mlp.experts.gate_up_proj (Qwen2MoeExperts" in caplog.text
    caplog.clear()
    quantized(random_model("llama"), {"scheme": "W4A16", "group_size": 32} | RTN)
    assert "stay as they are" not in caplog.text  # nor do scales of groups count as matrices


def test_a_dispatched_model_stays_dispatched(random_model):
    from accelerate import dispatch_model

    models = random_model("llama"), dispatch_model(random_model("llama"), {"": "cpu"}, force_hooks=True)
    for model in models:
        quantized(model, {"scheme": "W8A8"} | RTN)
    assert hasattr(models[1].model.layers[0].mlp.up_proj, "_hf_hook")
    assert torch.equal(*map(logits_of, models))
