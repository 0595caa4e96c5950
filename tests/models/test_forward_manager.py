"""Any block runs the same way: its own output, whatever its signature, with the masks that its model would give it."""

import warnings

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from fewbit.calibration.recorded import build_calib_dataset_inputs
from fewbit.calibration.recorder import DataRecorder
from fewbit.errors import ArchitectureError, ConfigError
from fewbit.models.forward_manager import KNOWN, LayerForwardManager, forward_manager

TOKENS = 24  # more than every sliding window


@pytest.fixture
def manager():
    return LayerForwardManager(KNOWN)


def prompt(batch=2, seed=0):
    return torch.randint(1, 300, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def recorded(model, modules, **call):
    """Items per module, and the model's own output of each."""
    recorder = DataRecorder(model)
    recorder.register_input_hooks(modules)
    recorder.register_output_hooks(modules)
    recorder.register_input_ids_hooks()
    with_positions = [name for name in modules if name.count(".") == 2]
    recorder.register_pos_embed_hooks(with_positions)
    with torch.no_grad():
        model(prompt(), use_cache=False, **call)
    recorder.remove_hooks()
    for name in modules:
        (item,) = build_calib_dataset_inputs([recorder.recorded], key=f"model_input.{name}")
        yield name, item, recorder.recorded[f"model_output.{name}"][0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_s_blocks_give_what_they_give_inside_their_model(random_model, family, attention):
    model = random_model(family)
    model.set_attn_implementation(attention)
    names = [f"model.layers.{index}" for index in range(len(model.model.layers))]
    for name, item, expected in recorded(model, names):
        with torch.no_grad():
            out = forward_manager.forward(model.get_submodule(name), item["input_tensor"], **item["kwargs"])
        assert torch.allclose(out, expected, atol=1e-5), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padding_is_not_attended_to(random_model, kind, attention):
    model = random_model(kind)
    model.set_attn_implementation(attention)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :5] = 0
    for name, item, expected in recorded(model, ["model.layers.0", "model.layers.1"], attention_mask=mask):
        with torch.no_grad():
            out = forward_manager.forward(model.get_submodule(name), item["input_tensor"], **item["kwargs"])
        assert torch.allclose(out[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_position_embeddings_may_be_given_by_layer_type(random_model):
    model = random_model("gemma3_text")
    types = model.config.layer_types
    assert len(set(types)) == 2
    names = [f"model.layers.{index}" for index in range(len(types))]
    items = list(recorded(model, names))
    table = {kind: item["kwargs"]["position_embeddings"] for kind, (_, item, _) in zip(types, items, strict=True)}
    for name, item, expected in items:
        with torch.no_grad():
            out = forward_manager.forward(
                model.get_submodule(name), item["input_tensor"], **item["kwargs"] | {"position_embeddings": table}
            )
        assert torch.allclose(out, expected, atol=1e-5)


def test_attention_mlp_and_linear_run_alike(random_model):
    model = random_model("llama")
    names = [f"model.layers.1{part}" for part in ("", ".self_attn", ".mlp", ".mlp.down_proj")]
    items = {name: (item, expected) for name, item, expected in recorded(model, names)}
    kwargs = items["model.layers.1"][0]["kwargs"]
    for name, (item, expected) in items.items():
        with torch.no_grad():
            out = forward_manager.forward(model.get_submodule(name), item["input_tensor"], **kwargs)
        assert torch.allclose(out, expected, atol=1e-5), name


def test_a_vision_transformer_s_layers_attend_to_everything():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    vit = ViTModel(config).eval()
    recorder = DataRecorder(vit)
    recorder.register_input_hooks()
    recorder.register_output_hooks()
    with torch.no_grad():
        vit(torch.randn(3, 3, 12, 12))
        x = recorder.recorded["model_input"][0]
        for layer in vit.layers:
            x = forward_manager.forward(layer, x)
    assert torch.allclose(x, recorder.recorded["model_output"][0], atol=1e-6)


def test_known_layers_give_no_warning(random_model):
    layer = random_model("llama").model.layers[0].mlp
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward_manager.forward(layer, torch.ones(1, 2, 64))
        forward_manager.forward(nn.Linear(4, 2), torch.ones(1, 4), position_ids=torch.zeros(1, 1))


class Odd(nn.Module):
    """No name that is known, arguments and outputs of its own."""

    def forward(self, x, shift=0.0):
        return {"note": "text", "first": x + shift, "second": x}


def test_an_unknown_layer_is_called_plainly_after_one_warning(manager):
    x = torch.ones(1, 2)
    with pytest.warns(UserWarning, match=r"Odd is no layer that is known.*forward_manager\.register\('Odd', fn\)"):
        out = manager.forward(Odd(), x, shift=2.0, position_ids=None)
    assert torch.equal(out, x + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manager.forward(Odd(), x)


def test_a_registered_forward_is_used(manager):
    manager.register("Odd", lambda layer, inputs, **kwargs: layer(inputs)["second"])
    x = torch.ones(1, 2)
    assert torch.equal(manager.forward(Odd(), x, shift=3.0), x)


def test_register_is_a_decorator_too(manager):
    @manager.register(Odd)
    def run(layer, inputs, **kwargs):
        return (None, inputs * 5)

    assert torch.equal(manager.forward(Odd(), torch.ones(2)), torch.full((2,), 5.0))
    assert run(None, torch.ones(1))[1] == 5


def test_the_most_particular_forward_wins(manager):
    def by(value):
        return lambda layer, inputs, **kwargs: inputs + value

    class Odder(Odd):
        pass

    x = torch.zeros(1)
    for key, value in (("O*", 1), ("*d*", 2), ("Odd", 3), (Odd, 4)):
        manager.register(key, by(value))
        assert manager.forward(Odd(), x) == value
        assert manager.forward(Odder(), x) == value
    manager.register("Odder", by(5))
    assert manager.forward(Odder(), x) == 5
    assert manager.forward(Odd(), x) == 4


@pytest.mark.parametrize("key", ["*DecoderLayer", "Linear"])
def test_a_second_forward_is_refused_unless_it_overrides(manager, key):
    before = manager.find(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="has a forward already; pass override=True"):
        manager.register(key, lambda layer, inputs, **kwargs: inputs)
    assert manager.find(nn.Linear(1, 1)) is before
    manager.register(key, lambda layer, inputs, **kwargs: inputs * 0, override=True)
    if key == "Linear":
        assert manager.forward(nn.Linear(3, 3), torch.ones(3)).abs().max() == 0


def test_what_is_no_forward_is_refused(manager):
    with pytest.raises(ConfigError, match="a forward is a function"):
        manager.register("Odd", 3)


def test_an_output_without_a_tensor_is_refused(manager):
    for output in (None, ("text",), {}, 3):
        manager.register("Odd", lambda layer, inputs, output=output, **kwargs: output, override=True)
        with pytest.raises(ArchitectureError, match="there is no tensor"):
            manager.forward(Odd(), torch.ones(1))


def test_missing_position_embeddings_are_named(random_model):
    layer = random_model("llama").model.layers[0]
    with pytest.raises(ArchitectureError, match="LlamaDecoderLayer needs position_embeddings; record them"):
        forward_manager.forward(layer, torch.ones(1, 4, 64))


class TestABatchThatGetsLost:
    """`return output[0]` is what users write who know layers that return tuples."""

    X = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0))

    @staticmethod
    def first(layer, inputs, **kwargs):
        output = layer(inputs, **kwargs)
        return output[0]

    @pytest.mark.parametrize("batch", [1, 3])
    def test_the_first_element_of_a_layer_that_returns_a_tensor_is_the_tensor(self, manager, random_model, batch):
        model = random_model("llama")
        layer, x = model.model.layers[0], self.X[:batch]
        embeddings = model.model.rotary_emb(x, torch.arange(6).unsqueeze(0))
        manager.register("LlamaDecoderLayer", self.first)
        with torch.no_grad():
            out = manager.forward(layer, x, position_embeddings=embeddings)
            assert torch.equal(out, layer(x, position_embeddings=embeddings))
        assert not layer._forward_hooks

    def test_the_first_element_of_a_tuple_stays_what_it_is(self, manager):
        class Pair(nn.Module):
            def forward(self, x):
                return x * 2, x * 3

        manager.register("Pair", self.first)
        assert torch.equal(manager.forward(Pair(), self.X), self.X * 2)

    def test_what_lost_the_batch_otherwise_is_an_error(self, manager):
        manager.register("Odd", lambda layer, inputs, **kwargs: inputs[0] + 1)
        with pytest.raises(ArchitectureError, match=r"Odd gave back \[6, 64\] for \[3, 6, 64\]: the batch is gone"):
            manager.forward(Odd(), self.X)

    def test_one_vector_a_row_is_no_lost_batch(self, manager):
        manager.register("Odd", lambda layer, inputs, **kwargs: inputs.mean(1))
        assert manager.forward(Odd(), self.X).shape == (3, 64)


def test_a_cell_that_runs_again_registers_again(manager):
    def run_again():
        def forward(layer, inputs, **kwargs):
            return inputs * 7

        manager.register("Odd", forward)

    run_again()
    run_again()
    assert manager.forward(Odd(), torch.ones(1)) == 7
