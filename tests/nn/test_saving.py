"""A model quantized in memory loads again as what it was, or saving it is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fewbit
from fewbit.errors import ConfigError
from fewbit.nn.quant_linear import QuantLinear

IDS = torch.arange(1, 17)[None]
SPEC = fewbit.QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def _frozen(model: nn.Module) -> None:
    fewbit.quantize_(model, weights="int4")
    fewbit.freeze(model)


def _part(model: nn.Module) -> None:
    _frozen(model.model.layers[0])


def _walked(model: nn.Module) -> None:
    config = fewbit.Config.from_dict({"scheme": "W8A8", "algorithm": "rtn"})
    fewbit.ModelQuantizer(config).quantize_model(model)


def _attention(model: nn.Module) -> None:
    from fewbit.nn import attention

    attention.attach(model, fewbit.AttentionConfig(key=SPEC))


def _by_hand(model: nn.Module) -> None:
    model.lm_head = QuantLinear.from_module(model.lm_head, group_size=32)


WAYS = [fewbit.quantize_, _frozen, _part, _walked, _attention, _by_hand]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
def test_save_pretrained_is_refused_however_it_was_quantized(random_model, tmp_path, way, copied):
    model = random_model("llama")
    way(model)
    if copied == "deepcopy":
        model = copy.deepcopy(model)
    elif copied == "pickle":
        model = pickle.loads(pickle.dumps(model))
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(ConfigError, match=r"quantized in memory by fewbit.*export the run"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_models_that_are_not_quantized_are_saved_as_ever(random_model, tmp_path):
    model = random_model("llama")
    _frozen(random_model("llama"))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_copies_compute_the_same(random_model, way):
    model = random_model("llama")
    before = logits(model)
    way(model)
    expected = logits(model)
    assert not torch.equal(expected, before)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("way", [_frozen, _walked])
def test_other_dtypes_change_what_is_computed_in_not_what_was_quantized(random_model, way):
    model = random_model("llama")
    way(model)
    expected, scale = logits(model), model.model.layers[0].mlp.up_proj.scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.scale, scale)
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("way", [_frozen, _walked])
def test_a_state_dict_loads_into_a_model_after_the_same_steps(random_model, way):
    models = random_model("llama"), random_model("llama", seed=1)
    for model in models:
        way(model)
    assert not torch.equal(*map(logits, models))
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(*map(logits, models))
