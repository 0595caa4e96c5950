"""Block by block, one block in memory at a time, gives what transformers gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import fewbit
from fewbit.config.run_options import RunOptions
from fewbit.errors import ArchitectureError, CheckpointError
from fewbit.models.architecture import FAMILIES
from fewbit.models.blockwise import BlockwiseModel
from fewbit.runs.quantize import quantize_model

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def tokens(rows=2, length=32, seed=0):
    return torch.randint(304, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, batches):
    """Logits of every batch, all batches through a block before the next block is loaded."""
    inputs = list(model.enter(batches))
    hidden = [entered.hidden for entered in inputs]
    for index in range(len(model)):
        with model.loaded(index) as block, torch.no_grad():
            hidden = [
                model.call_block(block, states, entered.calls[index])
                for states, entered in zip(hidden, inputs, strict=True)
            ]
    with model.head_loaded() as head:
        return [head(states) for states in hidden]


@pytest.mark.parametrize("sharded", [False, True])
def test_logits_from_a_directory_are_those_of_transformers(checkpoint, family, sharded):
    directory = checkpoint(family, sharded=sharded)
    assert (directory / "model.safetensors.index.json").exists() == sharded
    batches = [{"input_ids": tokens(2, 32)}, {"input_ids": tokens(1, 20, seed=1)}]
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    for ours, batch in zip(logits_of(BlockwiseModel.from_directory(directory), batches), batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(ours, reference(**batch).logits, **TOLERANCE)


def test_logits_from_a_module_are_its_own_and_the_module_stays_as_it_was(random_model, family):
    module = random_model(family)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    (ours,) = logits_of(BlockwiseModel.from_module(module), [{"input_ids": tokens()}])
    with torch.no_grad():
        torch.testing.assert_close(ours, module(input_ids=tokens()).logits, **TOLERANCE)
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_of_a_loaded_block_are_copies_of_the_modules(random_model):
    module = random_model("llama")
    model = BlockwiseModel.from_module(module)
    with model.loaded(0) as block:
        block.mlp.down_proj.weight.data.zero_()
    assert module.model.layers[0].mlp.down_proj.weight.abs().min() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_give_the_logits_of_transformers_where_a_token_counts(checkpoint, family, side):
    directory = checkpoint(family)
    mask = torch.ones(3, 32, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 13)):
        if padding:
            mask[row, slice(None, padding) if side == "left" else slice(-padding, None)] = 0
    batches = [{"input_ids": tokens(3), "attention_mask": mask}, {"input_ids": tokens(3, seed=1)}]
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    padded, plain = logits_of(BlockwiseModel.from_directory(directory), batches)
    with torch.no_grad():
        expected = reference(**batches[0]).logits
        torch.testing.assert_close(padded[mask.bool()], expected[mask.bool()], **TOLERANCE)
        torch.testing.assert_close(plain, reference(**batches[1]).logits, **TOLERANCE)


def test_padding_is_told_to_the_blocks(checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[1, :9] = 0
    masked, plain = logits_of(
        model, [{"input_ids": tokens(), "attention_mask": mask}, {"input_ids": tokens(), "attention_mask": mask | 1}]
    )
    assert (masked[1, 9:] - plain[1, 9:]).abs().max() > 1e-2


def test_batches_of_one_shape_share_masks_and_rotary_embeddings(checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    one, other, longer = model.enter(
        [{"input_ids": tokens()}, {"input_ids": tokens(seed=1)}, {"input_ids": tokens(length=40)}]
    )
    assert one.calls is other.calls
    assert one.calls is not longer.calls


def test_every_parameter_is_on_meta_before_and_after_use(checkpoint, family):
    model = BlockwiseModel.from_directory(checkpoint(family))
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())
    logits_of(model, [{"input_ids": tokens()}])
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_only_one_block_has_weights_while_it_is_loaded(checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    with model.loaded(1) as block:
        inside = set(block.parameters())
        assert not any(parameter.is_meta for parameter in inside)
        assert all(parameter.is_meta for parameter in set(model.skeleton.parameters()) - inside)


def test_a_block_is_released_when_its_user_fails(checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    with pytest.raises(ZeroDivisionError), model.loaded(0):
        raise ZeroDivisionError
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_tied_head_is_stored_and_read_once(checkpoint, family):
    model = BlockwiseModel.from_directory(checkpoint(family))
    assert "lm_head.weight" not in model.source.info()
    assert "lm_head.weight" not in model.outside_tensors()
    assert "model.embed_tokens.weight" in model.outside_tensors()


def test_bf16_checkpoints_are_computed_in_float32(checkpoint):
    directory = checkpoint("llama", torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
    (ours,) = logits_of(BlockwiseModel.from_directory(directory), [{"input_ids": tokens()}])
    assert ours.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(ours, reference(input_ids=tokens()).logits, **TOLERANCE)


def test_tensors_are_those_of_the_checkpoint_each_once(checkpoint, family):
    model = BlockwiseModel.from_directory(checkpoint(family))
    names = [name for index in range(len(model)) for name in model.block_tensors(index)] + model.outside_tensors()
    assert sorted(names) == sorted(model.source.info())


UNLISTED = {
    "phi": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "stablelm": {},
    "olmo2": {},
    "starcoder2": {},
    "falcon": {"ffn_hidden_size": 128, "num_hidden_layers": 5},  # a linear of its own; its blocks return tuples
}
FOUND = {
    "phi": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
        ("self_attn.dense",),
        ("mlp.fc2",),
    ),
    "opt": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    "stablelm": [group.members for group in FAMILIES[0].kinds[0]],
    "olmo2": [group.members for group in FAMILIES[0].kinds[0]],
    "starcoder2": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.c_fc",),
        ("mlp.c_proj",),
    ),
    "falcon": (
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    ),
}


@pytest.mark.parametrize("kind", list(UNLISTED))
def test_structure_of_an_unlisted_family_is_detected(random_model, kind):
    model = BlockwiseModel.from_module(random_model(kind, **UNLISTED[kind]))
    assert model.architecture.detected
    assert {frozenset(group.members) for group in model.groups(0)} == {frozenset(group) for group in FOUND[kind]}
    assert [group.members[0] for group in model.groups(0)] == [group[0] for group in FOUND[kind]]  # execution order
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


@pytest.mark.parametrize("kind", list(UNLISTED))
def test_logits_of_a_detected_family_are_those_of_transformers(random_model, kind):
    module = random_model(kind, **UNLISTED[kind])
    (ours,) = logits_of(BlockwiseModel.from_module(module), [{"input_ids": tokens()}])
    with torch.no_grad():
        torch.testing.assert_close(ours, module(input_ids=tokens()).logits, **TOLERANCE)


def test_detection_agrees_with_the_listed_families(checkpoint, family, monkeypatch):
    listed = BlockwiseModel.from_directory(checkpoint(family))
    monkeypatch.setattr("fewbit.models.blockwise.listed", lambda model_type: None)
    detected = BlockwiseModel.from_directory(checkpoint(family))
    assert detected.architecture.detected
    assert [group.members for group in detected.groups(0)] == [group.members for group in listed.groups(0)]
    assert [detected.architecture.blocks, detected.architecture.embeddings, detected.architecture.head] == [
        listed.architecture.blocks,
        listed.architecture.embeddings,
        listed.architecture.head,
    ]


def test_an_undetectable_structure_is_an_error_that_says_what_to_write(random_model):
    with pytest.raises(ArchitectureError, match="not listed") as caught:
        BlockwiseModel.from_module(random_model("mamba", state_size=4)).groups(0)
    assert "FAMILIES in fewbit/models/architecture.py" in str(caught.value)
    assert "Architecture('mamba', ('mamba',), (" in str(caught.value)


def test_a_module_of_another_library_is_refused():
    with pytest.raises(ArchitectureError, match="Linear is no transformers model"):
        BlockwiseModel.from_module(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named_before_any_work(llama, name):
    tensors = load_file(llama / "model.safetensors")
    del tensors[name]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        BlockwiseModel.from_directory(llama)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.0.mlp.down_proj.weight", (64, 96)), ("model.embed_tokens.weight", (200, 64))],
)
def test_a_shape_that_contradicts_the_config_names_the_tensor_and_both_shapes(llama, name, shape):
    tensors = load_file(llama / "model.safetensors")
    expected = tuple(tensors[name].shape)
    tensors[name] = torch.zeros(shape)
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        logits_of(BlockwiseModel.from_directory(llama), [{"input_ids": tokens()}])
    assert name.rpartition(".")[0].rpartition(".")[2] in str(caught.value)
    assert str(shape) in str(caught.value)
    assert str(expected) in str(caught.value)


def test_a_directory_without_config_is_refused(llama):
    (llama / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        BlockwiseModel.from_directory(llama)


def test_a_config_of_an_unknown_model_type_is_refused(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    with pytest.raises(ArchitectureError, match=r"config\.json"):
        BlockwiseModel.from_directory(llama)


def test_a_checkpoint_with_a_pickle_beside_it_reads_the_safetensors(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (directory / "pytorch_model.bin").write_bytes(b"PK not to be read")
    assert len(BlockwiseModel.from_directory(directory)) == 2


def test_a_detected_family_is_quantized_end_to_end(random_model, tokenizer, tmp_path):
    from fewbit.config.recipe import Config

    config = Config.from_dict(
        {
            "scheme": "W4A16",
            "group_size": 32,
            "algorithm": "rtn",
            "calibration": {"num_samples": 4, "sequence_length": 32},
        }
    )
    run = quantize_model(
        random_model("phi"), config, tmp_path / "run", calibration=tokens(4), options=RunOptions("cpu", progress=False)
    )
    rows = json.loads((run / "report.json").read_text())["linears"]
    assert sum(row["status"] == "quantized" for row in rows) == 2 * 6


def test_an_encoder_is_refused_with_what_can_be_done():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=300, **sizes))
    with pytest.raises(ArchitectureError, match="BertEncoder, which holds the blocks"):
        BlockwiseModel.from_module(model)


OTHERS = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},  # embeddings narrower than the blocks
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},  # blocks called by position
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "falcon": {"ffn_hidden_size": 96},
    "cohere": {"pad_token_id": 0},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_families_that_are_not_listed_compute_what_transformers_computes(kind, random_model):
    model = random_model(kind, **OTHERS[kind])
    ids = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert fewbit.evaluate(model, ids).perplexity == pytest.approx(losses.exp().item(), rel=1e-4)


def test_a_configuration_that_the_models_own_code_stumbles_over_is_a_sentence(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    changed = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None}
    (directory / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ArchitectureError, match="fails with this configuration: "):
        fewbit.evaluate(directory, torch.arange(20).view(2, 10))
