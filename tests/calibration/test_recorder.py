"""The recorder sees what the model's modules see, step by step, and leaves the model as it was."""

import pytest
import torch
from transformers import ViTConfig, ViTModel

from fewbit.calibration.recorded import read_recording
from fewbit.calibration.recorder import DataRecorder
from fewbit.errors import ArchitectureError, CalibrationError, ConfigError

BATCH, PROMPT, NEW = 2, 9, 5  # the last new token is sampled, not run: NEW − 1 decode steps
CHANNELS, HEAD = 64, 16


@pytest.fixture
def model(random_model):
    return random_model("llama")


@pytest.fixture
def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4
    )
    return ViTModel(config).eval()


def prompt(tokens=PROMPT, batch=BATCH, seed=0):
    return torch.randint(1, 300, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids=None, new=NEW, **options):
    ids = prompt() if ids is None else ids
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, use_cache=True, **options)


def shapes(steps):
    return [tuple(step.shape) for step in steps]


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_generation_with_a_cache_is_a_prefill_and_its_decode_steps(model):
    with DataRecorder(model) as recorder:
        generate(model)
    lengths = [PROMPT] + [1] * (NEW - 1)
    assert set(recorder.recorded) == {
        "model_input",
        "model_pos_embed",
        "model_position_ids",
        "model_input_ids",
        "model_attention_mask",
    }
    assert shapes(recorder.recorded["model_input"]) == [(BATCH, n, CHANNELS) for n in lengths]
    assert shapes(recorder.recorded["model_input_ids"]) == [(BATCH, n) for n in lengths]
    assert shapes(recorder.recorded["model_position_ids"]) == [(BATCH, n) for n in lengths]
    assert [shapes(step) for step in recorder.recorded["model_pos_embed"]] == [[(BATCH, n, HEAD)] * 2 for n in lengths]
    assert torch.equal(recorder.recorded["model_input"][0], model.model.embed_tokens(prompt()))


def test_recording_changes_nothing_and_leaves_no_hook(model):
    expected = generate(model)
    with DataRecorder(model) as recorder:
        recorder.register_linear_input_hooks()
        recorder.register_output_hooks()
        assert torch.equal(generate(model), expected)
    assert hook_count(model) == 0
    steps = len(recorder.recorded["model_output"])
    generate(model)
    assert len(recorder.recorded["model_output"]) == steps


def test_every_linear_is_recorded_by_its_name(model):
    recorder = DataRecorder(model)
    recorder.register_linear_input_hooks()
    model(prompt())
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(recorder.recorded) == {f"linear_input.{name}" for name in names}
    q, k = (recorder.recorded[f"linear_input.model.layers.1.self_attn.{name}_proj"][0] for name in "qk")
    assert torch.equal(q, k)
    assert shapes(recorder.recorded["linear_input.model.layers.0.mlp.down_proj"]) == [(BATCH, PROMPT, 128)]


