"""Scaling channels changes nothing that a stack of layers computes, and makes quantizing it cheaper."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from fewbit.calibration.recorded import build_calib_dataset_inputs
from fewbit.calibration.recorder import DataRecorder
from fewbit.config.algorithms import AWQConfig, GPTQConfig, RTNConfig, SmoothQuantConfig
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.engine.sequential import run_gptq_for_sequential_layers
from fewbit.engine.sequential_smoothing import (
    SequentialSmoothQuantConfig,
    run_smooth_quant_for_sequential_layers,
)
from fewbit.errors import ConfigError
from fewbit.models.forward_manager import LayerForwardManager
from fewbit.nn.fake_quant import FakeQuantLinear, W4A16FakeLinear, W8A8FakeLinear

INT3 = QuantizationSpec(dtype="int3", group_size=32)
LLAMA = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]


def prompts(count=3, tokens=40):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 300, (2, tokens), generator=generator) for _ in range(count)]


def with_outliers(model):
    """Every ninth channel of the residual stream is large."""
    model.model.embed_tokens.weight.data[:, ::9] *= 20
    return model


def items_of(model, calls):
    with DataRecorder(model) as recorder, torch.no_grad():
        for call in calls:
            model(**call)
    return build_calib_dataset_inputs([recorder.recorded])


def llama_items(model):
    return items_of(model, [{"input_ids": ids, "use_cache": False} for ids in prompts()])


def logits(model):
    with torch.no_grad():
        return torch.cat([model(ids).logits for ids in prompts()]).double()


def moved(after, before):
    return float((after - before).norm() / before.norm())


class Gated(nn.Module):
    """A norm that a router and experts read; tokens choose their experts."""

    def __init__(self):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(32), nn.Linear(32, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(3)
        )

    def forward(self, x):
        normed = self.norm(x)
        total = torch.zeros_like(x)
        choice = self.router(normed).argmax(-1)
        for number, expert in enumerate(self.experts):
            if (choice == number).any():
                total[choice == number] += expert["down"](expert["up"](normed[choice == number]).relu())
        return x + total


def through(layer, batches):
    with torch.no_grad():
        return [layer(x) for x in batches]


def plainly():
    """A manager that runs the layers of these tests as they are, without a warning."""
    return LayerForwardManager({"*": lambda layer, x, **kwargs: layer(x)})


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_model_computes_what_it_did(random_model, kind):
    model = with_outliers(random_model(kind)).double()
    before = logits(model)
    found = run_smooth_quant_for_sequential_layers(
        model.model.layers, llama_items(model), "W8A8", prefix="model.layers"
    )
    assert set(found) == {f"model.layers.{index}.{name}" for index in (0, 1) for name in LLAMA}
    assert all(search.loss < 0.9 * search.loss_before for name, search in found.items() if "layernorm" in name)
    assert moved(logits(model), before) < 1e-10


def test_layers_of_16_bits_stay_close_and_keep_their_dtype(random_model):
    model = with_outliers(random_model("llama")).bfloat16()
    precise = copy.deepcopy(model).float()
    before = logits(precise)
    run_smooth_quant_for_sequential_layers(model.model.layers, llama_items(model), "W8A8")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert 0 < moved(logits(copy.deepcopy(model).float()), before) < 0.01  # the readers' own rounding


def test_a_vision_transformer_is_scaled_where_it_can_be():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    vit = ViTModel(config).double().eval()
    for name, parameter in vit.layers.named_parameters():
        parameter.data.normal_(std=0.2).add_(1.0 if "layernorm" in name and "weight" in name else 0.0)
    vit.embeddings.position_embeddings.data[..., ::7] *= 400
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        before = vit(images).last_hidden_state
    found = run_smooth_quant_for_sequential_layers(vit.layers, items_of(vit, [{"pixel_values": images}]), "W4A8-g32")
    names = ["layernorm_before", "attention.v_proj", "layernorm_after"]  # not fc1: GELU is between it and fc2
    assert set(found) == {f"{index}.{name}" for index in (0, 1) for name in names}
    assert any(search.alpha is not None for search in found.values())
    with torch.no_grad():
        assert moved(vit(images).last_hidden_state, before) < 1e-10


@pytest.mark.parametrize("first", [0, 2])  # a batch that reaches all experts, and one that does not
def test_experts_and_routers_are_not_torn_apart(first):
    torch.manual_seed(0)
    layer, batches = Gated().double(), [torch.randn(1, 6, 32, dtype=torch.float64) for _ in range(6)]
    layer.norm.weight.data[::5] *= 10
    batches = batches[first:] + batches[:first]
    with torch.no_grad():
        assert (
            set(layer.router(layer.norm(batches[0])).argmax(-1).flatten().tolist()) == {0: {0, 1, 2}, 2: {0, 2}}[first]
        )
    before = torch.cat(through(layer, batches))
    found = run_smooth_quant_for_sequential_layers([layer], batches, INT3, forward=plainly())
    # experts read copies of the norm's output, so nobody can tell who reads it; ReLU lets an expert's own scales pass
    assert set(found) == {f"0.experts.{number}.up" for number in range(3)}
    assert any(search.alpha is not None for search in found.values())
    assert moved(torch.cat(through(layer, batches)), before) < 1e-10


def test_a_router_that_reads_the_norm_is_scaled_with_the_experts():
    class Dense(Gated):
        def forward(self, x):
            normed = self.norm(x)
            shares = self.router(normed).softmax(-1)
            outputs = [expert["down"](expert["up"](normed).relu()) for expert in self.experts]
            return x + sum(share.unsqueeze(-1) * out for share, out in zip(shares.unbind(-1), outputs, strict=True))

    torch.manual_seed(0)
    layer, batches = Dense().double(), [torch.randn(1, 16, 32, dtype=torch.float64) for _ in range(6)]
    layer.norm.weight.data[::5] *= 10
    before = torch.cat(through(layer, batches))
    found = run_smooth_quant_for_sequential_layers(
        [layer], batches, replace(INT3, group_size=16), forward=plainly(), exclude=["*.router"]
    )
    assert found["0.norm"].alpha is not None
    assert moved(torch.cat(through(layer, batches)), before) < 1e-10


def fake_quantized(model, scheme):
    """The model with every linear of its layers computing with quantized weights and activations."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, FakeQuantLinear.from_module(module, scheme))
    return model


