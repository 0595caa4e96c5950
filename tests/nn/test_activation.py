"""ActivationQuantizer: its tiles, what it keeps and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from fewbit.config.schemes import SCHEMES
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn.activation import ActivationQuantizer
from fewbit.tensor import QuantizedActivation

TOKEN = QuantizationSpec(dtype="int8", qscheme="per_token", observer="minmax", is_dynamic=True)
STATIC = QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax")
KNOWN = QuantizedActivation(STATIC, torch.tensor([[0.5]]))


def test_each_token_has_its_own_scale_whatever_is_beside_it():
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(TOKEN)
    whole = quantizer(x)
    x[0, 0] *= 1000
    assert torch.equal(quantizer(x)[0, 1:], whole[0, 1:])
    assert torch.equal(quantizer(x)[1], whole[1])


def test_a_static_scale_gives_multiples_of_it_within_the_range():
    out = ActivationQuantizer(STATIC, KNOWN)(torch.tensor([[0.26, 0.24, -1e6, 1e6]]))
    assert out.tolist() == [[0.5, 0.0, -64.0, 63.5]]


@pytest.mark.parametrize("dtype", ["int8", "uint4", "e4m3", "e2m1", "bfloat16"])
def test_dtype_and_shape_stay_and_grad_mode_makes_no_difference(dtype):
    fields = {"symmetric": False} if dtype == "uint4" else {}
    fields |= {} if dtype == "bfloat16" else {"qscheme": "per_token", "observer": "minmax", "is_dynamic": True}
    quantizer = ActivationQuantizer(QuantizationSpec(dtype=dtype, **fields))
    x = torch.randn(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = quantizer(x)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    assert not torch.equal(out, x)
    with_gradient = quantizer(x.clone().requires_grad_())
    assert torch.equal(with_gradient, out)
    assert not with_gradient.requires_grad


def test_residual_quantizes_what_is_left():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    once, twice = (ActivationQuantizer(replace(TOKEN, dtype="int4", residual=on))(x) for on in (False, True))
    assert (twice - x).square().sum() < 0.02 * (once - x).square().sum()


@pytest.mark.parametrize("spec", [TOKEN, replace(TOKEN, qscheme="per_tensor")])
def test_no_tokens_are_no_error(spec):
    assert ActivationQuantizer(spec)(torch.empty(0, 16)).shape == (0, 16)


def test_an_observer_sees_x_and_x_passes():
    quantizer, seen = ActivationQuantizer(STATIC), []
    quantizer.observer = seen.append
    x = torch.randn(2, 4)
    assert quantizer(x) is x
    assert seen == [x]


def test_static_without_a_scale_is_an_error_that_says_what_to_do():
    with pytest.raises(CalibrationError, match="no scale yet; run data"):
        ActivationQuantizer(STATIC)(torch.ones(2, 4))


def test_groups_that_do_not_divide_are_an_error():
    spec = QuantizationSpec(dtype="int8", group_size=12, observer="minmax", is_dynamic=True)
    with pytest.raises(ConfigError, match="12 do not divide"):
        ActivationQuantizer(spec)(torch.ones(2, 16))


class TestStateDict:
    AFFINE = QuantizedActivation(
        QuantizationSpec(dtype="uint8", qscheme="per_tensor", symmetric=False, observer="minmax"),
        torch.tensor([[0.1]]),
        torch.tensor([[7]], dtype=torch.uint8),
    )
    NVFP4 = QuantizedActivation(
        QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3", observer="minmax", is_dynamic=True),
        global_scale=0.25,
    )

    @pytest.mark.parametrize("state", [KNOWN, AFFINE, NVFP4], ids=["symmetric", "affine", "nvfp4"])
    def test_a_persistent_quantizer_round_trips_into_a_fresh_one(self, state):
        known = ActivationQuantizer(state.spec, state, persistent=True)
        fresh = ActivationQuantizer(state.spec, persistent=True)
        fresh.load_state_dict(known.state_dict())
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(fresh(x), known(x))
        assert fresh.state().global_scale == state.global_scale
        assert not fresh.needs_calibration

    def test_by_default_nothing_is_in_the_state_dict(self):
        assert ActivationQuantizer(STATIC, KNOWN).state_dict() == {}

    def test_a_known_scale_that_the_state_dict_lacks_is_missing(self):
        with pytest.raises(RuntimeError, match="scale"):
            ActivationQuantizer(STATIC, KNOWN, persistent=True).load_state_dict({})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_scales_keep_their_dtype_when_the_model_is_cast(self, dtype):
        state = QuantizedActivation(STATIC, torch.tensor([[0.1]]))
        model = torch.nn.Sequential(ActivationQuantizer(STATIC, state), torch.nn.Linear(2, 2)).to(dtype)
        assert torch.equal(model[0].scale, state.scale)
        assert model[0].scale.dtype == torch.float32
        assert model[1].weight.dtype == dtype


DYNAMIC = {name: config.input_tensors for name, config in SCHEMES.items() if config.input_tensors}


@pytest.mark.parametrize("name", [name for name, spec in DYNAMIC.items() if spec.is_dynamic])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_seen_behind_the_quantizer_and_spoils_only_its_tokens(name, bad):
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    x[0, 3] = bad
    out = ActivationQuantizer(DYNAMIC[name])(x)
    assert not bool(out[0, 3].isfinite())
    assert bool(out[1:].isfinite().all())


def test_an_affine_activation_lets_nan_through():
    spec = replace(TOKEN, dtype="uint4", symmetric=False)
    out = ActivationQuantizer(spec)(torch.tensor([[1.0, math.nan], [1.0, 2.0]]))
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_that_leaves_zeros_alone_takes_everything(symmetric):
    dtype = "int8" if symmetric else "uint8"
    spec = replace(TOKEN, dtype=dtype, symmetric=symmetric, observer="percentile", percentile=90.0)
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([300.0, 200.0, 100.0])
    torch.testing.assert_close(ActivationQuantizer(spec)(x), x, atol=2.0, rtol=0)


def test_casts_work_on_every_float_dtype():
    x = torch.tensor([[1.0009765625, 65504.0]], dtype=torch.float16)
    out = ActivationQuantizer(QuantizationSpec(dtype="bfloat16"))(x)
    assert out.dtype == torch.float16
    assert out[0, 0].item() == 1.0


def test_a_width_that_microexponent_blocks_do_not_divide_is_refused_in_a_sentence():
    spec = QuantizationSpec(dtype="mx9", observer="minmax", is_dynamic=True)
    with pytest.raises(ConfigError, match="1 × 16 do not divide a matrix of 2 × 50"):
        ActivationQuantizer(spec)(torch.zeros(2, 50))


def test_whole_numbers_are_refused():
    with pytest.raises(ConfigError, match="int64"):
        ActivationQuantizer(TOKEN)(torch.tensor([[3, -7, 5, 1]]))
