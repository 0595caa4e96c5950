"""Whatever is raised, Ctrl-C included, a model in memory is as it was: never half one thing and half another."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

import fewbit
from fewbit import Config, ModelQuantizer
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.model_quantizer import install
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.fake_quant import FakeQuantLinear
from interrupts import interrupted, snapshot

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(3))
STATIC = Config.from_dict(
    {
        "global_quant_config": {
            "weight": {"dtype": "int8", "qscheme": "per_channel"},
            "input_tensors": {"dtype": "int8", "qscheme": "per_tensor", "observer": "minmax"},
        },
        "algorithm": "rtn",
    }
)


def network() -> nn.Sequential:
    """With a layer in another mode and a weight that is not trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight.requires_grad_(False)
    model[0].eval()
    return model


def check(
    make: Callable[[], nn.Module], act: Callable[[nn.Module], object], files: Iterable[str], every: int = 1
) -> int:
    """After an interrupt at any line the model is what it was or, in the last instants, what it is to be."""
    before: dict[int, dict[str, object]] = {}

    def remembered() -> nn.Module:
        model = make()
        before[id(model)] = snapshot(model)
        return model

    finished = make()
    act(finished)
    kinds = [type(module) for module in finished.modules()]
    count = 0
    for model in interrupted(remembered, act, tuple(files), every):
        now = snapshot(model)
        assert now == before.pop(id(model)) or [type(module) for module in model.modules()] == kinds
        count += 1
    return count


def test_quantizing_by_one_call() -> None:
    assert check(network, lambda model: fewbit.quantize_(model, "int8", "int8"), ("ptq", "exchange"), every=5) > 20


def quantized() -> nn.Module:
    model = network()
    fewbit.quantize_(model, "int8", "int8")
    return model


def test_calibrating() -> None:
    def act(model: nn.Module) -> None:
        with fewbit.calibrate(model):
            model(X)

    count = 0
    for model in interrupted(quantized, act, ("ptq", "exchange"), every=3):
        quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
        assert all(quantizer.observer is None for quantizer in quantizers)
        assert len({quantizer.scale is None for quantizer in quantizers}) == 1
        count += 1
    assert count > 10


def test_freezing() -> None:
    assert check(quantized, fewbit.freeze, ("ptq", "exchange", "quant_linear"), every=5) > 10


def test_quantizing_a_network_with_data() -> None:
    def act(model: nn.Module) -> None:
        ModelQuantizer(STATIC).quantize_model(model, [X])

    assert check(network, act, ("model_quantizer", "ptq", "exchange"), every=7) > 20


@pytest.mark.filterwarnings("ignore")
def test_installing_a_run(random_model, tmp_path) -> None:
    recipe = {"scheme": "W8A8_STATICKVFP8", "algorithm": "smoothquant+rtn"}
    made = random_model("llama", num_hidden_layers=1)
    directory = fewbit.quantize(
        made, config=recipe, output=tmp_path / "run", calibration=[{"input_ids": IDS}], progress=False, device="cpu"
    ).directory
    run = NativeCheckpoint(directory)
    count = check(lambda: random_model("llama", num_hidden_layers=1), lambda model: install(model, run),
                  ("model_quantizer", "exchange", "nn/attention"), every=17)  # fmt: skip
    assert count > 10


def test_attaching_to_attention(random_model) -> None:
    spec = fewbit.QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
    config = fewbit.AttentionConfig(key=spec, value=spec)
    for model in interrupted(
        lambda: random_model("llama", num_hidden_layers=2),
        lambda model: attention.attach(model, config),
        ("nn/attention", "exchange"),
        every=7,
    ):
        attached = [hasattr(layer.self_attn, attention.ATTRIBUTE) for layer in model.model.layers]
        assert len(set(attached)) == 1
        assert attached[0] or model.config._attn_implementation == "sdpa"


class Layer(nn.Module):
    """With a linear that has a forward of its own: it is run, and it stays."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.down.forward = lambda x: nn.functional.linear(x, self.down.weight, self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)))


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList(Layer() for _ in range(2)).bfloat16()
    made[0].norm.requires_grad_(False)
    return made


HIDDEN = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
INT4 = fewbit.QuantizationSpec(dtype="int4", qscheme="per_channel")
SEQUENTIAL = [fewbit.run_gptq_for_sequential_layers, fewbit.run_smooth_quant_for_sequential_layers]


@pytest.mark.parametrize("run", SEQUENTIAL, ids=["gptq", "smoothing"])
@pytest.mark.filterwarnings("ignore:Layer is no layer")
def test_stacks_of_layers(run) -> None:
    before: dict[int, dict[str, object]] = {}

    def remembered() -> nn.ModuleList:
        made = layers()
        before[id(made)] = snapshot(made)
        return made

    finished, original = layers(), layers()
    run(finished, HIDDEN, INT4)
    changed = {name for name, p in finished.named_parameters() if not torch.equal(p, original.get_parameter(name))}
    assert {name.partition(".")[0] for name in changed} == {"0", "1"}
    files = ("sequential", "layer_stack", "block_quantizer", "staged", "exchange")
    for made in interrupted(remembered, lambda made: run(made, HIDDEN, INT4), files, every=29):
        now = snapshot(made)
        if now != before[id(made)]:
            assert all(torch.equal(p, finished.get_parameter(name)) for name, p in made.named_parameters())
        assert "forward" in vars(made[0].down)


def test_an_error_in_the_data_takes_back_what_was_done() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        ModelQuantizer(STATIC).quantize_model(model, [X, torch.ones(1, 1, 1, 1)])
    assert snapshot(model) == before
    ModelQuantizer(STATIC).quantize_model(model, [X])
    assert isinstance(model[2], FakeQuantLinear)
    assert [module.training for module in model] == [False, True, True, True, True]
