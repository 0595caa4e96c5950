"""Quantizer: shapes of scales, and that it does what the spec does."""

import pytest
import torch

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.quantizer import Quantizer, quantize_matrix
from fewbit.nn.words import make_spec, weight_spec

X = torch.randn(2, 3, 8, 64, generator=torch.Generator().manual_seed(0))
SHAPES = {
    ("per-tensor", None): (1, 1),
    ("per-token", None): (2, 3, 8, 1),
    ("per-channel", None): (1, 64),
    ("per-block", 16): (2, 3, 8, 4),
    ("per-group", 32): (2, 3, 8, 2),
}
per_method = pytest.mark.parametrize(("method", "group_size"), SHAPES)


@per_method
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_have_the_shape_of_their_method(method, group_size, symmetric):
    scale, zero = Quantizer(8, method, group_size, symmetric=symmetric).find_scale(X)
    assert scale.shape == SHAPES[method, group_size]
    assert scale.dtype == torch.float32
    assert (zero is None) == symmetric
    assert zero is None or zero.shape == scale.shape


@per_method
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_is_the_nearest_point_of_the_grid_that_find_scale_tells(method, group_size, bits, symmetric):
    quantizer = Quantizer(bits, method, group_size, symmetric=symmetric)
    scale, zero = quantizer.find_scale(X)
    if group_size is not None:
        scale, zero = (part if part is None else part.repeat_interleave(group_size, -1) for part in (scale, zero))
    offset = 0 if zero is None else zero.float()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    expected = ((X / scale + offset).round().clamp(low, high) - offset) * scale
    torch.testing.assert_close(quantizer.quantize(X), expected, rtol=0, atol=0)
    assert torch.equal(quantizer(X), quantizer.quantize(X))


@per_method
@pytest.mark.parametrize("dtype", ["e4m3", "e5m2", "e2m1", "e3m2"])
def test_floats_are_a_matter_of_dtype(method, group_size, dtype):
    quantizer = Quantizer(method=method, group_size=group_size, dtype=dtype)
    error = (quantizer(X) - X).square().mean()
    assert 0 < error < 0.1
    torch.testing.assert_close(quantizer(quantizer(X)), quantizer(X))


