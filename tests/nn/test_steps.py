"""Steps of an input: an ordered list that every linear takes, and that a run stores. A step that is defined here, and
registered, works in calibration, in a run that is resumed, in evaluation and in packed linears."""

import copy
import json

import pytest
import torch
from torch import nn

import fewbit
from fewbit.checkpoint.native import NativeCheckpoint, StoredStep, block_file
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import attach, quantizers
from fewbit.nn.fake_quant import FakeQuantLinear
from fewbit.nn.linear import Linear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.nn.steps import Divide, Step, register
from fewbit.safetensors_file import write_safetensors

TOKEN = QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
CHANNELS = 128


@register
class Permute(Step):
    """The channels in another order."""

    kind = "permute"

    def __init__(self, order):
        super().__init__()
        self.register_buffer("order", order)

    def forward(self, x):
        return x[..., self.order]


@register
class Flip(Step):
    """The sign of every `every`-th channel changes."""

    kind = "flip"

    def __init__(self, every):
        super().__init__()
        self.every = every

    def forward(self, x):
        sign = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype)
        sign[:: self.every] = -1
        return x * sign

    def stored(self):
        return StoredStep(self.kind, {}, {"every": self.every})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def order(channels=CHANNELS):
    return torch.randperm(channels, generator=seeded(3))


def linears():
    """Linears of each kind, with the same weight."""
    plain = nn.Linear(8, 4).requires_grad_(False)
    return [
        Linear.from_linear(plain),
        FakeQuantLinear.from_module(plain, "W8A8"),
        QuantLinear.from_module(plain, 8, "per-channel"),
    ]


@pytest.mark.parametrize("number", range(3))
def test_steps_are_taken_in_their_order(number):
    linear, x = linears()[number], torch.randn(3, 8, generator=seeded())
    turned = torch.tensor([7, 0, 1, 2, 3, 4, 5, 6])
    quantizer = ActivationQuantizer(TOKEN)
    linear.input_steps = [Flip(2), Permute(turned), quantizer]
    sign = torch.tensor([-1.0, 1.0] * 4)
    assert torch.equal(linear.seen(x), quantizer((x * sign)[..., turned]))
    assert torch.equal(linear.exactly(x), (x * sign)[..., turned])
    assert torch.equal(linear(x), linear.multiply(quantizer((x * sign)[..., turned])))
    assert torch.equal(linear.seen(linear.seen(x, stop=1), 1), linear.seen(x))


def test_channel_scales_divide_behind_changes_of_channels_and_before_the_quantizer():
    linear = linears()[0]
    assert linear.scales_at == 0
    linear.input_steps = [Flip(2)]
    linear.input_quantizer = ActivationQuantizer(TOKEN)  # its place is the last
    assert linear.scales_at == 1
    linear.divide(torch.full((8,), 2.0), folded=True)
    assert [step.kind for step in linear.input_steps] == ["flip", "divide", "quantize"]
    assert linear.scales_at == 1
    linear.leave_folded()
    assert [step.kind for step in linear.input_steps] == ["flip", "quantize"]
    linear.divide(torch.ones(8))
    linear.leave_folded()
    assert [step.kind for step in linear.input_steps] == ["flip", "divide", "quantize"]


def test_an_input_takes_one_step_of_a_kind():
    linear = linears()[0]
    linear.divide(torch.ones(8))
    with pytest.raises(ConfigError, match="one step of a kind, not divide, divide"):
        linear.divide(torch.ones(8))
    assert [step.kind for step in linear.input_steps] == ["divide"]


@pytest.mark.parametrize("number", range(3))
def test_steps_are_copied_and_moved_with_their_linear(number):
    linear = linears()[number]
    linear.input_steps = [Divide(torch.full((8,), 2.0)), *linear.input_steps]
    copied = copy.deepcopy(linear).to("meta")
    assert copied.input_steps[0].scale.is_meta
    assert not linear.input_steps[0].scale.is_meta
    copied.input_steps = ()
    assert linear.input_steps[0].kind == "divide"


def test_steps_are_in_the_state_dict_of_linears_that_users_keep_and_not_in_a_blocks():
    for linear in linears():
        before = set(linear.state_dict())
        linear.input_steps = [Divide(torch.ones(8)), *linear.input_steps]
        kept = set() if isinstance(linear, Linear) else {"divide_input.scale"}
        assert set(linear.state_dict()) - before == kept