def test_linears_below_one_module_only(model):
    recorder = DataRecorder(model)
    recorder.register_linear_input_hooks("model.layers.1.mlp")
    assert set(recorder.recorded) == {
        f"linear_input.model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def test_outputs_are_those_of_the_last_block(model):
    recorder = DataRecorder(model)
    recorder.register_output_hooks()
    with torch.no_grad():
        logits = model(prompt()).logits
        (output,) = recorder.recorded["model_output"]
        assert torch.equal(model.lm_head(model.model.norm(output)), logits)


def test_the_output_of_a_whole_model_is_its_first_tensor(model):
    recorder = DataRecorder(model)
    recorder.register_output_hooks(model)
    assert torch.equal(model(prompt()).logits, recorder.recorded["model_output"][0])


def test_a_list_of_modules_is_recorded_under_their_names(model):
    recorder = DataRecorder(model)
    recorder.register_input_hooks(["model.layers.0", model.model.layers[1].mlp])
    recorder.register_output_hooks(["model.layers.0"])
    model(prompt())
    assert set(recorder.recorded) == {
        "model_input.model.layers.0",
        "model_input.model.layers.1.mlp",
        "model_output.model.layers.0",
    }


def test_keyword_arguments_are_inputs_too(model):
    recorder = DataRecorder(model)
    recorder.register_input_hooks("model.layers.0.self_attn")  # called with hidden_states=…
    recorder.register_linear_input_hooks("model.layers.0.self_attn.q_proj")
    model(prompt())
    expected = recorder.recorded["linear_input.model.layers.0.self_attn.q_proj"][0]
    assert torch.equal(recorder.recorded["model_input"][0], expected)


def test_a_rotary_embedding_gives_what_blocks_are_given(model):
    at_block, at_rotary = DataRecorder(model), DataRecorder(model)
    at_block.register_pos_embed_hooks()
    at_rotary.register_pos_embed_hooks("model.rotary_emb")
    generate(model)
    for key in ("model_pos_embed", "model_position_ids"):
        for one, other in zip(at_block.recorded[key], at_rotary.recorded[key], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_vision_transformer_has_inputs_and_no_positions(vit):
    with DataRecorder(vit) as recorder:
        vit(torch.randn(3, 3, 12, 12))
    assert set(recorder.recorded) == {"model_input"}
    assert shapes(recorder.recorded["model_input"]) == [(3, 10, 32)]  # 3 × 3 patches and the class token
    with pytest.raises(ArchitectureError, match="ViTLayer takes no position_embeddings"):
        recorder.register_pos_embed_hooks()


def test_recorded_tensors_are_copies(model):
    layer = torch.nn.Linear(4, 4)
    recorder = DataRecorder(layer)
    recorder.register_input_hooks(layer)
    x = torch.ones(2, 4)
    layer(x)
    x.zero_()
    assert torch.equal(recorder.recorded["model_input"][0], torch.ones(2, 4))
    assert not recorder.recorded["model_input"][0].requires_grad


def test_clearing_forgets_and_goes_on(model):
    with DataRecorder(model) as recorder:
        generate(model)
        recorder.clear_inputs()
        assert not any(recorder.recorded.values())
        model(prompt(4))
    assert shapes(recorder.recorded["model_input"]) == [(BATCH, 4, CHANNELS)]


@pytest.mark.parametrize("kind", ["input", "pos_embed", "linear_input", "input_ids", "output"])
def test_each_kind_is_removed_alone_and_can_be_registered_again(model, kind):
    recorder = DataRecorder(model)
    for each in ("input", "pos_embed", "linear_input", "input_ids", "output"):
        getattr(recorder, f"register_{each}_hooks")()
    before = hook_count(model)
    getattr(recorder, f"remove_{kind}_hooks")()
    assert hook_count(model) < before
    model(prompt())
    prefix = {"linear_input": "linear_input.", "pos_embed": "model_pos"}.get(kind, f"model_{kind}")
    exact = kind in ("input", "output")
    for key, steps in recorder.recorded.items():
        removed = key == prefix if exact else key.startswith(prefix) or (kind == "input_ids" and "mask" in key)
        assert len(steps) == (0 if removed else 1)
    getattr(recorder, f"register_{kind}_hooks")()
    assert hook_count(model) == before
    recorder.remove_hooks()
    assert hook_count(model) == 0


def test_samples_are_numbered_on_from_what_is_there(model, tmp_path):
    with DataRecorder(model) as recorder:
        for number in range(3):
            generate(model)
            assert recorder.save_inputs(tmp_path / "data") == tmp_path / "data" / f"sample-{number:05d}.safetensors"
            recorder.clear_inputs()
    (tmp_path / "data" / "sample-00001.safetensors").unlink()
    with DataRecorder(model) as recorder:
        model(prompt())
        assert recorder.save_inputs(tmp_path / "data").name == "sample-00003.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pkl"])