def test_a_model_with_outliers_quantizes_better(random_model):
    model = with_outliers(random_model("llama"))
    before = logits(model)
    plain = moved(logits(fake_quantized(model, "W8A8")), before)
    run_smooth_quant_for_sequential_layers(model.model.layers, llama_items(model), "W8A8")
    assert moved(logits(fake_quantized(model, "W8A8")), before) < 0.85 * plain


class Normed(nn.Module):
    """A norm whose channels are unlike, and a linear that reads it."""

    def __init__(self, spread):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)
        self.norm.weight.data.copy_((spread * torch.randn(64)).exp())

    def forward(self, x):
        return x + self.linear(self.norm(x))


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_weights_falls_as_the_search_says(seed):
    torch.manual_seed(seed)
    layer, batches = Normed(2.0), [torch.randn(1, 128, 64) for _ in range(4)]
    spec, before, scaled = replace(INT3, observer="minmax"), torch.cat(through(layer, batches)), copy.deepcopy(layer)
    found = run_smooth_quant_for_sequential_layers([scaled], batches, spec, forward=plainly())["0.norm"]
    for each in (layer, scaled):
        run_gptq_for_sequential_layers([each], batches, spec, RTNConfig(), forward=plainly())
    after, plain = (moved(torch.cat(through(each, batches)), before) ** 2 for each in (scaled, layer))
    assert after / plain == pytest.approx(found.loss / found.loss_before, rel=0.01)
    assert after < plain


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_activations_falls_as_the_search_says(seed):
    torch.manual_seed(seed)
    layer, batches = Normed(1.0), [torch.randn(1, 128, 64) for _ in range(4)]
    layer.norm.weight.data[::16] *= 30
    config, before, scaled = scheme_config("W8A8"), torch.cat(through(layer, batches)), copy.deepcopy(layer)
    found = run_smooth_quant_for_sequential_layers([scaled], batches, config, forward=plainly())["0.norm"]
    for each in (layer, scaled):
        each.linear = FakeQuantLinear.from_module(each.linear, config)
    after, plain = (moved(torch.cat(through(each, batches)), before) ** 2 for each in (scaled, layer))
    assert after / plain == pytest.approx(
        found.loss / found.loss_before, rel=0.1
    )  # the two errors are taken to add up
    assert after < 0.5 * plain


