"""A stack of layers in memory is quantized as the pipeline quantizes a model: layer by layer, on quantized inputs."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from fewbit.api import quantize
from fewbit.calibration.recorded import build_calib_dataset_inputs
from fewbit.calibration.recorder import DataRecorder
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.algorithms import AWQConfig, GPTQConfig, RTNConfig
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationSpec
from fewbit.engine.sequential import SequentialGPTQConfig, run_gptq_for_sequential_layers
from fewbit.errors import ArchitectureError, CalibrationError, ConfigError, FewbitError
from fewbit.models.forward_manager import LayerForwardManager, forward_manager

TOKENS = 48
SPEC = QuantizationSpec(dtype="int3", group_size=32)
LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture
def model(random_model):
    return random_model("llama")


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    model = ViTModel(config).eval()
    for parameter in model.layers.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return model


def prompts(count=3, batch=2, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 300, (batch, tokens), generator=generator) for _ in range(count)]


def record(model, calls):
    with DataRecorder(model) as recorder, torch.no_grad():
        for call in calls:
            model(**call, use_cache=False) if "input_ids" in call else model(**call)
    return build_calib_dataset_inputs([recorder.recorded])


def llama_items(model, **options):
    return record(model, [{"input_ids": ids} for ids in prompts(**options)])


class Mlp(nn.Module):
    """A layer of a stack that no library knows; its inputs are strongly correlated."""

    def __init__(self, channels=32, dtype=torch.float32):
        super().__init__()
        self.up, self.down = nn.Linear(channels, 64, dtype=dtype), nn.Linear(64, channels, dtype=dtype)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(x)))


def mlps(count=2, **options):
    torch.manual_seed(1)
    return [Mlp(**options) for _ in range(count)]


def correlated(count=4, tokens=64, channels=32, rank=6):
    """Batches [1, tokens, channels] that vary mostly along a few directions."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(rank, channels, generator=generator)
    return [
        torch.randn(1, tokens, rank, generator=generator) @ mix
        + 0.1 * torch.randn(1, tokens, channels, generator=generator)
        for _ in range(count)
    ]


def through(layers, batches):
    with torch.no_grad():
        for layer in layers:
            batches = [layer(x) for x in batches]
    return torch.cat(batches)


def squared_error(layers, original, batches):
    return float((through(layers, batches) - through(original, batches)).square().sum())


@pytest.mark.parametrize("config", [None, RTNConfig(), GPTQConfig(drift=0.5)])
def test_every_linear_is_replaced_by_its_quantized_values(model, config):
    layers = model.model.layers
    others = {name: p.clone() for name, p in layers.named_parameters() if p.ndim == 1}
    parameters = dict(layers.named_parameters())
    results = run_gptq_for_sequential_layers(layers, llama_items(model), SPEC, config, prefix="model.layers")
    assert list(results) == [f"model.layers.{index}.{name}" for index in (0, 1) for name in LLAMA]
    for name, result in results.items():
        linear = model.get_submodule(name)
        assert torch.equal(linear.weight, result.weight.dequantize())
        assert result.weight.spec == SPEC
        assert result.tokens == 3 * 2 * TOKENS
        assert result.fallback is None
        assert 0 < result.loss < 0.2
    for name, parameter in layers.named_parameters():
        assert parameter is parameters[name]  # an optimizer or a state dict that refers to it still does
        assert parameter.requires_grad
        if name in others:
            assert torch.equal(parameter, others[name])
    assert not any("forward" in vars(module) for module in layers.modules())


def test_the_pipeline_gives_the_same(model, tmp_path):
    ids = prompts()
    run = quantize(
        copy.deepcopy(model),
        output=tmp_path / "run",
        config={"scheme": "W4A16", "group_size": 32, "algorithm": "gptq"},
        calibration=[{"input_ids": batch} for batch in ids],
        device="cpu",
        progress=False,
    )
    checkpoint = NativeCheckpoint(run.directory)
    spec = scheme_config("W4A16", 32).weight
    results = run_gptq_for_sequential_layers(model.model.layers, llama_items(model), spec, prefix="model.layers")
    for name, result in results.items():
        expected = checkpoint.read_quantized(f"{name}.weight")
        assert expected.spec == result.weight.spec
        same = (expected.codes == result.weight.codes).float().mean()
        assert same > 0.98, name  # sums in another order may turn a code that lies between two


