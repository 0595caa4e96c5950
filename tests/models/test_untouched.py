"""Every matrix that stays as it is is found, whatever holds it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbit.models.untouched import sentence, untouched


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 4, 5))
        self.register_buffer("table", torch.ones(4, 5))
        self.register_buffer("mask", torch.ones(4, 5), persistent=False)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (nn.ConvTranspose2d(2, 3, 3), {"weight"}),
        (nn.Conv3d(2, 3, 3), {"weight"}),
        (nn.Bilinear(2, 3, 4), {"weight"}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight", "out_proj.weight"}),
        (nn.LSTM(4, 4), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.GRUCell(4, 4), {"weight_ih", "weight_hh"}),
        (nn.EmbeddingBag(4, 4), {"weight"}),
        (Conv1D(4, 4), {"weight"}),
        (_Own(), {"experts", "table"}),
        (nn.Embedding(4, 4), set()),
        (nn.LayerNorm(4), set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_holds_a_matrix_is_found(module: nn.Module, names: set[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module)
    found = untouched(model, {"0"})
    assert {one.name for one in found} == {f"1.{name}" for name in names}
    assert all(one.weights == model.state_dict()[one.name].numel() for one in found)


def test_what_is_handled_does_not_count_with_all_below_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.LSTM(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    assert [one.name for one in untouched(model, {"0", "1"})] == ["2.weight"]


def test_a_head_tied_to_embeddings_does_not_count() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    assert untouched(model, ()) == []


def test_like_tensors_of_several_layers_are_said_together_with_their_share() -> None:
    layers = [nn.ModuleDict({"experts": _Own(), "out": nn.Linear(4, 15, bias=False)}) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    words = sentence(untouched(model, {f"layers.{index}.out" for index in range(3)}))
    assert "layers.*.experts.experts (_Own, 3 of 3 × 4 × 5, 50.0%)" in words
    assert words.startswith("6 tensors that are no linears stay as they are")


def test_the_report_and_inspect_name_experts_with_their_share(random_model, tmp_path) -> None:
    import fewbit
    from fewbit.runs.inspection import inspect

    model = random_model(
        "qwen2_moe",
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    run = fewbit.quantize(
        model, "W8A8", algorithm="rtn", calibration="none", output=tmp_path / "run", progress=False, device="cpu"
    )
    rows = {row["name"]: row for row in run.report["untouched"]}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert rows[name]["share"] == model.get_parameter(name).numel() / sum(p.numel() for p in model.parameters())
    assert any("model.layers.*.mlp.experts.gate_up_proj" in warning for warning in run.report["warnings"])
    assert {one.name for one in inspect(model).untouched} == set(rows)
