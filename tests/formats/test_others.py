"""Checkpoints that compressed-tensors' own library wrote, the way other tools use it, are read as it reads them."""

import json

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.errors import CheckpointError
from fewbit.files import write_json
from fewbit.formats import export
from fewbit.formats.compressed_tensors.read import CompressedTensorsSource

WEIGHT = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
GROUPS = {
    "W4A8": {"W4A8": {"weights": WEIGHT, "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}}},
    "W4A16_ASYM": {"a": {"weights": WEIGHT | {"symmetric": False}}},
    "W8A8": {"W8A8": ["Linear"]},
    "FP8": {"FP8": ["Linear"]},
    "NVFP4": {"NVFP4": ["Linear"]},
    "MXFP4": {"MXFP4": ["re:.*_proj"]},
    "mixed": {"NVFP4A16": ["re:.*mlp.*"], "FP8_DYNAMIC": ["re:.*self_attn[.].*_proj"]},
}


@pytest.fixture(scope="module")
def others(tmp_path_factory, checkpoint):
    """others(name of GROUPS): (directory that the library wrote, model that it decompressed)."""
    made = {}

    def make(name):
        if name not in made:
            model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.bfloat16)
            groups = {
                key: ({"targets": ["Linear"]} | value if isinstance(value, dict) else value)
                for key, value in GROUPS[name].items()
            }
            config = QuantizationConfig(config_groups=groups, ignore=["re:.*lm_head"], kv_cache_scheme=CACHE)
            apply_quantization_config(model, config)
            for module in model.modules():
                _calibrate(module)
            directory = tmp_path_factory.mktemp("others") / "model"
            compressor = ModelCompressor.from_pretrained_model(model)
            compressor.compress_model(model)
            model.save_pretrained(directory)
            compressor.update_config(directory)
            compressor.decompress_model(model)
            made[name] = directory, model
        return made[name]

    return make


@torch.no_grad()
def _calibrate(module):
    """Minmax scales for weights, made-up ones for activations."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return
    module.quantization_status = QuantizationStatus.FROZEN
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("_global_scale"):
            parameter.fill_(300.0)
        elif name.endswith("_scale"):
            parameter.fill_(0.02)
    args = scheme.weights
    if args is None:
        return
    tiles = module.weight.unflatten(-1, (-1, args.group_size)) if args.group_size else module.weight
    dims = (0, 1) if args.strategy == "tensor" else (-1,)
    low, high = tiles.amin(dims, keepdim=not args.group_size), tiles.amax(dims, keepdim=not args.group_size)
    unit = None
    if args.strategy == "tensor_group":
        unit = generate_gparam(module.weight.min(), module.weight.max())
        module.weight_global_scale.copy_(unit)
    scale, zero = calculate_qparams(low, high, args, global_scale=unit)
    module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
    module.weight_zero_point.copy_(zero.reshape(module.weight_zero_point.shape))


@pytest.mark.parametrize("name", GROUPS)
def test_their_weights_are_read_as_the_library_decompresses_them(others, name):
    directory, model = others(name)
    source = CompressedTensorsSource(directory)
    leftovers = ("_scale", "_zero_point", "_shape")
    theirs = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith(leftovers)}
    assert set(source.info()) == set(theirs)
    for key, tensor in source.read(theirs, torch.bfloat16).items():
        assert source.info()[key].shape == tuple(tensor.shape)
        if "NVFP4" in str(GROUPS[name]):  # their global scale is no power of two: the last bit of bfloat16 may differ
            torch.testing.assert_close(tensor, theirs[key], rtol=2**-7, atol=0.0)
        else:
            assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", GROUPS)
def test_their_activations_are_found(others, name):
    directory, _ = others(name)
    found = CompressedTensorsSource(directory).activations()
    scale = torch.tensor([[0.02]], dtype=torch.bfloat16)
    caches = {key for key in found if key.endswith((".key", ".value"))}
    assert len(caches) == 4
    assert all(torch.equal(found[key].scale, scale) for key in caches)
    assert len(found) - len(caches) == {"W4A16_ASYM": 0, "mixed": 8}.get(name, 14)
    first = found.get("model.layers.0.self_attn.q_proj.input")
    if name == "FP8":
        assert torch.equal(first.scale, scale)
    if name == "NVFP4":
        assert first.global_scale == 1 / 300


@pytest.fixture
def damaged(native, tmp_path):
    """damaged(name, edit): an export of ours whose quantization_config and tensors `edit` changed."""

    def damage(name, edit):
        directory = export(native(name, torch.bfloat16), "compressed-tensors", tmp_path / "export")
        (directory / "model.safetensors.index.json").unlink()
        tensors = {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
        config = json.loads((directory / "config.json").read_text())
        edit(config["quantization_config"], tensors)
        for file in directory.glob("*.safetensors"):
            file.unlink()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        write_json(directory / "config.json", config)
        return directory

    return damage


Q = "model.layers.0.self_attn.q_proj"
ROTATION = {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}]}
FUSED = {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": "weight_input"}]}


def first(config):
    return config["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("W4A16", lambda c, t: t.update({f"{Q}.weight_g_idx": torch.arange(64)}), "weight_g_idx"),
        ("W4A16", lambda c, t: t.pop(f"{Q}.weight_shape"), "weight_shape is missing"),
        ("W4A16", lambda c, t: first(c).update(format="marlin-24"), "'marlin-24' cannot be read"),
        ("W4A16", lambda c, t: first(c)["weights"].update(group_size=16), "its config group says"),
        ("W4A16", lambda c, t: first(c)["weights"].update(strategy="spiral"), "does not know"),
        ("W4A16", lambda c, t: first(c).update(targets=["re:nothing"]), "no config group describes"),
        ("W4A16", lambda c, t: c.update(config_groups={"W4A16": ["Linear"]}), "a preset's name"),
        ("W4A16", lambda c, t: c.pop("config_groups"), "no config_groups"),
        (
            "W4A16",
            lambda c, t: c["config_groups"]["group_0"].update(targets=None),
            "targets of config group",
        ),
        ("W4A16", lambda c, t: c["config_groups"]["group_0"].update(targets=[1]), "targets of config group"),
        ("W4A16", lambda c, t: c.update(transform_config={"config_groups": [1]}), "no table of rotations"),
        ("W4A16", lambda c, t: c.update(transform_config={"config_groups": {"R4": ROTATION}}), r"rotates .*\(R4\)"),
        ("FP8_BLOCK", lambda c, t: first(c)["weights"].update(block_structure=[48, 48]), "its config group says"),
    ],
)
def test_what_cannot_be_read_is_refused_and_named(damaged, name, edit, reason):
    directory = damaged(name, edit)
    with pytest.raises(CheckpointError, match=reason):
        CompressedTensorsSource(directory)


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("FP8", lambda c, t: t.pop(f"{Q}.input_scale"), "input_scale is missing"),
        ("FP8", lambda c, t: c.update(kv_cache_scheme=CACHE), "there are no k_scale tensors"),
        ("FP8", lambda c, t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}), "no kv_cache_scheme"),
        ("W4A8", lambda c, t: first(c).update(output_activations=first(c)["input_activations"]), "quantized outputs"),
    ],
)
def test_activations_that_cannot_be_read_are_refused_and_named(damaged, name, edit, reason):
    source = CompressedTensorsSource(damaged(name, edit))
    with pytest.raises(CheckpointError, match=reason):
        source.activations()


def test_rotations_that_are_in_the_weights_already_are_no_matter(damaged):
    directory = damaged("W4A16", lambda c, t: c.update(transform_config={"config_groups": {"R1": FUSED}}))
    assert CompressedTensorsSource(directory).read_quantized(f"{Q}.weight").shape == (64, 64)


def test_weights_that_were_saved_again_as_floats_are_read_and_their_inputs_stay_quantized(native, damaged):
    expected = NativeCheckpoint(native("FP8_DYNAMIC", torch.bfloat16)).read([f"{Q}.weight"], torch.bfloat16)

    def decompress(config, tensors):
        config["quantization_status"] = "decompressed"
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            tensors[key] = tensors[key].bfloat16() * tensors[f"{key}_scale"]

    source = CompressedTensorsSource(damaged("FP8_DYNAMIC", decompress))
    assert torch.equal(source.read([f"{Q}.weight"])[f"{Q}.weight"], expected[f"{Q}.weight"])
    assert source.activations()[f"{Q}.input"].spec.qscheme == "per_token"