def test_halving_a_model_keeps_the_dtype_of_its_scales_and_of_what_flows():
    linear = linears()[2]
    linear.input_steps = [Divide(torch.full((8,), 3.0))]
    half = linear.half()
    assert half.input_steps[0].scale.dtype == torch.float32
    assert half(torch.ones(2, 8, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("made", [Divide(torch.rand(8)), Divide(torch.rand(8), True), Permute(order(8)), Flip(3)])
def test_what_is_stored_gives_the_step_back(made):
    linear, x = linears()[0], torch.randn(3, 8, generator=seeded())
    linear.restore_steps([made.stored()], folded=True)
    (again,) = linear.input_steps
    assert (again.kind, again.folded) == (made.kind, made.folded)
    assert torch.equal(again(x), made(x))
    json.dumps(made.stored().data)


def test_a_quantizer_keeps_its_place_among_stored_steps():
    linear = linears()[0]
    attach(nn.ModuleDict({"a": linear}), {"a.input": TOKEN}, {"a": [StoredStep("quantize"), Flip(2).stored()]})
    assert [step.kind for step in linear.input_steps] == ["quantize", "flip"]


def test_another_config_leaves_the_steps_that_the_weight_undoes():
    linear = linears()[1]
    linear.input_steps = [Flip(2), *linear.input_steps]
    again = FakeQuantLinear.from_module(linear, "W4A16", group_size=8)
    assert [step.kind for step in again.input_steps] == ["flip"]
    assert [step.kind for step in FakeQuantLinear.from_module(linear, "W8A8").input_steps] == ["flip", "quantize"]


def test_a_step_that_nobody_knows_is_refused():
    with pytest.raises(CheckpointError, match="input step 'twist', which this fewbit does not know"):
        linears()[0].restore_steps([StoredStep("twist")])


# --- a step of one's own, all the way -------------------------------------------------------------------------------


class Turned:
    """A source whose down_proj weights have the columns that a permuted and flipped input needs."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def read(self, names, dtype=None):
        tensors = self._source.read(names, dtype)
        return {name: _turned(tensor) if "down_proj" in name else tensor for name, tensor in tensors.items()}


def _turned(weight):
    return Flip(5)(weight[:, order()])


@pytest.fixture
def turning(monkeypatch):
    """A context in which models are opened with steps before every down_proj, which compute the same."""
    original = BlockwiseModel.__init__

    def opened(self, skeleton, source, architecture=None):
        original(self, skeleton, Turned(source), architecture)
        for name, linear in self.linears().items():
            if "down_proj" in name:
                linear.input_steps = [Permute(order()), Flip(5)]

    with monkeypatch.context() as patched:
        patched.setattr(BlockwiseModel, "__init__", opened)
        yield patched


IDS = torch.randint(1, 300, (4, 24), generator=seeded())
RECIPES = {
    "rtn, static": {"scheme": "W8A8_STATIC", "algorithm": "rtn"},
    "awq+gptq": {"scheme": "W4A16", "group_size": 32, "algorithm": "awq+gptq:drift=0.5"},
    "smoothquant+gptq, static": {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+gptq"},
}


def run(model, output, recipe, **options):
    given = {"calibration": [IDS[:2], IDS[2:]], "device": "cpu", "progress": False}
    return fewbit.quantize(model, output=output, config=RECIPES[recipe], **given | options).directory


def perplexity(directory):
    return fewbit.evaluate(directory, [IDS]).perplexity


def test_a_turned_input_is_calibrated_and_quantized_as_it_is_turned(turning, checkpoint, tmp_path):
    model = checkpoint("llama")
    turned = NativeCheckpoint(run(model, tmp_path / "turned", "rtn, static"))
    turning.undo()
    plain = NativeCheckpoint(run(model, tmp_path / "plain", "rtn, static"))
    for name, known in plain.activations().items():
        torch.testing.assert_close(turned.activations()[name].scale, known.scale, rtol=0.02, atol=0.0)
    for name in plain.quantized:
        expected = plain.read([name])[name]
        expected = _turned(expected) if "down_proj" in name else expected
        assert (turned.read([name])[name] - expected).norm() < 0.01 * expected.norm()
    kinds = {name: [step.kind for step in steps] for name, steps in turned.steps().items()}
    assert kinds["model.layers.1.mlp.down_proj"] == ["permute", "flip", "quantize"]
    assert kinds["model.layers.1.mlp.up_proj"] == ["quantize"]
    assert turned.contents.linears["model.layers.1.mlp.down_proj"].steps == ("permute", "flip")
    with pytest.raises(ConfigError, match="down_proj' takes the step 'permute' while the model runs"):
        fewbit.Run(turned.directory).export("compressed-tensors")


@pytest.mark.parametrize("recipe", ["awq+gptq", "smoothquant+gptq, static"])
def test_a_turned_run_is_resumed_to_the_same_bytes(recipe, turning, monkeypatch, checkpoint, tmp_path):
    model, whole = checkpoint("llama"), run(checkpoint("llama"), tmp_path / "whole", recipe)
    with monkeypatch.context() as dying:
        written = []

        def write(*given):
            written.append(given)
            if len(written) == 2:
                raise KeyboardInterrupt
            return write_safetensors(*given)

        dying.setattr("fewbit.checkpoint.native.write_safetensors", write)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "again", recipe)
    again = run(model, tmp_path / "again", recipe, resume=True)
    assert block_file(whole, 1).read_bytes() == block_file(again, 1).read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_and_packed_linears_turn_their_inputs(recipe, turning, checkpoint, random_model, tmp_path):
    model = random_model("llama")
    directory = run(checkpoint("llama"), tmp_path / "run", recipe)
    packed = fewbit.ModelQuantizer(fewbit.Config.from_dict(RECIPES[recipe])).quantize_model(model, [IDS[:2], IDS[2:]])
    turning.undo()
    down = packed.model.layers[0].mlp.down_proj
    assert isinstance(down, QuantLinear)
    assert [step.kind for step in down.input_steps][:2] == ["permute", "flip"]
    loss = packed(IDS, labels=IDS).loss
    assert perplexity(directory) == pytest.approx(float(loss.exp()), rel=1e-3)
    assert perplexity(directory) == pytest.approx(perplexity(checkpoint("llama")), rel=0.2)


def test_steps_of_a_linear_that_is_not_quantized_run_in_the_model_in_memory(turning, random_model):
    config = {"scheme": "W8A16", "algorithm": "rtn", "exclude": ["*down_proj", "lm_head"], "group_size": 64}
    model = random_model("llama")
    expected = model(IDS).logits
    fewbit.ModelQuantizer(fewbit.Config.from_dict(config)).quantize_model(model)
    down = model.model.layers[0].mlp.down_proj
    assert [step.kind for step in down.input_steps] == ["permute", "flip"]
    assert (model(IDS).logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_quantizers_of_turned_inputs_are_found(turning, checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    attach(model.skeleton, {"model.layers.0.mlp.down_proj.input": TOKEN})
    assert set(quantizers(model.skeleton)) == {"model.layers.0.mlp.down_proj.input"}
