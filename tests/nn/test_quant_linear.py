"""QuantLinear: packed codes that run, in less memory, and survive a state dict."""

import pytest
import torch
from torch import nn

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn import quant_linear
from fewbit.nn.quant_linear import QuantLinear
from fewbit.nn.quantizer import quantize_matrix

SPECS = {
    "int4 groups": QuantizationSpec(dtype="int4", group_size=32),
    "uint3 groups": QuantizationSpec(dtype="uint3", group_size=16, symmetric=False),
    "int8 rows": QuantizationSpec(dtype="int8", qscheme="per_channel"),
    "int8 columns": QuantizationSpec(dtype="int8", qscheme="per_channel", ch_axis=1),
    "uint2 tensor": QuantizationSpec(dtype="uint2", qscheme="per_tensor", symmetric=False),
    "e4m3 blocks": QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(6, 32)),
    "int4 groups of rows": QuantizationSpec(dtype="int4", group_size=8, ch_axis=0),
    "nvfp4": QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    "mxfp4": QuantizationSpec(dtype="e2m1", group_size=32, scale_type="e8m0"),
    "mx6": QuantizationSpec(dtype="mx6"),
    "bfloat16": QuantizationSpec(dtype="bfloat16"),
}
per_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def linear(rows: int = 48, columns: int = 96, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias=bias).requires_grad_(False)


X = torch.randn(2, 70, 96, generator=torch.Generator().manual_seed(1))


@per_spec
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_with_the_dequantized_weight(spec, bias):
    plain = linear(bias=bias)
    quant = QuantLinear.from_module(plain, spec=spec)
    weight = quantize_matrix(plain.weight, spec).dequantize()
    assert torch.equal(quant.dequantize(), weight)
    torch.testing.assert_close(quant(X), nn.functional.linear(X, weight, plain.bias), rtol=1e-5, atol=1e-6)


@per_spec
@pytest.mark.parametrize("elements", [1, 1000, 2000])
def test_chunks_make_no_difference(spec, elements, monkeypatch):
    quant = QuantLinear.from_module(linear(), spec=spec)
    whole = quant(X.double())
    monkeypatch.setattr(quant_linear, "CHUNK_ELEMENTS", elements)
    assert len(quant._chunks()) > 1
    torch.testing.assert_close(quant(X.double()), whole, rtol=0, atol=1e-12)


@per_spec
def test_a_state_dict_loads_into_another_linear_of_that_shape(spec, tmp_path):
    quant = QuantLinear.from_module(linear(seed=0), spec=spec)
    other = QuantLinear.from_module(linear(seed=1), spec=spec)
    assert not torch.equal(quant(X), other(X))
    torch.save(quant.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(quant(X), other(X))


@pytest.mark.parametrize(("bits", "share"), [(8, 0.27), (4, 0.15), (3, 0.12), (2, 0.09)])
def test_memory_is_that_of_the_codes_and_scales(bits, share):
    plain = linear(256, 512)
    quant = QuantLinear.from_module(plain, bits, "per-block", 64)
    assert quant.nbytes == sum(tensor.nbytes for tensor in quant.state_dict().values())
    assert quant.nbytes < share * sum(tensor.nbytes for tensor in plain.state_dict().values())


def test_bits_method_and_group_size_say_the_spec():
    assert QuantLinear.from_module(linear(columns=128), 4).spec.group_size == 128
    assert QuantLinear.from_module(linear(), 4, "per-group", 32).scale.shape == (48, 3)
    assert QuantLinear.from_module(linear(), 8, "per-channel").scale.shape == (48, 1)
    assert QuantLinear.from_module(linear(), 8, "per-tensor").scale.shape == (1, 1)
    assert QuantLinear.from_module(linear(), 4, "per-block", 32, symmetric=False).spec.dtype == "uint4"
    assert QuantLinear.from_module(linear(), 4, "per-block", 32, observer="minmax").spec.observer == "minmax"


def test_more_bits_mean_less_error():
    plain = linear()
    errors = [float((QuantLinear.from_module(plain, b, "per-block", 32)(X) - plain(X)).norm()) for b in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


def test_it_takes_any_quant_tensor():
    weight = quantize_matrix(linear().weight, SPECS["nvfp4"])
    quant = QuantLinear(weight)
    assert torch.equal(quant.quantized.codes, weight.codes)
    assert quant.quantized.global_scale == weight.global_scale
    assert torch.equal(quant(torch.eye(96)).T, weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_model_leaves_scales_as_stored(dtype):
    quant = QuantLinear.from_module(linear(), 4, "per-block", 32)
    before = quant.dequantize()
    quant.to(dtype)
    assert torch.equal(quant.dequantize(), before)
    assert quant(X.to(dtype)).dtype == dtype


def test_a_vector_and_no_rows_have_products_too():
    quant = QuantLinear.from_module(linear(), 8, "per-channel")
    torch.testing.assert_close(quant(X[0, 0]), quant(X)[0, 0], rtol=1e-5, atol=1e-6)
    assert quant(X[:, :0]).shape == (2, 0, 48)


def test_groups_that_do_not_divide_are_an_error():
    with pytest.raises(ConfigError, match="cannot be quantized int4 per_group 128"):
        QuantLinear.from_module(linear(), 4)


def test_a_state_dict_of_another_spec_is_refused():
    made = {name: QuantLinear.from_module(linear(), spec=SPECS[name]) for name in ("int4 groups", "nvfp4")}
    other = QuantLinear.from_module(linear(), spec=QuantizationSpec(dtype="e2m1", group_size=32))
    with pytest.raises(ConfigError, match="is int4 per_group 32, the model's is e2m1 per_group 32"):
        nn.Sequential(other).load_state_dict(nn.Sequential(made["int4 groups"]).state_dict())
    again = QuantLinear.from_module(linear(seed=1), spec=SPECS["nvfp4"])
    again.load_state_dict(made["nvfp4"].state_dict())
    assert torch.equal(again.dequantize(), made["nvfp4"].dequantize())
