"""Integers alone give the very numbers that fake quantization gives in floats."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn.fake_quant import FakeQuantLinear
from fewbit.nn.integer_only import IntegerLinear, requantize
from fewbit.ptq import calibrate

WEIGHT = QuantizationSpec(dtype="int8", qscheme="per_channel", scale_type="pof2")
STATIC = QuantizationSpec(dtype="int8", qscheme="per_tensor", scale_type="pof2", observer="mse")
X = torch.randn(200, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fake(rows: int, columns: int, weight=WEIGHT, inputs=STATIC, outputs=STATIC, seed: int = 0) -> FakeQuantLinear:
    torch.manual_seed(seed)
    module = nn.Linear(columns, rows).requires_grad_(False)
    module.weight.data *= torch.logspace(-2, 2, rows, 2).unsqueeze(1)  # so that shifts differ
    return FakeQuantLinear.from_module(module, weight=weight, input_tensors=inputs, output_tensors=outputs)


def calibrated(*modules: FakeQuantLinear) -> nn.Sequential:
    layers = [layer for module in modules for layer in (module, nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    with calibrate(model):
        model(X)
    return model


def with_grid_bias(module: FakeQuantLinear, integers: IntegerLinear) -> None:
    """The bias that the integers use: rounded to units of input scale times weight scale."""
    exponent = torch.log2(torch.tensor(integers.output_scale)).int() - integers.shift
    module.bias = nn.Parameter(torch.ldexp(integers.bias.float(), exponent), requires_grad=False)


@pytest.mark.parametrize("observer", ["search", "minmax"])
@pytest.mark.parametrize("qscheme", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_linear_is_equal_bit_for_bit(observer, qscheme, bits):
    weight = replace(WEIGHT, dtype=f"int{bits}", observer=observer, qscheme=qscheme)
    model = calibrated(fake(32, 96, weight, replace(STATIC, dtype=f"int{bits}"), replace(STATIC, observer="minmax")))
    integers = IntegerLinear.from_module(model[0])
    with_grid_bias(model[0], integers)
    codes = integers(integers.encode(X))
    assert codes.dtype == torch.int8
    assert torch.equal(integers.decode(codes).double(), model(X))
    assert codes.unique().numel() > 20


def test_a_network_stays_in_integers_from_end_to_end():
    first, second, third = fake(64, 96), fake(32, 64, seed=1), fake(8, 32, seed=2)
    second.input_quantizer = third.input_quantizer = None  # fed by what the layer before put out, already quantized
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    with calibrate(model):
        model(X)
    second.input_quantizer, third.input_quantizer = first.output_quantizer, second.output_quantizer
    integers = [IntegerLinear.from_module(module) for module in (first, second, third)]
    for module, integer in zip((first, second, third), integers, strict=True):
        with_grid_bias(module, integer)
    codes = integers[0].encode(X)
    for index, integer in enumerate(integers):
        codes = integer(codes)
        codes = codes if index == 2 else codes.clamp(min=0)
    assert torch.equal(integers[-1].decode(codes).double(), model(X))
    assert codes.unique().numel() > 20


def test_it_holds_integers_alone():
    integers = IntegerLinear.from_module(calibrated(fake(32, 96))[0])
    dtypes = {name: tensor.dtype for name, tensor in integers.state_dict().items()}
    assert dtypes == {"codes": torch.int8, "bias": torch.int32, "shift": torch.int32, "sign": torch.int32}
    assert not list(integers.parameters())


class TestRequantize:
    def test_it_is_division_rounded_half_to_even_and_saturated(self):
        total = torch.cat([torch.arange(-5000, 5000), torch.tensor([2**31 - 1, -(2**31), 2**30])]).int()
        for shift in range(-12, 36):
            shifts = torch.tensor([shift], dtype=torch.int32)
            expected = torch.ldexp(total.double(), torch.tensor(-shift)).round().clamp(-128, 127)
            assert torch.equal(requantize(total.unsqueeze(-1), shifts).squeeze(-1).double(), expected), shift

    def test_each_channel_has_its_own_shift(self):
        total = torch.full((1, 3), 24, dtype=torch.int32)
        assert requantize(total, torch.tensor([0, 4, -1], dtype=torch.int32)).tolist() == [[24, 2, 48]]

    def test_fewer_bits_saturate_earlier(self):
        total = torch.tensor([[100, -100]], dtype=torch.int32)
        assert requantize(total, torch.zeros(2, dtype=torch.int32), bits=4).tolist() == [[7, -8]]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"weight": None}, "needs a quantized weight"),
            ({"weight": replace(WEIGHT, scale_type="float")}, "scale_type pof2"),
            ({"weight": replace(WEIGHT, qscheme="per_group", group_size=32)}, "one scale per output"),
            ({"inputs": None}, "name a spec for input_tensors"),
            ({"outputs": None}, "name a spec for output_tensors"),
            ({"inputs": replace(STATIC, scale_type="float")}, "input_tensors int8 per_tensor: use a static"),
            ({"outputs": replace(STATIC, is_dynamic=True)}, "output_tensors .* use a static"),
            ({"inputs": replace(STATIC, dtype="uint8", symmetric=False)}, "input_tensors .* use a static"),
            ({"inputs": replace(STATIC, dtype="int16")}, "input_tensors: int16 can be rounded to .* but not stored"),
        ],
    )
    def test_what_is_no_shift_is_refused(self, options, sentence):
        with pytest.raises(ConfigError, match=sentence):
            IntegerLinear.from_module(fake(32, 96, **options))

    def test_scales_must_be_known(self):
        with pytest.raises(CalibrationError, match="input_tensors has no scale yet"):
            IntegerLinear.from_module(fake(32, 96))


def test_a_plain_linear_is_refused():
    with pytest.raises(ConfigError, match="made of a FakeQuantLinear, not of Linear"):
        IntegerLinear.from_module(nn.Linear(2, 2))
