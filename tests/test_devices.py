"""What holds on every device: the numbers of the CPU, on the device that the data is on, the same bytes each time.

A GPU adds up in another order, so codes of weights and of activations may differ where a value lies on a rounding
boundary, and nowhere else.
"""

import pytest
import torch

import fewbit
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.schemes import SCHEMES
from fewbit.nn.quantizer import quantize_matrix

IDS = torch.randint(1, 300, (6, 32), generator=torch.Generator().manual_seed(5))
RECIPES = {
    "gptq": {"scheme": "W4A16", "group_size": 32},
    "drift": {"scheme": "W4A16", "group_size": 32, "algorithm": "gptq:drift=0.5"},
    "affine": {"scheme": "W4A16_ASYM", "group_size": 32, "algorithm": "awq+gptq"},
    "static": {"scheme": "W8A8_STATIC", "algorithm": "smoothquant+gptq"},
    "dynamic": {"scheme": "W8A8", "algorithm": "smoothquant+gptq"},
    "nvfp4": {"scheme": "NVFP4"},
    "mxfp4": {"scheme": "MXFP4"},
    "cache": {"scheme": "W4A8KVFP8-g32", "algorithm": "rtn"},
}


def run(model, output, recipe, device, **options):
    options = {"calibration": list(IDS.split(2)), "progress": False} | options
    return fewbit.quantize(model, config=recipe, output=output, device=device, **options)


def tensors_of(made):
    checkpoint = NativeCheckpoint(made.directory)
    return checkpoint.read(checkpoint.info())


@pytest.mark.parametrize("name", SCHEMES)
def test_a_weight_has_the_same_codes_wherever_it_is_quantized(device, name):
    spec = SCHEMES[name].weight
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    here, there = quantize_matrix(weight, spec), quantize_matrix(weight.to(device), spec)
    assert there.codes.device.type == there.dequantize().device.type == device
    same = there.codes.cpu() == here.codes
    assert same.float().mean() > 0.998
    error, least = ((q.dequantize().cpu() - weight).square().sum() for q in (there, here))
    assert error.item() == pytest.approx(least.item(), rel=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_loses_as_much_as_on_the_cpu_and_is_the_same_each_time(device, recipe, checkpoint, tmp_path):
    model = checkpoint("llama")
    there = run(model, tmp_path / "there", RECIPES[recipe], device)
    here = there if device == "cpu" else run(model, tmp_path / "here", RECIPES[recipe], "cpu")
    again = run(model, tmp_path / "again", RECIPES[recipe], device, activation_memory=0)  # replayed
    assert there.report["totals"]["loss"] == pytest.approx(here.report["totals"]["loss"], rel=0.1)
    first, second = tensors_of(there), tensors_of(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    ours = fewbit.evaluate(there, IDS, against=model, device=device)
    assert ours.perplexity == pytest.approx(fewbit.evaluate(there, IDS, device="cpu").perplexity, rel=5e-3)


def test_models_in_memory_stay_on_their_device(device, random_model):
    model = random_model("llama").to(device)
    expected = fewbit.evaluate(model, IDS, device=device).perplexity
    settings = fewbit.Config(fewbit.QuantizationConfig(weight=fewbit.QuantizationSpec(dtype="int8", group_size=32)))
    fewbit.ModelQuantizer(settings).quantize_model(model, [IDS[:2].to(device), IDS[2:].to(device)])
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
    with torch.no_grad():
        logits = model(IDS.to(device)).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten().to(device))
    assert losses.exp().item() == pytest.approx(expected, rel=0.05)


def test_any_network_is_quantized_calibrated_and_packed_on_its_device(device):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).to(device)
    x = torch.randn(32, 64, device=device)
    before = network(x)
    fewbit.quantize_(network, weights="int8", activations="int8")
    with fewbit.calibrate(network), torch.no_grad():
        network(x)
    fewbit.freeze(network)
    after = network(x)
    assert after.device.type == device
    assert (after - before).norm() < 0.03 * before.norm()


def test_layers_in_memory_are_quantized_where_they_are(device):
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()) for _ in range(2)]
    rows = fewbit.run_gptq_for_sequential_layers(
        [layer.to(device) for layer in layers], torch.randn(4, 50, 64), fewbit.SequentialGPTQConfig(group_size=32)
    )
    assert len(rows) == 2
    assert all(
        layer[0].weight.device.type == device and row.loss < 0.02
        for layer, row in zip(layers, rows.values(), strict=True)
    )