def test_gptq_follows_on_the_same_inputs(random_model):
    model = with_outliers(random_model("llama"))
    items, before = llama_items(model), logits(model)
    run_smooth_quant_for_sequential_layers(model.model.layers, items, INT3, AWQConfig(), gptq_follows=True)
    results = run_gptq_for_sequential_layers(model.model.layers, items, INT3, GPTQConfig())
    assert len(results) == 14
    alone = with_outliers(random_model("llama"))
    run_gptq_for_sequential_layers(alone.model.layers, items, INT3, GPTQConfig())
    assert moved(logits(model), before) < moved(logits(alone), before)


def test_the_scale_that_is_returned_is_the_one_that_was_folded(random_model):
    model = with_outliers(random_model("llama"))
    original = copy.deepcopy(model)
    found = run_smooth_quant_for_sequential_layers(model.model.layers, llama_items(model), "W8A8")
    scale = found["1.input_layernorm"].scale
    assert not torch.equal(scale, torch.ones_like(scale))
    layer, before = model.model.layers[1], original.model.layers[1]
    assert torch.allclose(layer.self_attn.q_proj.weight, before.self_attn.q_proj.weight * scale)
    assert torch.allclose(layer.input_layernorm.weight, before.input_layernorm.weight / scale)


def test_the_two_ways_to_write_a_configuration_are_one(random_model):
    weight = QuantizationSpec(dtype="int8", qscheme="per_channel")
    inputs = QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
    written = SequentialSmoothQuantConfig(
        w_method="per-channel", a_method="per-token", q_linear_type="W8A8", duo_scale=True
    )
    assert written.algorithm == SmoothQuantConfig(duo_scale=True)
    one, other = with_outliers(random_model("llama")), with_outliers(random_model("llama"))
    items = llama_items(one)
    run_smooth_quant_for_sequential_layers(one.model.layers, items, written)
    run_smooth_quant_for_sequential_layers(
        other.model.layers,
        items,
        QuantizationConfig(weight=weight, input_tensors=inputs),
        SmoothQuantConfig(duo_scale=True),
    )
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ("W8A8", "W8A8"),
        (W8A8FakeLinear, "W8A8"),
        ("W8A8FakeLinear", "W8A8"),
        ("Int8Linear", "W8A8"),
        ("FP8Linear", "FP8_DYNAMIC"),
        (W4A16FakeLinear, "W4A16"),
    ],
)
def test_kinds_of_linears_stand_for_schemes(given, scheme):
    config = SequentialSmoothQuantConfig(q_linear_type=given)
    expected = scheme_config(scheme)
    assert config.quantization.weight == expected.weight
    assert config.quantization.input_tensors == expected.input_tensors
    assert isinstance(config.algorithm, AWQConfig if expected.input_tensors is None else SmoothQuantConfig)


def test_methods_and_group_size_replace_those_of_the_scheme():
    config = SequentialSmoothQuantConfig(
        q_linear_type="W8A8", w_method="per-block", a_method="per-tensor", group_size=32
    )
    assert config.quantization.weight.group_size == 32
    assert config.quantization.weight.dtype == "int8"
    assert config.quantization.input_tensors.qscheme == "per_tensor"
    assert config.quantization.input_tensors.is_dynamic
    assert SequentialSmoothQuantConfig(q_linear_type="W4A16", group_size=32).quantization.weight.group_size == 32


