"""FullQuantTransformer's README, as it is written, with one import changed."""

import inspect

import pytest
import torch

import fewbit
from fewbit import fqt
from fewbit.errors import CheckpointError, ConfigError


@pytest.fixture
def model(random_model):
    return random_model("qwen2")


@pytest.fixture
def directory(model, tmp_path):
    """Recordings of a block in the user's own generation loop."""
    dc = fqt.DataRecorder(model=model.model.layers[0], device="cpu")
    dc.register_input_hooks()
    dc.register_pos_embed_hooks()
    for i in range(4):
        prompt = torch.randint(1, 300, (1, 20 + i), generator=torch.Generator().manual_seed(i))
        model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
        dc.save_inputs(str(tmp_path / f"{i}.safetensors"))
        dc.clear_inputs()
    dc.remove_input_hooks()
    dc.remove_pos_embed_hooks()
    return tmp_path


def test_quantize_in_four_lines(model, directory):
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    dataset = fqt.DefaultDataset(root_dir=str(directory))
    inputs = fqt.build_calib_datset_inputs(dataset, num_samples=3, seed=0, device="cpu")
    results = fqt.run_gptq_for_sequential_layers(model.model.layers, inputs, cfg=fqt.GPTQConfig())
    assert results["1.mlp.down_proj"].weight.spec.summary == "int4 per_group 64"
    assert not torch.equal(model.model.layers[1].mlp.down_proj.weight, before)


@pytest.mark.parametrize(
    "config",
    [
        fqt.GPTQConfig(bits=4, group_size=16, method="per-block", damp=0.01, blocksize=128),
        fqt.GPTQConfig(8, None, "per-token"),
        fqt.GPTQConfig(bits=3, group_size=-1),
        fqt.GPTQConfig(bits=8, method="per-tensor"),
    ],
    ids=str,
)
def test_every_granularity(model, directory, config):
    inputs = fqt.build_calib_datset_inputs(fqt.DefaultDataset(root_dir=directory), num_samples=2)
    assert fqt.run_gptq_for_sequential_layers(model.model.layers, inputs, config)


@pytest.mark.parametrize(
    "config",
    [
        fqt.SmoothQuantConfig(),
        fqt.SmoothQuantConfig("per-tensor", "per-tensor", fqt.W8A8FakeLinear, None, False),
        fqt.SmoothQuantConfig(w_method="per-token", a_method="per-token", q_linear_type=fqt.W4A16FakeLinear),
        fqt.SmoothQuantConfig(w_method="per-token", a_method="per-token", q_linear_type=fqt.FP8Linear, duo_scale=True),
    ],
    ids=["default", "tensors", "awq", "fp8"],
)
def test_awq_and_smoothquant_are_one(model, directory, config):
    inputs = fqt.build_calib_datset_inputs(fqt.DefaultDataset(root_dir=directory), num_samples=2)
    found = fqt.run_smooth_quant_for_sequential_layers(layers=model.model.layers, inputs=inputs, cfg=config)
    assert "0.input_layernorm" in found


def test_a_registered_forward_that_takes_the_first_output(model, directory, monkeypatch):
    manager = fqt.LayerForwardManager()

    def qwen_forward(layer, input_tensor, **kwargs):
        output = layer(input_tensor, **kwargs)
        return output[0]

    manager.register("Qwen2DecoderLayer", qwen_forward)
    (item,) = fqt.build_calib_datset_inputs(fqt.DefaultDataset(root_dir=directory), num_samples=1)
    out = manager.forward(model.model.layers[0], item["input_tensor"], **item["kwargs"])
    assert out.shape == item["input_tensor"].shape


def test_pickles_are_written_and_read_where_the_user_says_so(model, tmp_path):
    dc = fqt.DataRecorder(model=model.model.layers[0], device="cpu")
    dc.register_input_hooks()
    model(torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(ConfigError, match="allow_pickle=True"):
        dc.save_inputs(str(tmp_path / "0.pkl"))
    assert list(tmp_path.iterdir()) == []
    dc.save_inputs(str(tmp_path / "0.pkl"), allow_pickle=True)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        fqt.DefaultDataset(root_dir=str(tmp_path))
    assert len(fqt.DefaultDataset(root_dir=str(tmp_path), allow_pickle=True)) == 1


def test_signatures_are_the_readme_s():
    for cls, names in (
        (fqt.Quantizer, ["bits", "method", "group_size"]),
        (fqt.GPTQConfig, ["bits", "group_size", "method", "damp", "blocksize"]),
        (fqt.SmoothQuantConfig, ["w_method", "a_method", "q_linear_type", "group_size", "duo_scale"]),
        (fqt.DataRecorder, ["model", "device"]),
    ):
        fields = getattr(cls, "__dataclass_fields__", None) or inspect.signature(cls).parameters
        assert list(fields)[: len(names)] == names


def test_names_are_fewbit_s():
    assert fqt.build_calib_datset_inputs is fewbit.build_calib_dataset_inputs
    assert (fqt.load, fqt.dump) == (fewbit.io.load, fewbit.io.dump)
    public = {name for name, value in vars(fqt).items() if getattr(value, "__module__", "").startswith("fewbit.")}
    own = {"FP8Linear", "build_calib_datset_inputs", "dump"}
    for name in public - {"Inputs", "LinearResult", "ScaleSearch"}:
        assert hasattr(fewbit, name) or name in own
    assert len(public) > 20
