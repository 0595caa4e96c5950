"""Which channels can be scaled: what looking finds is what the data says, and nothing passes that changes a model."""

from dataclasses import replace

import pytest
import torch

from fewbit.config.algorithms import AWQConfig, ScalingLayer, SmoothQuantConfig
from fewbit.errors import ConfigError
from fewbit.models.architecture import Scaling
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.folding import fold
from fewbit.models.scalings import head_dim, scalings

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MOE = {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "head_dim": 16}


def by_producer(found):
    return {scaling.producer: scaling for scaling in found}


def test_looking_finds_what_the_data_says(random_model, family, monkeypatch):
    module = random_model(family)
    listed = scalings(BlockwiseModel.from_module(module))[0]
    assert len(listed) == 4
    monkeypatch.setattr("fewbit.models.blockwise.listed", lambda model_type: None)
    detected = scalings(BlockwiseModel.from_module(module))[0]
    assert by_producer(detected) == by_producer(listed)


def test_routers_and_experts_that_read_a_norm_are_found(random_model):
    module = random_model("qwen2_moe", num_experts=4, shared_expert_intermediate_size=48, decoder_sparse_step=1, **MOE)
    found = by_producer(scalings(BlockwiseModel.from_module(module))[0])
    mlp = found["post_attention_layernorm"]
    assert set(mlp.consumers) == {
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert_gate",
    }
    assert set(mlp.others) == {"mlp.gate.weight", "mlp.experts.gate_up_proj"}
    assert found["mlp.shared_expert.up_proj"].consumers == ("mlp.shared_expert.down_proj",)


def test_experts_as_wide_as_the_model_are_told_from_their_other_matrix(random_model):
    module = random_model(
        "qwen2_moe", num_experts=4, shared_expert_intermediate_size=48, **MOE | {"moe_intermediate_size": 64}
    )
    mlp = by_producer(scalings(BlockwiseModel.from_module(module))[0])["post_attention_layernorm"]
    assert set(mlp.others) == {"mlp.gate.weight", "mlp.experts.gate_up_proj"}  # down_proj has 64 inputs as well


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("stablelm", {}),  # norms with a bias
        ("phi3", {"pad_token_id": 0}),  # q, k, v in one linear
        ("phi", {}),  # one norm for attention and MLP
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("starcoder2", {}),
        ("gemma2", {"head_dim": 16}),
    ],
)
def test_what_is_found_leaves_the_logits_alone(random_model, kind, extra):
    module = random_model(kind, **extra).double()
    module.config._experts_implementation = "eager"  # the other one has no float64
    model = BlockwiseModel.from_module(random_model(kind, **extra))
    found = scalings(model)[0]
    assert found
    ids = torch.arange(48).view(2, 24) % 300
    with torch.no_grad():
        before = module(input_ids=ids).logits
        for block in module.get_submodule(model.architecture.blocks):
            for scaling in found:
                tensors = dict(block.named_parameters())
                channels = tensors[f"{scaling.producer}.weight"].shape[0]
                scale = torch.randn(channels, dtype=torch.float64).exp()
                changed, _ = fold({n: p.data for n, p in tensors.items()}, scaling, scale, head_dim(model))
                for name, tensor in changed.items():
                    tensors[name].data = tensor
        after = module(input_ids=ids).logits
    # transformers computes some norms in float32
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_dictionary_as_quark_writes_it_is_understood(random_model):
    entry = {
        "prev_op": "input_layernorm",
        "layers": list(QKV),
        "inp": "self_attn.q_proj",
        "module2inspect": "self_attn",
        "has_kwargs": True,
        "help": "attention input",
    }
    model = BlockwiseModel.from_module(random_model("llama"))
    for config in (AWQConfig(scaling_layers=[entry]), SmoothQuantConfig(scaling_layers=[entry], alpha=0.5)):
        assert config.scaling_layers == (ScalingLayer(prev_op="input_layernorm", layers=QKV),)
        assert scalings(model, config.scaling_layers)[0] == (Scaling("input_layernorm", QKV),)


def test_the_kind_of_norm_need_not_be_said(random_model):
    model = BlockwiseModel.from_module(random_model("gemma3_text"))
    (found,) = scalings(model, [ScalingLayer(prev_op="input_layernorm", layers=QKV)])[0]
    assert found.offset


def test_a_router_may_be_named_as_a_layer(random_model):
    model = BlockwiseModel.from_module(random_model("qwen2_moe", num_experts=4, **MOE))
    layers = ("mlp.gate", "mlp.experts", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    given = ScalingLayer(prev_op="post_attention_layernorm", layers=(*layers, "mlp.shared_expert_gate"))
    (found,) = scalings(model, [given])[0]
    assert found.others == ("mlp.gate.weight", "mlp.experts.gate_up_proj")
    with pytest.raises(ConfigError, match="routers and gates"):
        scalings(model, [replace(given, layers=layers)])


@pytest.mark.parametrize(
    ("prev_op", "layers", "message"),
    [
        ("input_layernorm", QKV[:2], "another output"),  # v reads it, too
        ("mlp.gate_proj", ("mlp.down_proj",), "another output"),  # SiLU in between
        ("self_attn.k_proj", ("self_attn.o_proj",), "another output"),
        ("mlp.up_proj", ("self_attn.o_proj",), "another output"),
        ("input_norm", QKV, "did you mean 'input_layernorm'"),
        ("input_layernorm", ("self_attn.qproj",), "did you mean 'self_attn.q_proj'"),
        ("mlp", ("mlp.down_proj",), "no weight of its own"),
        ("input_layernorm", ("self_attn",), "none of"),
    ],
)
def test_what_cannot_be_scaled_is_refused_with_the_reason(random_model, prev_op, layers, message):
    model = BlockwiseModel.from_module(random_model("llama"))
    with pytest.raises(ConfigError, match=message):
        scalings(model, [ScalingLayer(prev_op=prev_op, layers=layers)])


def test_a_family_without_anything_to_scale_says_what_to_write(random_model, monkeypatch):
    monkeypatch.setattr("fewbit.models.blockwise.listed", lambda model_type: None)
    monkeypatch.setattr("fewbit.models.scalings._Probe.passes", lambda self, scaling: False)
    with pytest.raises(ConfigError, match=r"llama was found .* scaling_layers = "):
        scalings(BlockwiseModel.from_module(random_model("llama")))


def test_values_of_heads_that_do_not_fit_are_left_out(random_model, monkeypatch):
    model = BlockwiseModel.from_module(random_model("llama"))
    monkeypatch.setattr("fewbit.models.scalings.head_dim", lambda model: 24)  # 2 value heads of 16 are no heads of 24
    assert "self_attn.v_proj" not in by_producer(scalings(model)[0])