def test_methods_in_full_quant_transformer_s_words():
    for linears in ("W8A8", W8A8FakeLinear):
        found = SequentialSmoothQuantConfig(w_method="per-token", a_method="per-tensor", q_linear_type=linears)
        summaries = found.quantization.weight.summary, found.quantization.input_tensors.summary
        assert summaries == ("int8 per_channel", "int8 per_tensor dynamic")
    weights_alone = SequentialSmoothQuantConfig("per-token", "per-token", W4A16FakeLinear)
    assert weights_alone.quantization.weight.summary == "int4 per_channel"
    assert weights_alone.quantization.input_tensors is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_linear_type": "W8A8", "group_size": 32}, "nothing of W8A8 has groups; say w_method='per-block'"),
        ({"q_linear_type": "W8A8", "w_method": "per-block"}, "needs group_size"),
        ({"q_linear_type": nn.Linear}, "q_linear_type is a scheme's name or a FakeQuantLinear with a preset"),
        ({"q_linear_type": "W9A9"}, "unknown scheme 'W9A9'"),
        ({"w_method": "per-row"}, r"SequentialSmoothQuantConfig\.w_method"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SequentialSmoothQuantConfig(**fields)


def test_excluded_linears_are_scaled_with_the_rest_and_do_not_count(random_model):
    model = with_outliers(random_model("llama")).double()
    before = logits(model)
    found = run_smooth_quant_for_sequential_layers(
        model.model.layers, llama_items(model), "W8A8", exclude=["*.q_proj", "*.k_proj", "*.down_proj", "0.*.o_proj"]
    )
    assert "0.self_attn.v_proj" not in found  # nobody who reads it is quantized
    assert "0.mlp.up_proj" not in found
    assert found["0.input_layernorm"].alpha is not None
    assert moved(logits(model), before) < 1e-10


def test_the_layers_to_scale_can_be_named(random_model):
    model = with_outliers(random_model("llama"))
    layers = [{"prev_op": "post_attention_layernorm", "layers": ["mlp.gate_proj", "mlp.up_proj"]}]
    found = run_smooth_quant_for_sequential_layers(
        model.model.layers, llama_items(model), "W8A8", SmoothQuantConfig(alpha=0.5, scaling_layers=layers)
    )
    assert list(found) == ["0.post_attention_layernorm", "1.post_attention_layernorm"]
    assert {search.alpha for search in found.values()} == {0.5}
    wrong = [{"prev_op": "post_attention_layernorm", "layers": ["mlp.gate_proj"]}]
    with pytest.raises(ConfigError, match="name every layer that reads"):
        run_smooth_quant_for_sequential_layers(
            model.model.layers, llama_items(model), "W8A8", SmoothQuantConfig(scaling_layers=wrong)
        )


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (INT3, GPTQConfig(), "AWQConfig or SmoothQuantConfig, not GPTQConfig"),
        (INT3, AWQConfig(clip=True), "clip=True cuts the weights off"),
        (SequentialSmoothQuantConfig(), AWQConfig(), "leave config out"),
        (4, None, "spec says how weights are quantized"),
        (QuantizationConfig(input_tensors=scheme_config("W8A8").input_tensors), None, "with weight"),
        (QuantizationSpec(dtype="int4", group_size=24), None, r"'0\.self_attn\.q_proj' cannot be quantized"),
    ],
)
def test_what_cannot_be_done_is_said(random_model, spec, config, message):
    model = random_model("llama")
    with pytest.raises(ConfigError, match=message):
        run_smooth_quant_for_sequential_layers(model.model.layers, llama_items(model), spec, config)


def test_layers_in_which_nothing_can_be_scaled_are_refused_and_left_alone():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    before = [parameter.clone() for parameter in layer.parameters()]
    with (
        pytest.raises(ConfigError, match="no norm or linear was found"),
        pytest.warns(UserWarning, match="Sequential"),
    ):
        run_smooth_quant_for_sequential_layers([layer], [torch.randn(4, 32)], INT3)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), before, strict=True))
