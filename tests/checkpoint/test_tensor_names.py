"""Modules find their tensors wherever they lie: rows of a fused weight, one of many experts."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbit.checkpoint.names import Part, PartsSource, full_name, path_in, weight_of
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.errors import CheckpointError
from fewbit.models.blockwise import BlockwiseModel

SIZES = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128)}


@pytest.fixture
def fused(checkpoint, tmp_path):
    """A llama checkpoint whose q, k and v are rows of one tensor, and where each lies."""
    directory = shutil.copytree(checkpoint("llama"), tmp_path / "fused")
    tensors, parts = load_file(directory / "model.safetensors"), {}
    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        names = [weight_of(f"{attention}.{name}_proj") for name in SIZES]
        tensors[weight_of(f"{attention}.qkv")] = torch.cat([tensors.pop(name) for name in names])
        whole = weight_of(f"{attention}.qkv")
        parts |= {name: Part(whole, (rows,)) for name, rows in zip(names, SIZES.values(), strict=True)}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory, parts


def test_rows_of_a_fused_tensor_are_tensors_of_their_own(fused, checkpoint):
    directory, parts = fused
    ours, original = PartsSource(SafetensorsSource(directory), parts), SafetensorsSource(checkpoint("llama"))
    assert ours.info() == original.info()
    read, expected = ours.read(original.info()), original.read(original.info())
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    assert read[next(iter(parts))].is_contiguous()
    assert ours.directory == directory


def test_a_model_runs_on_parts(fused, checkpoint):
    directory, parts = fused
    models = [
        BlockwiseModel.from_directory(directory, PartsSource(SafetensorsSource(directory), parts)),
        BlockwiseModel.from_directory(checkpoint("llama")),
    ]
    outputs = []
    for model in models:
        (inputs,) = model.enter([{"input_ids": torch.arange(8).unsqueeze(0)}])
        with model.loaded(1) as block, torch.no_grad():
            outputs.append(model.call_block(block, inputs.hidden, inputs.calls[1]))
    assert torch.equal(*outputs)


def test_one_expert_of_many(tmp_path):
    experts = torch.randn(4, 6, 8)
    save_file({"experts": experts}, tmp_path / "model.safetensors")
    parts = {weight_of(f"experts.{number}.up"): Part("experts", (number, slice(0, 3))) for number in range(4)}
    source = PartsSource(SafetensorsSource(tmp_path), parts)
    assert source.info()["experts.2.up.weight"].shape == (3, 8)
    assert "experts" not in source.info()
    read = source.read(["experts.3.up.weight"], torch.float64)["experts.3.up.weight"]
    assert torch.equal(read, experts[3, :3].double())
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        source.read(["other"])


@pytest.mark.parametrize(("prefix", "path", "name"), [("layers.3.", "mlp.up", "layers.3.mlp.up"), ("0.", "", "0")])
def test_a_path_and_a_full_name_are_inverse(prefix, path, name):
    assert full_name(prefix, path) == name
    assert path_in(prefix, name) == path
