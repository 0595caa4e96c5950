"""A model whose blocks have other linears than each other: dense layers before layers with experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import fewbit
from fewbit.checkpoint import native
from fewbit.checkpoint.native import NativeCheckpoint, block_file
from fewbit.models.blockwise import BlockwiseModel

IDS = torch.randint(1, 300, (4, 24), generator=torch.Generator().manual_seed(0))
SIZES = {
    "num_hidden_layers": 3, "mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1,
}  # fmt: skip
DENSE = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SHARED = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture
def model(random_model) -> PreTrainedModel:
    return random_model("qwen2_moe", **SIZES).bfloat16()


def quantized(model: PreTrainedModel, output: Path, **options) -> fewbit.Run:
    given = {
        "scheme": "W4A16",
        "group_size": 32,
        "algorithm": "awq:alpha=0.5+gptq:drift=0.5",
        "progress": False,
    } | options
    return fewbit.quantize(model, output=output, calibration=[IDS[:2], IDS[2:]], device="cpu", **given)


def test_each_kind_of_block_has_its_groups(model) -> None:
    found = BlockwiseModel.from_module(model)
    kinds = [{name for group in found.groups(index) for name in group.members} for index in range(3)]
    assert kinds[0] >= DENSE
    assert kinds[1] >= SHARED
    assert kinds[1] == kinds[2]
    assert kinds[0].isdisjoint(SHARED)


def test_it_is_quantized_resumed_exported_and_reloaded(model, tmp_path, monkeypatch) -> None:
    whole = quantized(model, tmp_path / "whole")
    weights = NativeCheckpoint(whole.directory).quantized
    assert {f"model.layers.0.{name}.weight" for name in DENSE} <= weights.keys()
    assert {f"model.layers.2.{name}.weight" for name in SHARED} <= weights.keys()
    scaled = {row["name"] for row in whole.report["linears"] if row.get("scaling") is not None}
    assert {"model.layers.0.mlp.down_proj", "model.layers.2.mlp.shared_expert.down_proj"} <= scaled

    with monkeypatch.context() as dying:
        written = []

        def write(*given):
            written.append(given)
            if len(written) == 2:
                raise KeyboardInterrupt
            return save(*given)

        save = native.write_safetensors
        dying.setattr(native, "write_safetensors", write)
        with pytest.raises(KeyboardInterrupt):
            quantized(model, tmp_path / "again")
    again = quantized(model, tmp_path / "again", resume=True)
    for index in range(3):
        assert block_file(whole.directory, index).read_bytes() == block_file(again.directory, index).read_bytes()

    export = whole.export("compressed-tensors")
    assert [one.quantized for one in whole.verify()] == [len(weights)]
    ours = fewbit.evaluate(whole, [IDS]).perplexity
    assert fewbit.evaluate(export, [IDS]).perplexity == pytest.approx(ours, rel=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    with torch.no_grad():
        loss = float(loaded(input_ids=IDS, labels=IDS).loss)
    assert loss == pytest.approx(torch.tensor(ours).log().item(), rel=1e-2)