def test_inputs_recorded_during_generation_quantize_as_well(model):
    with DataRecorder(model) as recorder:
        for ids in prompts(batch=1, tokens=20):
            model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    items = build_calib_dataset_inputs([recorder.recorded])
    results = run_gptq_for_sequential_layers(model.model.layers, items, "W8A16-g32")
    assert {result.tokens for result in results.values()} == {3 * 28}
    assert max(result.loss for result in results.values()) < 1e-3


def test_a_vision_transformer_s_encoder_is_quantized(vit):
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    items = record(vit, [{"pixel_values": part} for part in images.split(2)])
    with torch.no_grad():
        before = vit(images).last_hidden_state
    results = run_gptq_for_sequential_layers(vit.layers, items, SequentialGPTQConfig(bits=8, group_size=16))
    names = [f"attention.{name}_proj" for name in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
    assert list(results) == [f"{index}.{name}" for index in (0, 1) for name in names]
    assert {result.tokens for result in results.values()} == {4 * 10}
    with torch.no_grad():
        after = vit(images).last_hidden_state
    assert 0 < (after - before).norm() < 0.02 * before.norm()


def test_gptq_beats_rounding_to_nearest_on_correlated_inputs():
    original, batches = mlps(), correlated()
    error = {}
    for config in (RTNConfig(), GPTQConfig()):
        layers = copy.deepcopy(original)
        run_gptq_for_sequential_layers(layers, batches, SPEC, config, forward=silent())
        error[config.name] = squared_error(layers, original, batches)
    assert error["gptq"] < 0.6 * error["rtn"]


def test_making_up_for_the_drift_of_the_inputs_brings_the_outputs_nearer():
    original, batches = mlps(3), correlated()
    error = {}
    for drift in (0.0, 0.5):
        layers = copy.deepcopy(original)
        run_gptq_for_sequential_layers(layers, batches, SPEC, GPTQConfig(drift=drift), forward=silent())
        error[drift] = squared_error(layers, original, batches)
    assert error[0.5] < 0.9 * error[0.0]


def silent():
    """A manager that knows the layers of these tests."""
    return LayerForwardManager({"Mlp": lambda layer, x, **kwargs: layer(x)})


@pytest.mark.parametrize("pieces", [1, 2, 16])
def test_how_the_tokens_are_split_into_batches_does_not_matter(pieces):
    whole = torch.cat(correlated(4), 1).double()  # in fp32 the order of sums reaches the next linear's roundings
    layers, again = mlps(dtype=torch.float64), mlps(dtype=torch.float64)
    results = run_gptq_for_sequential_layers(layers, whole, SPEC, forward=silent())
    split = run_gptq_for_sequential_layers(again, whole.chunk(pieces, 1), SPEC, forward=silent())
    for name, result in results.items():
        assert split[name].tokens == result.tokens
        assert split[name].error == pytest.approx(result.error, rel=1e-4)
        assert torch.equal(split[name].weight.codes, result.weight.codes)


def test_whole_numbers_are_counted_exactly_however_they_are_split():
    x = torch.randint(-3, 4, (64, 32), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    one, other = (
        run_gptq_for_sequential_layers(layers, parts, SPEC)["0"].weight
        for layers, parts in zip(((linear(),), (linear(),)), ([x], x.split([5, 40, 19])), strict=True)
    )
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


def linear():
    torch.manual_seed(3)
    return nn.Linear(32, 16)


def test_replay_gives_the_same_bytes_as_staging(model):
    items, other = llama_items(model), copy.deepcopy(model)
    staged = run_gptq_for_sequential_layers(model.model.layers, items, SPEC)
    replayed = run_gptq_for_sequential_layers(other.model.layers, items, SPEC, strategy="replay")
    for name, result in staged.items():
        assert torch.equal(result.weight.codes, replayed[name].weight.codes)
        assert torch.equal(result.weight.scale, replayed[name].weight.scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_keep_their_dtype_and_mode(dtype):
    layers, reference = mlps(dtype=dtype), mlps(dtype=dtype)
    layers[0].train()
    layers[1].eval()
    bias = layers[0].up.bias.clone()
    results = run_gptq_for_sequential_layers(layers, [x.to(dtype) for x in correlated()], SPEC, forward=silent())
    for name, result in results.items():
        weight = layers[int(name[0])].get_submodule(name[2:]).weight
        assert weight.dtype == dtype
        assert torch.equal(weight, result.weight.dequantize(dtype))
        assert result.weight.scale.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(layers[0].up.bias, bias)
    assert [layer.training for layer in layers] == [True, False]
    assert (
        through(layers, [torch.ones(1, 32, dtype=dtype)]).dtype
        == through(reference, [torch.ones(1, 32, dtype=dtype)]).dtype
    )


def test_inputs_are_not_written_to():
    batches = correlated()
    before = [x.clone() for x in batches]
    run_gptq_for_sequential_layers(mlps(), batches, SPEC, forward=silent())
    assert all(torch.equal(x, y) for x, y in zip(batches, before, strict=True))


def test_the_two_ways_to_write_a_configuration_are_one():
    one, other = mlps(), mlps()
    run_gptq_for_sequential_layers(
        one,
        correlated(),
        SequentialGPTQConfig(bits=3, group_size=16, method="per-block", damp=0.02, blocksize=8),
        forward=silent(),
    )
    spec = QuantizationSpec(dtype="int3", group_size=16)
    run_gptq_for_sequential_layers(other, correlated(), spec, GPTQConfig(damping=0.02, block_size=8), forward=silent())
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.up.weight, b.up.weight)
        assert torch.equal(a.down.weight, b.down.weight)


@pytest.mark.parametrize(
    ("method", "shape"),
    [("per-tensor", (1, 1)), ("per-channel", (64, 1)), ("per-token", (64, 1)), ("per-block", (64, 2))],
)
def test_methods_say_what_shares_a_scale(method, shape):
    results = run_gptq_for_sequential_layers(
        mlps(1), correlated(), SequentialGPTQConfig(bits=4, group_size=16, method=method), forward=silent()
    )
    assert results["0.up"].weight.scale.shape == shape


def test_padding_does_not_count(model):
    ids = prompts(1, 2)[0]
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    found = []
    for padding in (0, 7):
        padded = record(model, [{"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}])
        layers = copy.deepcopy(model.model.layers)
        found.append(run_gptq_for_sequential_layers(layers, padded, SPEC))
    alone = record(model, [{"input_ids": ids[:1, 20:]}, {"input_ids": ids[1:]}])
    expected = run_gptq_for_sequential_layers(copy.deepcopy(model.model.layers), alone, SPEC)
    for name, result in found[0].items():
        assert torch.equal(result.weight.codes, found[1][name].weight.codes)
        assert result.tokens == expected[name].tokens == 2 * TOKENS - 20
        if name.startswith("0.self_attn.q"):  # behind it, sums in another order have rounded some codes otherwise
            assert result.error == pytest.approx(expected[name].error, rel=0.01)


def test_linears_can_be_left_as_they_are():
    layers, original = mlps(), mlps()
    results = run_gptq_for_sequential_layers(layers, correlated(), SPEC, exclude=["*.up", "1.down"], forward=silent())
    assert list(results) == ["0.down"]
    assert torch.equal(layers[0].up.weight, original[0].up.weight)
    assert torch.equal(layers[1].down.weight, original[1].down.weight)


def test_layers_without_linears_are_passed():
    stack = nn.Sequential(nn.LayerNorm(32), *mlps(1), nn.ReLU(), nn.Linear(32, 16))
    results = run_gptq_for_sequential_layers(stack, correlated(), SPEC, forward=LayerForwardManager({"*": plain}))
    assert list(results) == ["1.up", "1.down", "3"]
    assert results["3"].weight.shape == (16, 32)


def plain(layer, x, **kwargs):
    return layer(x)


def test_linears_that_no_token_reaches_are_rounded_and_named(caplog):
    class Unused(Mlp):
        def forward(self, x):
            return x + self.up(x)[..., :32]

    with caplog.at_level(logging.WARNING, "fewbit"):
        results = run_gptq_for_sequential_layers(
            [Unused()], correlated(), SPEC, forward=LayerForwardManager({"*": plain})
        )
    assert results["0.down"].fallback == "round to nearest: no token reached it"
    assert results["0.down"].tokens == 0
    assert results["0.up"].fallback is None
    assert "0.down fell back" in caplog.text


def test_dropout_is_off_while_layers_are_calibrated():
    class Dropping(Mlp):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    torch.manual_seed(1)
    layers = [Dropping().train(), Dropping().train()]
    again = copy.deepcopy(layers)
    one = run_gptq_for_sequential_layers(layers, correlated(), SPEC, forward=LayerForwardManager({"*": plain}))
    other = run_gptq_for_sequential_layers(again, correlated(), SPEC, forward=LayerForwardManager({"*": plain}))
    assert all(torch.equal(one[name].weight.codes, other[name].weight.codes) for name in one)


def test_an_error_on_the_way_leaves_all_layers_as_they_were():
    layers, original = mlps(dtype=torch.bfloat16), mlps(dtype=torch.bfloat16)
    layers[1].down.bias.data[3] = original[1].down.bias.data[3] = 0.0

    def broken(layer, x, **kwargs):
        inner = layer.up(x)
        return layer.down(inner * (float("nan") if layer is layers[1] else 1.0))

    with pytest.raises(CalibrationError, match="the input of 'down' holds NaN"):
        run_gptq_for_sequential_layers(layers, correlated(), SPEC, forward=LayerForwardManager({"Mlp": broken}))
    assert torch.equal(layers[0].up.weight, original[0].up.weight)
    for (name, parameter), (_, expected) in zip(
        layers[1].named_parameters(), original[1].named_parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
        assert parameter.dtype == torch.bfloat16
    assert not any("forward" in vars(module) for module in layers[1].modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spec": QuantizationSpec(dtype="int4", group_size=24)}, ConfigError, r"'0\.up' cannot be quantized.*24"),
        ({"spec": "W8A8"}, ConfigError, "W8A8 does not quantize weights alone"),
        ({"spec": "W4A61"}, ConfigError, "W4A61"),
        ({"spec": 4}, ConfigError, "not int"),
        ({"spec": GPTQConfig()}, ConfigError, "GPTQConfig says nothing of bits; give a spec before it"),
        ({"spec": QuantizationSpec(dtype="int12", qscheme="per_channel")}, ConfigError, "int12 .* but not stored"),
        ({"spec": SPEC, "config": AWQConfig()}, ConfigError, "RTNConfig or GPTQConfig, not AWQConfig"),
        ({"spec": SequentialGPTQConfig(), "config": GPTQConfig()}, ConfigError, "leave config out"),
        ({"spec": SPEC, "exclude": ["*.gate"]}, ConfigError, r"exclude: '\*\.gate' matches no linear"),
        ({"spec": SPEC, "inputs": []}, CalibrationError, "there are no inputs"),
        ({"spec": SPEC, "inputs": ["text"]}, CalibrationError, "an input is a tensor or .* not str"),
        ({"spec": SPEC, "layers": [nn.ReLU()]}, ArchitectureError, "no linear in the layers"),
        ({"spec": QuantizationSpec(dtype="int8", qscheme="per_token")}, ConfigError, "per_token is for activations"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_changes(arguments, error, message):
    layers, original = mlps(), mlps()
    given = {"layers": layers, "inputs": correlated(), "forward": silent()} | arguments
    with pytest.raises(error, match=message):
        run_gptq_for_sequential_layers(**given)
    assert torch.equal(layers[0].up.weight, original[0].up.weight)


def test_a_wrong_field_of_the_configuration_is_named():
    with pytest.raises(ConfigError, match=r"no field 'group'; did you mean 'group_size'"):
        SequentialGPTQConfig(group=64)
    with pytest.raises(ConfigError, match=r"SequentialGPTQConfig\.method"):
        SequentialGPTQConfig(method="per-row")
    with pytest.raises(ConfigError, match=r"SequentialGPTQConfig\.bits"):
        SequentialGPTQConfig(bits=9)


def test_layers_that_rotate_positions_in_several_ways_are_not_given_one(random_model):
    model = random_model("gemma3_text")
    items = record(model, [{"input_ids": ids} for ids in prompts(1)])
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ArchitectureError, match=r"2 ways \(full_attention, sliding_attention\)"):
        run_gptq_for_sequential_layers(model.model.layers, items, SPEC)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    alike = [
        layer for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True) if "full" not in kind
    ]
    assert len(run_gptq_for_sequential_layers(alike, items, SPEC)) == 7 * len(alike)


def test_the_shared_manager_runs_layers_by_default():
    with pytest.warns(UserWarning, match="MyOwn is no layer that is known"):
        run_gptq_for_sequential_layers([type("MyOwn", (Mlp,), {})()], correlated(), SPEC)
    forward_manager.register("RegisteredHere", plain)
    run_gptq_for_sequential_layers([type("RegisteredHere", (Mlp,), {})()], correlated(), SPEC)


def test_a_weight_that_two_linears_share_is_refused():
    linear_ = linear()
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    tied[1].weight = tied[0].weight
    for layers in ([linear_, linear_], [tied]):
        with pytest.raises(ConfigError, match="one weight"):
            run_gptq_for_sequential_layers(layers, torch.randn(1, 8, 32), SPEC)


class Experts(nn.Module):
    """As transformers holds them: one tensor for all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(4, 32, 32))
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        return self.out(torch.einsum("bti,eoi->bto", x, self.weight))


def test_stacks_of_matrices_are_refused_unless_somebody_says_that_they_stay():
    layers = [Experts(), Experts()]
    with pytest.raises(ConfigError, match=r"L\.\*\.weight \(Experts, 2 of 4 × 32 × 32, 79\.5%\).*exclude="):
        run_gptq_for_sequential_layers(layers, correlated(), SPEC, forward=silent(), prefix="L")
    for pattern in ("*.weight", "L.?.weight"):
        results = run_gptq_for_sequential_layers(
            layers, correlated(), SPEC, forward=silent(), prefix="L", exclude=[pattern]
        )
        assert set(results) == {"L.0.out", "L.1.out"}


def test_other_matrices_that_stay_are_said(caplog):
    layer = nn.Sequential(nn.Linear(32, 32), nn.GRU(32, 32))
    layer[1].forward = lambda x: x
    run_gptq_for_sequential_layers([layer], correlated(), SPEC, forward=silent())
    assert "0.1.weight_ih_l0 (GRU, 96 × 32" in caplog.text


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_anew_are_refused():
    layer = nn.Sequential(nn.utils.weight_norm(nn.Linear(32, 32)))
    with pytest.raises(ConfigError, match=r"0\.0 \(Linear\) is computed anew"):
        run_gptq_for_sequential_layers([layer], correlated(), SPEC, forward=silent())
    layer[0] = nn.Linear(32, 32, device="meta")
    with pytest.raises(FewbitError, match="meta device"):
        run_gptq_for_sequential_layers([layer], correlated(), SPEC, forward=silent())