def test_what_is_saved_is_what_was_recorded(model, tmp_path, suffix):
    with DataRecorder(model) as recorder:
        generate(model)
    path = recorder.save_inputs(tmp_path / "new" / f"i{suffix}", allow_pickle=True)
    found = read_recording(path, allow_pickle=True)
    assert set(found) == set(recorder.recorded)
    for key, steps in recorder.recorded.items():
        for one, other in zip(steps, found[key], strict=True):
            for a, b in zip(*(step if isinstance(step, tuple) else (step,) for step in (one, other)), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_saving_a_pickle_needs_the_opt_in(model, tmp_path):
    with DataRecorder(model) as recorder:
        model(prompt())
        with pytest.raises(ConfigError, match="allow_pickle=True"):
            recorder.save_inputs(tmp_path / "i.pkl")


def test_the_same_recording_has_the_same_bytes(model, tmp_path):
    with DataRecorder(model) as recorder:
        generate(model)
    one, other = (recorder.save_inputs(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert one.read_bytes() == other.read_bytes()


def test_saving_nothing_is_refused(model, tmp_path):
    recorder = DataRecorder(model)
    with pytest.raises(CalibrationError, match="no hook is registered"):
        recorder.save_inputs(tmp_path)
    recorder.register_input_hooks()
    with pytest.raises(CalibrationError, match="nothing was recorded for 'model_input'; run the model"):
        recorder.save_inputs(tmp_path)
    (tmp_path / "file").write_text("")
    model(prompt())
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        recorder.save_inputs(tmp_path / "file")


def test_modules_that_are_not_there_are_named(model, vit):
    recorder = DataRecorder(model)
    with pytest.raises(ArchitectureError, match=r"no module 'model\.layer\.0'; did you mean 'model\.layers\.0'"):
        recorder.register_input_hooks("model.layer.0")
    with pytest.raises(ArchitectureError, match="this ViTModel is no part of the LlamaForCausalLM"):
        recorder.register_input_hooks(vit)


class TestOfABlock:
    """A recorder may be made of the module that is to be recorded, instead of the model around it."""

    @pytest.mark.parametrize("name", ["model.layers.1", "model.layers.1.self_attn"])
    def test_it_records_what_a_recorder_of_the_model_does(self, model, name, tmp_path):
        whole, part = DataRecorder(model), DataRecorder(model=model.get_submodule(name), device="cpu")
        for recorder, modules in ((whole, name), (part, None)):
            recorder.register_input_hooks(modules)
            recorder.register_pos_embed_hooks(modules)
            recorder.register_output_hooks(modules)
        generate(model)
        files = [
            recorder.save_inputs(str(tmp_path / f"{index}.safetensors"))
            for index, recorder in enumerate((whole, part))
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
        for recorder in (whole, part):
            recorder.remove_input_hooks()
            recorder.remove_pos_embed_hooks()
            recorder.remove_output_hooks()
        assert hook_count(model) == 0

    def test_a_list_of_experts_inside_it_is_no_list_of_blocks(self, model):
        block = model.model.layers[0]
        block.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        with DataRecorder(block) as recorder:
            generate(model)
        assert len(recorder.recorded["model_input"]) == NEW
        assert set(recorder.recorded) == {"model_input", "model_pos_embed", "model_position_ids"}

    def test_a_linear_and_a_network_without_blocks_are_recorded_themselves(self):
        linear = torch.nn.Linear(2, 3)
        net = torch.nn.Sequential(linear, torch.nn.ReLU())
        recorder, inner = DataRecorder(net), DataRecorder(linear)
        recorder.register_input_hooks()
        recorder.register_output_hooks()
        inner.register_linear_input_hooks()
        x = torch.randn(4, 2)
        expected = net(x)
        assert torch.equal(recorder.recorded["model_input"][0], x)
        assert torch.equal(recorder.recorded["model_output"][0], expected)
        assert torch.equal(inner.recorded["linear_input"][0], x)

    def test_token_ids_are_the_model_s(self, model):
        with pytest.raises(
            ArchitectureError, match=r"LlamaDecoderLayer takes no input_ids.*a DataRecorder of the model"
        ):
            DataRecorder(model.model.layers[0]).register_input_ids_hooks()


def test_what_is_no_module_or_device_is_an_error(model):
    with pytest.raises(ConfigError, match="made of a module, not of str"):
        DataRecorder("model")
    with pytest.raises(ConfigError, match="device 'gpu0' is none"):
        DataRecorder(model, "gpu0")


def test_an_error_in_the_loop_leaves_no_hook(model):
    with pytest.raises(IndexError), DataRecorder(model):
        model(prompt() + 10**6)  # tokens that the model does not have
    assert hook_count(model) == 0


def test_recording_the_same_twice_is_refused(model):
    recorder = DataRecorder(model)
    recorder.register_input_hooks("model.layers.0")
    with pytest.raises(ConfigError, match="'model_input' is recorded already; give several modules as one list"):
        recorder.register_input_hooks("model.layers.1")
    assert hook_count(model) == 1
