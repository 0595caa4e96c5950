"""Quantizers on a model: put there by a recipe or a checkpoint, named by module and slot, taken off again."""

import pytest
import torch
from torch import nn

from fewbit.checkpoint.native import StoredStep
from fewbit.config.spec import AttentionConfig, QuantizationSpec
from fewbit.errors import ArchitectureError, CheckpointError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attach import attach, attention_config, detach, quantizers
from fewbit.nn.linear import adopt
from fewbit.tensor import QuantizedActivation

STATIC = QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax")
TOKEN = QuantizationSpec(dtype="int4", qscheme="per_token", observer="minmax", is_dynamic=True)
KNOWN = QuantizedActivation(STATIC, torch.tensor([[0.25]]))


@pytest.fixture
def model(checkpoint):
    return BlockwiseModel.from_directory(checkpoint("llama"))


def linears():
    """Linears a, b and c, as blocks have them."""
    holder = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    adopt(holder)
    return holder


def test_linears_of_one_group_share_a_quantizer_if_their_specs_are_equal():
    found = linears()
    specs = {"a.input": STATIC, "b.input": STATIC, "c.input": TOKEN}
    attach(found, specs, groups=[["a", "b", "c"]], dtype=torch.bfloat16)
    assert found["a"].input_quantizer is found["b"].input_quantizer
    assert found["c"].input_quantizer is not found["a"].input_quantizer
    assert found["c"].input_quantizer.spec == TOKEN
    assert found["a"].input_quantizer.dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [[["a"], ["b"], ["c"]], []], ids=["groups of one", "in no group"])
def test_linears_that_share_no_input_share_no_quantizer(groups):
    found = linears()
    attach(found, dict.fromkeys(["a.input", "b.input", "c.input"], STATIC), groups=groups)
    assert len({id(linear.input_quantizer) for linear in found.values()}) == 3


def test_outputs_are_never_shared():
    found = linears()
    attach(found, dict.fromkeys(["a.output", "b.output", "c.output"], TOKEN), groups=["abc"])
    assert len({id(linear.output_quantizer) for linear in found.values()}) == 3
    assert all(linear.input_quantizer is None for linear in found.values())


def test_only_what_is_named_is_quantized():
    found = linears()
    attach(found, {"b.input": STATIC}, groups=[["a", "b"]])
    assert found["a"].input_quantizer is found["c"].input_quantizer is None
    assert found["b"].input_steps == (found["b"].input_quantizer,)


def test_what_a_checkpoint_says_is_named_as_it_says_it(model):
    activations = {
        "model.layers.0.self_attn.q_proj.input": KNOWN,
        "model.layers.1.mlp.up_proj.output": QuantizedActivation(TOKEN),
        "model.layers.0.self_attn.key": KNOWN,
        "model.layers.1.self_attn.key": QuantizedActivation(STATIC, torch.tensor([[0.5]])),
    }
    attach(model.skeleton, activations)
    found = quantizers(model.skeleton)
    assert set(found) == set(activations)
    for name, known in activations.items():
        state = found[name].state()
        assert state.spec == known.spec
        assert (state.scale is None) == (known.scale is None)
        assert known.scale is None or torch.equal(state.scale, known.scale)


def test_quantizers_of_some_modules_are_found_by_the_beginning_of_their_names(model):
    attach(model.skeleton, {f"model.layers.{n}.mlp.up_proj.input": KNOWN for n in range(2)})
    assert set(quantizers(model.skeleton, "model.layers.1.")) == {"model.layers.1.mlp.up_proj.input"}
    assert quantizers(model.skeleton, "model.layers.10.") == {}


def test_quantizers_that_linears_share_are_named_for_each_of_them():
    found = linears()
    attach(found, dict.fromkeys(["a.input", "b.input"], STATIC), groups=[["a", "b"]])
    named = quantizers(found)
    assert set(named) == {"a.input", "b.input"}
    assert named["a.input"] is named["b.input"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], None),
        (["model.layers.0.mlp.up_proj.input"], None),
        (["a.self_attn.key"], AttentionConfig(key=STATIC)),
        (["a.key", "b.key", "a.value", "a.query"], AttentionConfig(key=STATIC, value=STATIC, query=STATIC)),
    ],
)
def test_what_is_quantized_inside_attention_follows_from_the_names(names, expected):
    assert attention_config(dict.fromkeys(names, KNOWN)) == expected


def test_detached_blocks_quantize_nothing_and_compute_as_before(model):
    ids = torch.arange(24).view(2, 12)
    (inputs,) = model.enter([{"input_ids": ids}])

    def output(index):
        with model.loaded(index) as block, torch.no_grad():
            return model.call_block(block, inputs.hidden, inputs.calls[index])

    plain = [output(index) for index in range(2)]
    names = [f"{name}.input" for name in model.linears() if "layers" in name]
    attach(model.skeleton, dict.fromkeys([*names, "model.layers.0.self_attn.key"], TOKEN))
    quantized = [output(index) for index in range(2)]
    assert not any(torch.equal(one, other) for one, other in zip(plain, quantized, strict=True))
    detach(model.blocks[0])
    assert quantizers(model.blocks[0]) == {}
    assert torch.equal(output(0), plain[0])
    assert torch.equal(output(1), quantized[1])


def test_blocks_with_quantizers_have_their_checkpoints_tensors_only(model):
    before = set(model.skeleton.state_dict())
    attach(model.skeleton, {"model.layers.0.mlp.up_proj.input": KNOWN, "model.layers.0.self_attn.key": KNOWN})
    assert set(model.skeleton.state_dict()) == before


def test_detaching_leaves_steps_that_the_weights_undo():
    found = linears()
    attach(found, {"a.input": TOKEN})
    found["a"].divide(torch.full((8,), 2.0))
    detach(found)
    assert [step.kind for step in found["a"].input_steps] == ["divide"]


def test_a_linear_that_the_model_does_not_have_is_an_error_that_names_it():
    for given in ({"d.input": KNOWN}, {}):
        with pytest.raises(CheckpointError, match="'d' is quantized, but the model has no such linear"):
            attach(linears(), given, {"d": [StoredStep("quantize")]})


def test_a_model_whose_attention_cannot_be_reached_stays_as_it_was():
    found = linears()
    with pytest.raises(ArchitectureError, match="no attention"):
        attach(found, {"a.input": STATIC, "attn.key": STATIC})
    assert quantizers(found) == {}
