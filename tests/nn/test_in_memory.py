"""A model in memory is read as it computes, or refused in a sentence that says what to do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fewbit.errors import FewbitError
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.in_memory import refuse_elsewhere, unwrapped


class _Adapted(nn.Module):
    """As PEFT wraps a linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)


class _OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class _Sharded(torch.Tensor):
    """As DTensor and quantized tensors are subclasses."""


def _mlp(model):
    return model.model.layers[1].mlp


def _bias(model):
    _mlp(model).down_proj.bias = nn.Parameter(torch.zeros(64))


def _buffer(model):
    _mlp(model).register_buffer("gain", torch.ones(1))


def _adapter(model):
    _mlp(model).up_proj = _Adapted(_mlp(model).up_proj)


def _kind(model):
    _mlp(model).up_proj = _OwnLinear(64, 128, bias=False)


def _forward(model):
    _mlp(model).forward = lambda x: x


def _forward_hook(model):
    _mlp(model).register_forward_hook(lambda _m, _x, y: 2 * y)


def _pre_hook(model):
    _mlp(model).up_proj.register_forward_pre_hook(lambda _m, x: (2 * x[0],))


def _parametrization(model):
    parametrizations.orthogonal(_mlp(model).up_proj)


def _offloaded(model):
    model.model.layers[1].to("meta")


def _subclass(model):
    weight = _mlp(model).up_proj.weight.detach()
    _mlp(model).up_proj.weight = nn.Parameter(weight.as_subclass(_Sharded), requires_grad=False)


def _epsilon(model):
    model.model.norm.variance_epsilon = 0.5


def _softmax_scale(model):
    model.model.layers[1].self_attn.scaling *= 2


def _frequencies(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _configuration(model):
    model.config.rms_norm_eps = 0.5


CHANGES = {
    _epsilon: r"model\.norm .*variance_epsilon is another one",
    _softmax_scale: r"layers\.1\.self_attn .*scaling is another one",
    _frequencies: r"rotary_emb .*inv_freq is another one",
    _configuration: r"variance_epsilon is another one than its configuration says",
    _bias: r"mlp\.down_proj\.bias' was added",
    _buffer: r"mlp\.gain' was added",
    _adapter: r"layers\.1\.mlp\.up_proj .*merge_and_unload\(\)",
    _kind: r"layers\.1\.mlp\.up_proj \(_OwnLinear\) is a Linear",
    _forward: r"layers\.1\.mlp .*forward of its own",
    _forward_hook: r"layers\.1\.mlp .*forward hook \(_forward_hook",
    _pre_hook: r"mlp\.up_proj .*forward pre- hook",
    _parametrization: r"mlp\.up_proj .*is parametrized",
    _offloaded: r"layers\.1\..* is on the meta device.*device_map='cpu'",
    _subclass: r"mlp\.up_proj\.weight' is a _Sharded",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_was_added_to_a_model_is_refused_by_name(random_model, change):
    model = random_model("llama")
    change(model)
    with pytest.raises(FewbitError, match=CHANGES[change]):
        BlockwiseModel.from_module(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_half_precision_rounds_is_no_change(random_model, family, dtype):
    BlockwiseModel.from_module(random_model(family).to(dtype).train())


def test_hooks_that_only_look_on_are_no_obstacle(random_model):
    import fewbit

    model = random_model("llama")
    with fewbit.DataRecorder(model), torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64), output_hidden_states=True, output_attentions=True)
        assert len(BlockwiseModel.from_module(model)) == 2
    copy.deepcopy(model)


def test_a_model_that_accelerate_dispatched_is_read(random_model):
    from accelerate import dispatch_model

    model = dispatch_model(random_model("llama"), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    assert len(BlockwiseModel.from_module(model)) == 2


def test_a_compiled_model_is_the_model_inside(random_model):
    model = random_model("llama")
    compiled = torch.compile(model)
    assert unwrapped(compiled) is model
    assert len(BlockwiseModel.from_module(compiled)) == 2
    model.model.layers[0] = torch.compile(model.model.layers[0])
    with pytest.raises(FewbitError, match=r"model\.layers\.0 was wrapped by torch\.compile"):
        unwrapped(model)


def test_wrappers_for_training_say_what_to_give(random_model):
    with pytest.raises(FewbitError, match=r"DataParallel wraps .*model\.module"):
        unwrapped(nn.DataParallel(random_model("llama")))

    class PeftModel(nn.Module):
        def merge_and_unload(self):
            return self

    with pytest.raises(FewbitError, match=r"merge_and_unload\(\)"):
        unwrapped(PeftModel())


def test_lazy_modules_have_no_values_yet():
    with pytest.raises(FewbitError, match="run data through"):
        refuse_elsewhere(nn.Sequential(nn.LazyLinear(4)))
