"""FakeQuantLinear and the convolutions: the product of quantized values, nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.calibration.observers import make_observer
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn import fake_quant
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.fake_quant import (
    FakeQuantConv1d,
    FakeQuantConv2d,
    FakeQuantLinear,
    W4A16FakeLinear,
    W8A8FakeLinear,
    W8A8StaticFakeLinear,
)
from fewbit.nn.quantizer import quantize_matrix

INT4 = QuantizationSpec(dtype="int4", group_size=32)
INT8 = QuantizationSpec(dtype="int8", qscheme="per_channel")
TOKEN = QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
TENSOR = QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax")
PRESETS = [name for name in vars(fake_quant) if name.endswith("FakeLinear")]
X = torch.randn(3, 40, 128, generator=torch.Generator().manual_seed(1))


def linear(columns: int = 128, rows: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows)


class TestLinear:
    @pytest.mark.parametrize("weight", [None, INT4, INT8], ids=["-", "int4", "int8"])
    @pytest.mark.parametrize("inputs", [None, TOKEN], ids=["-", "token"])
    @pytest.mark.parametrize("outputs", [None, TOKEN], ids=["-", "token"])
    def test_it_is_the_product_of_quantized_values(self, weight, inputs, outputs):
        plain = linear()
        if weight is inputs is outputs is None:
            with pytest.raises(ConfigError, match="nothing to quantize"):
                FakeQuantLinear.from_module(plain)
            return
        fake = FakeQuantLinear.from_module(plain, weight=weight, input_tensors=inputs, output_tensors=outputs)
        w = plain.weight if weight is None else quantize_matrix(plain.weight, weight).dequantize()
        x = X if inputs is None else ActivationQuantizer(inputs)(X)
        expected = nn.functional.linear(x.double(), w.double(), plain.bias.double())
        if outputs is not None:
            fake.output_quantizer, expected = None, expected  # compared before the last rounding, then after it
        torch.testing.assert_close(fake(X).double(), expected, rtol=1e-5, atol=1e-5)
        if outputs is not None:
            before = fake(X)
            fake.output_quantizer = ActivationQuantizer(outputs)
            assert torch.equal(fake(X), ActivationQuantizer(outputs)(before))

    def test_gradients_asked_for_make_no_difference(self):
        fake = W8A8FakeLinear.from_module(linear())
        with torch.no_grad():
            expected = fake(X)
        assert torch.equal(fake(X.clone().requires_grad_()), expected)

    def test_the_linear_it_came_from_stays_as_it_is(self):
        plain = linear()
        before = plain.weight.detach().clone()
        fake = W4A16FakeLinear.from_module(plain)
        fake(X)
        assert torch.equal(plain.weight, before)
        assert fake.weight is plain.weight

    def test_new_weights_are_quantized_when_they_are_loaded(self):
        fake, other = (W4A16FakeLinear.from_module(module) for module in (linear(), nn.Linear(128, 128)))
        assert not torch.equal(fake(X), other(X))
        other.load_state_dict(fake.state_dict())
        assert torch.equal(fake(X), other(X))

    def test_casting_the_module_casts_the_weight_and_quantizes_again(self):
        fake = W4A16FakeLinear.from_module(linear()).to(torch.bfloat16)
        weight = quantize_matrix(linear().weight.to(torch.bfloat16), fake.config.weight).dequantize(torch.bfloat16)
        assert torch.equal(fake.fake_weight(), weight)
        assert fake(X.bfloat16()).dtype == torch.bfloat16

    def test_the_bias_is_quantized_where_the_config_says_so(self):
        plain = linear()
        fake = FakeQuantLinear.from_module(plain, weight=INT8, bias=QuantizationSpec(dtype="bfloat16"))
        assert torch.equal(fake.fake_bias(), plain.bias.bfloat16().float())

    def test_static_inputs_are_calibrated_and_saved(self):
        fake = W8A8StaticFakeLinear.from_module(linear())
        with pytest.raises(CalibrationError, match="no scale yet"):
            fake(X)
        fake.input_quantizer.observer = observer = make_observer(fake.config.input_tensors)
        fake(X)
        fake.input_quantizer.observer = None
        fake.input_quantizer.load(observer.result())
        torch.testing.assert_close(fake(X), linear()(X), rtol=0, atol=0.05)
        fresh = W8A8StaticFakeLinear.from_module(nn.Linear(128, 128))
        fresh.load_state_dict(fake.state_dict())
        assert torch.equal(fresh(X), fake(X))


class TestConfigs:
    @pytest.mark.parametrize("name", PRESETS)
    def test_every_preset_is_its_scheme_and_close_to_the_linear(self, name):
        preset = getattr(fake_quant, name)
        fake = preset.from_module(linear())
        assert fake.config == scheme_config(preset.preset)
        assert (type(fake).__name__, type(fake).__module__) == (name, fake_quant.__name__)
        if fake.input_quantizer is not None and fake.input_quantizer.needs_calibration:
            fake.input_quantizer.observer = observer = make_observer(fake.config.input_tensors)
            fake(X)
            fake.input_quantizer.observer = None
            fake.input_quantizer.load(observer.result())
        error = (fake(X) - linear()(X)).square().mean() / linear()(X).square().mean()
        assert 0 < error < (0.05 if "4" in name else 0.002)

    def test_there_are_presets(self):
        assert {"W8A8FakeLinear", "W4A16FakeLinear", "W4A8FakeLinear", "W4A4FakeLinear"} < set(PRESETS)

    def test_a_scheme_a_config_and_specs_say_the_same(self):
        by_name = FakeQuantLinear.from_module(linear(), "W4A8-g32")
        config = scheme_config("W4A8", 32)
        by_config = FakeQuantLinear.from_module(linear(), config)
        by_specs = FakeQuantLinear.from_module(linear(), weight=config.weight, input_tensors=config.input_tensors)
        assert by_name.config == by_config.config == by_specs.config == config
        assert torch.equal(by_name(X), by_specs(X))

    def test_group_size_and_specs_change_a_preset(self):
        assert W4A16FakeLinear.from_module(linear(), group_size=32).config.weight.group_size == 32
        assert W4A16FakeLinear.from_module(linear(), group_size=-1).config.weight.qscheme == "per_channel"
        assert W8A8FakeLinear.from_module(linear(), input_tensors=TENSOR).config.input_tensors == TENSOR
        assert W8A8FakeLinear.from_module(linear(), "W4A16").config == scheme_config("W4A16")

    @pytest.mark.parametrize(
        ("config", "sentence"),
        [
            ("W4A15", "unknown scheme"),
            (QuantizationConfig(weight=replace(INT4, group_size=48)), "cannot be quantized int4 per_group 48"),
            (
                QuantizationConfig(input_tensors=QuantizationSpec(group_size=48, observer="minmax", is_dynamic=True)),
                "activation of 128 channels cannot be quantized",
            ),
        ],
    )
    def test_what_does_not_fit_is_an_error_before_it_runs(self, config, sentence):
        with pytest.raises(ConfigError, match=sentence):
            FakeQuantLinear.from_module(linear(), config)


class TestConvolutions:
    IMAGES = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(2))

    @pytest.mark.parametrize(
        "options",
        [{}, {"stride": 2, "padding": 1}, {"groups": 4}, {"dilation": 2, "bias": False}, {"padding_mode": "circular"}],
        ids=str,
    )
    def test_it_is_the_convolution_of_quantized_values(self, options):
        torch.manual_seed(0)
        plain = nn.Conv2d(8, 16, 3, **options)
        fake = FakeQuantConv2d.from_module(plain, weight=INT8, input_tensors=TENSOR)
        fake.input_quantizer.observer = observer = make_observer(TENSOR)
        fake(self.IMAGES)
        fake.input_quantizer.observer = None
        fake.input_quantizer.load(observer.result())
        rounded = copy.deepcopy(plain)
        rounded.weight.data = quantize_matrix(plain.weight.flatten(1), INT8).dequantize().view_as(plain.weight)
        expected = rounded(ActivationQuantizer(TENSOR, observer.result())(self.IMAGES))
        torch.testing.assert_close(fake(self.IMAGES), expected, rtol=1e-5, atol=1e-5)

    def test_per_token_of_an_image_is_a_scale_for_each_pixel(self):
        images = self.IMAGES.clone()
        images[0, :, 4, 4] *= 1000
        fake = FakeQuantConv2d.from_module(nn.Conv2d(8, 4, 1), input_tensors=TOKEN)
        loud, plain = fake(images), fake(self.IMAGES)
        loud[0, :, 4, 4] = plain[0, :, 4, 4] = 0
        assert torch.equal(loud, plain)

    def test_one_dimension_and_no_batch_axis(self):
        fake = FakeQuantConv1d.from_module(nn.Conv1d(8, 4, 3), "W8A8")
        x = self.IMAGES[:, :, 0]
        torch.testing.assert_close(fake(x[0]), fake(x)[0])

    def test_groups_run_over_inputs_and_kernel(self):
        conv = nn.Conv2d(8, 4, 2)
        assert FakeQuantConv2d.from_module(conv, weight=INT4).quantized_weight().scale.shape == (4, 1)
        with pytest.raises(ConfigError, match="do not divide"):
            FakeQuantConv2d.from_module(nn.Conv2d(3, 4, 3), weight=INT4)


def test_a_preset_made_from_nothing_quantizes_as_one_made_from_a_linear():
    torch.manual_seed(0)
    made = W8A8FakeLinear(16, 8)
    x = torch.randn(4, 16)
    assert torch.equal(made(x), W8A8FakeLinear.from_module(made)(x))
    assert not torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_another_kind_of_module_is_refused():
    with pytest.raises(ConfigError, match=r"FakeQuantLinear stands for nn\.Linear, not for Conv2d"):
        FakeQuantLinear.from_module(nn.Conv2d(3, 8, 3), "W8A8")


class TestWords:
    """FullQuantTransformer's names: bits and methods."""

    def test_words_are_specs(self):
        plain = linear()
        for words, weight, inputs in (
            ({"w_bits": 8, "a_bits": 8}, ("int8", "per_channel", None), ("int8", "per_token")),
            ({"w_bits": 4, "a_bits": 16}, ("int4", "per_channel", None), None),
            ({"w_bits": 16, "a_bits": 4, "a_method": "per-tensor"}, None, ("int4", "per_tensor")),
            (
                {"w_bits": 3, "w_method": "per-block", "w_group_size": 16},
                ("int3", "per_group", 16),
                ("int8", "per_token"),
            ),
            ({"w_method": "per-tensor"}, ("int8", "per_tensor", None), ("int8", "per_token")),
        ):
            config = FakeQuantLinear.from_module(plain, **words).config
            found = config.weight and (config.weight.dtype, config.weight.qscheme, config.weight.group_size)
            assert found == weight
            assert (config.input_tensors and (config.input_tensors.dtype, config.input_tensors.qscheme)) == inputs

    def test_bits_may_be_given_by_position_and_to_the_constructor(self):
        plain = linear()
        expected = FakeQuantLinear.from_module(plain, w_bits=6, a_bits=5, w_method="per-tensor")
        by_position = FakeQuantLinear.from_module(plain, 6, 5, w_method="per-tensor")
        assert torch.equal(by_position(X), expected(X))
        made = FakeQuantLinear(128, 128, w_bits=6, a_bits=5, w_method="per-tensor")
        made.load_state_dict(plain.state_dict())
        assert torch.equal(made(X), expected(X))
        assert FakeQuantLinear(64, 32).config.weight.dtype == "int8"
        made = FakeQuantLinear(128, 64, True, 4, 8, "per-block", "per-tensor", 32)
        assert made.config.weight.summary == "int4 per_group 32"
        assert made.config.input_tensors.summary == "int8 per_tensor dynamic"

    def test_a_preset_keeps_its_bits_and_takes_methods(self):
        made = W8A8FakeLinear.from_module(linear(), w_method="per-token", a_method="per-tensor")
        assert (made.config.weight.summary, made.config.input_tensors.summary) == (
            "int8 per_channel",
            "int8 per_tensor dynamic",
        )
        by_position = W8A8FakeLinear.from_module(linear(), "per-token", "per-tensor")
        assert by_position.config == made.config
        weights_alone = W4A16FakeLinear.from_module(linear(), w_method="per-token", a_method="per-token")
        assert weights_alone.config.weight.summary == "int4 per_channel"
        assert weights_alone.config.input_tensors is None
        grouped = FakeQuantLinear.from_module(linear(), "W8A8", w_group_size=32)
        assert grouped.config.weight.summary == "int8 per_group 32"

    @pytest.mark.parametrize("bits", [9, 10, 12])
    def test_bits_beyond_codes_are_rounded_to(self, bits):
        plain = linear()
        made = FakeQuantLinear.from_module(plain, w_bits=bits, a_bits=16)
        weight = plain.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)
        expected = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        torch.testing.assert_close(made.fake_weight(), expected, rtol=0, atol=1e-6)
        with pytest.raises(ConfigError, match=f"int{bits} can be rounded to .* but not stored"):
            made.quantized_weight()

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda plain: FakeQuantLinear.from_module(plain), "nothing to quantize"),
            (lambda plain: FakeQuantLinear.from_module(plain, 16, 16), "nothing to quantize"),
            (lambda plain: W8A8FakeLinear.from_module(plain, w_bits=4), "w_bits contradicts W8A8"),
            (lambda plain: FakeQuantLinear.from_module(plain, 8, w_bits=8), "given twice"),
            (lambda plain: FakeQuantLinear.from_module(plain, w_method="per-row"), "unknown method 'per-row'"),
            (lambda plain: FakeQuantLinear.from_module(plain, w_bits=1), "bits must be 2 to 64, not 1"),
            (lambda plain: FakeQuantLinear.from_module(plain, w_bits=4, w_method="per-block"), "needs group_size"),
            (lambda plain: FakeQuantLinear.from_module(plain, a_method="per-channel"), "number differs from batch to"),
        ],
    )
    def test_words_that_make_no_sense_are_errors(self, make, sentence):
        with pytest.raises(ConfigError, match=sentence):
            make(linear())