@per_method
def test_more_bits_and_finer_scales_mean_less_error(method, group_size):
    errors = [float((Quantizer(bits, method, group_size)(X) - X).square().sum()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_block_formats_and_observers_are_options():
    mx = Quantizer(dtype="e2m1", method="per-block", group_size=32, scale_type="e8m0")
    assert torch.equal(torch.frexp(mx.find_scale(X)[0]).mantissa.unique(), torch.tensor([0.5]))
    nvfp4 = Quantizer(dtype="e2m1", method="per-block", group_size=16, scale_type="e4m3", observer="mse")
    minmax = Quantizer(dtype="e2m1", method="per-block", group_size=16, scale_type="e4m3")
    assert (nvfp4(X) - X).square().sum() < (minmax(X) - X).square().sum()


def test_a_half_precision_tensor_stays_one():
    assert Quantizer(8, "per-token")(X.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((8, "per-row"), "unknown method 'per-row'"),
        ((8, None), "unknown method None"),
        ((1, "per-token"), "bits must be 2 to 64, not 1"),
        ((True, "per-token"), "bits must be 2 to 64, not True"),
        ((4, "per-block"), "per-block needs group_size"),
        ((4, "per-token", 32), "group_size 32 contradicts method per-token"),
    ],
)
def test_words_that_make_no_sense_are_errors(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Quantizer(*arguments)


def test_groups_that_do_not_divide_are_an_error():
    with pytest.raises(ConfigError, match="48 do not divide"):
        Quantizer(4, "per-block", 48)(X)


class TestAKeptScale:
    LOUD, QUIET = torch.tensor([[100.0, 1.0]]), torch.tensor([[1.0, 0.3]])

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_what_find_scale_found_is_used_until_it_is_forgotten(self, symmetric):
        quantizer = Quantizer(8, "per-tensor", symmetric=symmetric)
        own = quantizer(self.QUIET)
        scale, zero = quantizer.find_scale(self.LOUD)
        assert quantizer.scale is scale
        assert quantizer.zero_point is zero
        offset = 0 if zero is None else zero.float()
        expected = ((self.QUIET / scale + offset).round() - offset) * scale
        assert torch.equal(quantizer(self.QUIET), expected)
        assert not torch.equal(expected, own)
        quantizer.forget()
        assert torch.equal(quantizer(self.QUIET), own)

    @per_method
    def test_it_is_the_tensor_s_own_for_the_tensor_it_was_found_on(self, method, group_size):
        for options in ({}, {"symmetric": False}, {"residual": True}, {"dtype": "e4m3"}):
            own = Quantizer(4, method, group_size, **options)
            kept = Quantizer(4, method, group_size, **options)
            kept.find_scale(X)
            assert torch.equal(kept(X), own(X))

    @pytest.mark.parametrize(
        ("method", "group_size", "other"),
        [("per-token", None, X[:1]), ("per-block", 16, X[..., :32]), ("per-channel", None, X[..., :32])],
    )
    def test_a_tensor_of_another_shape_is_an_error(self, method, group_size, other):
        quantizer = Quantizer(8, method, group_size)
        quantizer.find_scale(X)
        with pytest.raises(ConfigError, match=r"does not fit .* call find_scale with it, or forget\(\)"):
            quantizer(other)

    def test_it_fits_other_rows_where_rows_share_it(self):
        for method in ("per-tensor", "per-channel"):
            quantizer = Quantizer(8, method)
            quantizer.find_scale(X)
            assert torch.equal(quantizer(X[:1]), quantizer(X)[:1])

    def test_casting_the_module_does_not_round_it(self):
        quantizer = Quantizer(8, "per-token")
        scale, _ = quantizer.find_scale(X)
        assert torch.equal(quantizer.half().scale, scale)

    @pytest.mark.parametrize(
        ("x", "sentence"),
        [
            (torch.tensor([[1.0, torch.nan]]), "holds NaN or infinity"),
            (torch.ones(0, 4), "is empty"),
            (torch.ones(2, 4, dtype=torch.int64), "only floats"),
            (torch.tensor(1.0), "without axes"),
        ],
    )
    def test_what_has_no_scale_is_an_error(self, x, sentence):
        with pytest.raises(ConfigError, match=sentence):
            Quantizer(8).find_scale(x)

    def test_a_bare_number_is_an_error(self):
        with pytest.raises(ConfigError, match="without axes"):
            Quantizer(8).quantize(torch.tensor(1.0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [9, 10, 12, 16, 20])
def test_more_bits_than_codes_have_are_rounded_to(bits, symmetric):
    quantizer = Quantizer(bits, "per-token", symmetric=symmetric)
    scale, zero = (part if part is None else part.double() for part in quantizer.find_scale(X))
    offset = 0 if zero is None else zero
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    expected = ((X.double() / scale + offset).round().clamp(low, high) - offset) * scale
    step = scale.max()
    off = (quantizer(X) - expected).abs() / step
    assert float((off > 0.1).float().mean()) < 0.02 * 2 ** max(0, bits - 16)  # float32 decides ties its own way
    assert float(off.max()) < 1.1
    assert float(((quantizer(X) - X).abs() / step).max()) < 0.6


@pytest.mark.parametrize("bits", [24, 32, 64])
def test_bits_beyond_what_a_float_tells_leave_it_as_it_is(bits):
    for symmetric in (True, False):
        torch.testing.assert_close(Quantizer(bits, "per-token", symmetric=symmetric)(X), X, rtol=0, atol=2e-6)


def test_what_is_only_rounded_to_is_not_stored():
    with pytest.raises(ConfigError, match=r"fc1: int10 can be rounded to .* but not stored; codes have 2 to 8 bits"):
        quantize_matrix(X[0, 0], weight_spec(10, "per-channel"), "fc1")


def test_a_casts_scale_is_an_error_and_quantize_casts():
    cast = Quantizer(dtype="bfloat16", method="per-tensor", observer="placeholder", is_dynamic=False)
    assert torch.equal(cast(X), X.bfloat16().float())
    with pytest.raises(ConfigError, match="cast without scales"):
        cast.find_scale(X)


class TestWeights:
    def test_per_channel_of_a_weight_is_a_scale_per_output(self):
        for method, size in (("per-channel", None), ("per-token", None), ("per-block", -1)):
            assert weight_spec(4, method, size).tiling.scale_shape((32, 64)) == (32, 1)
        assert make_spec(4, "per-channel").tiling.scale_shape((32, 64)) == (1, 64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scales_are_stored_in_the_weights_dtype_and_the_search_beats_minmax(self, dtype):
        weight = X[0, 0].to(dtype)
        errors = []
        for observer in ("search", "minmax"):
            found = quantize_matrix(weight, weight_spec(3, "per-block", 32, observer=observer))
            assert found.scale.dtype == dtype
            errors.append(float((found.dequantize() - weight.float()).square().sum()))
        assert errors[0] < errors[1]

    def test_two_stages_quantize_what_the_first_left(self):
        first = QuantizationSpec(dtype="e4m3", qscheme="per_tensor", observer="minmax")
        spec = weight_spec(4, "per-block", 32, first_stage=first, observer="minmax")
        weight = X[0, 0]
        after_first = quantize_matrix(weight, first).dequantize()
        plain = weight_spec(4, "per-block", 32, observer="minmax")
        expected = quantize_matrix(after_first, plain)
        assert torch.equal(quantize_matrix(weight, spec).codes, expected.codes)

    def test_a_cast_has_no_scales_to_find(self):
        weight = X[0, 0]
        found = quantize_matrix(weight, QuantizationSpec(dtype="bfloat16"))
        assert torch.equal(found.dequantize(), weight.bfloat16().float())

    def test_errors_name_the_matrix(self):
        with pytest.raises(ConfigError, match=r"fc1 cannot be quantized int4 per_group 48"):
            quantize_matrix(X[0, 0], weight_spec(4, "per-block", 48), "fc1")
        with pytest.raises(ConfigError, match="fc1 holds NaN"):
            quantize_matrix(torch.full((2, 2), torch.nan), weight_spec(4, "per-channel"), "fc1")
