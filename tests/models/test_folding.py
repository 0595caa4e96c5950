"""Folding scales: the function that a model computes is the same to the last bits, whatever is stored."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.algorithms.rtn import rtn
from fewbit.config.spec import QuantizationSpec
from fewbit.models.architecture import FAMILIES, listed
from fewbit.models.folding import (
    channel_map,
    fold,
    fold_into_linear_rows,
    fold_into_norm,
    fold_into_quantized_rows,
    norm_scale,
    per_row,
    rescalable_rows,
    rescale_rows,
    scale_columns,
)
from fewbit.nn.linear import adopt
from fewbit.tensor import QuantTensor

LLAMA = FAMILIES[0].scalings(FAMILIES[0].kinds[0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scale(channels, dtype=torch.float32, seed=0):
    return torch.randn(channels, generator=seeded(seed), dtype=dtype).exp()


def random_powers(channels, seed=0):
    return torch.exp2(torch.randint(-3, 4, (channels,), generator=seeded(seed)).float())


def compute_norms_in_float64(model):
    """transformers computes norms in float32, whatever the model's dtype is."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            one = 1.0 if "Gemma" in type(module).__name__ else 0.0
            eps = getattr(module, "variance_epsilon", None) or module.eps
            module.forward = lambda x, m=module, one=one, eps=eps: (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (one + m.weight)
            )


def test_logits_are_the_same_after_every_scaling_of_every_block(random_model, family):
    model = random_model(family).double()
    reference = random_model(family)
    ids = torch.arange(2 * 24).view(2, 24) % 300
    with torch.no_grad():
        original = reference(input_ids=ids).logits
        compute_norms_in_float64(model)
        before = model(input_ids=ids).logits
        torch.testing.assert_close(before.float(), original, rtol=1e-3, atol=1e-3)  # still the same model
        found = listed(family)
        head_dim = model.model.layers[0].self_attn.head_dim
        for index, block in enumerate(model.model.layers):
            for number, scaling in enumerate(found.scalings(found.kinds[0])):
                tensors = dict(block.named_parameters())
                channels = tensors[f"{scaling.producer}.weight"].shape[0]
                scale = random_scale(channels, torch.float64, seed=10 * index + number)
                changed, _ = fold({n: p.data for n, p in tensors.items()}, scaling, scale, head_dim)
                assert len(changed) > len(scaling.consumers)
                for name, tensor in changed.items():
                    tensors[name].data = tensor
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_in_its_stored_dtype_times_the_scale_taken_is_the_norm_before(offset, dtype):
    weight = (1 + 0.3 * torch.randn(512, generator=seeded())).to(dtype)
    wanted = random_scale(512)
    folded, bias, taken = fold_into_norm(weight, None, wanted, offset)
    assert folded.dtype == dtype
    assert bias is None
    one = 1.0 if offset else 0.0
    torch.testing.assert_close((one + folded.double()) * taken.double(), one + weight.double(), rtol=2e-7, atol=0)
    torch.testing.assert_close(taken, wanted, rtol=0.3 if offset else 0.005, atol=0)
    assert torch.equal(norm_scale(weight, folded, offset).float(), taken)


def test_channels_of_a_norm_that_cannot_be_scaled_keep_one():
    weight = torch.tensor([0.0, 1.0, 1.0, 60000.0], dtype=torch.float16)
    folded, _, taken = fold_into_norm(weight, None, torch.tensor([2.0, 1e9, 2.0, 1e-3]))
    assert taken.tolist() == [1.0, 1.0, 2.0, 1.0]
    assert folded.tolist() == [0.0, 1.0, 0.5, 60000.0]


def test_a_norm_bias_is_divided_by_the_scale_taken():
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    _, folded, taken = fold_into_norm(weight.bfloat16(), bias, random_scale(8))
    torch.testing.assert_close(folded * taken, bias)


def test_rows_of_a_linear_in_16_bits_take_powers_of_two_only():
    weight, bias = torch.randn(6, 32, generator=seeded()).bfloat16(), torch.randn(6, generator=seeded(1)).bfloat16()
    scale = torch.tensor([2.0, 0.5, 1.3, 4.0, 1.0, 0.7])
    folded, folded_bias, taken = fold_into_linear_rows(weight, bias, scale)
    assert taken.tolist() == [2.0, 0.5, 1.0, 4.0, 1.0, 1.0]
    assert torch.equal(folded.float() * taken.unsqueeze(1), weight.float())
    assert torch.equal(folded_bias.float() * taken, bias.float())


def test_columns_times_powers_of_two_are_exact_in_16_bits():
    router = torch.randn(4, 8, 64, generator=seeded()).bfloat16()  # experts in one tensor
    scale = random_powers(64)
    assert torch.equal(scale_columns(router, scale).float(), router.float() * scale)


SPECS = {
    "int4": QuantizationSpec(dtype="int4", group_size=16),
    "uint4": QuantizationSpec(dtype="uint4", group_size=16, symmetric=False),
    "per channel": QuantizationSpec(dtype="int8", qscheme="per_channel"),
    "fp8": QuantizationSpec(dtype="e4m3", qscheme="per_channel"),
    "power of two": QuantizationSpec(dtype="int4", group_size=16, scale_type="pof2"),
    "nvfp4": QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3"),
    "mxfp4": QuantizationSpec(dtype="e2m1", group_size=32, scale_type="e8m0"),
    "mx6": QuantizationSpec(dtype="int5", group_size=2, scale_type="microexponent"),
    "cast": QuantizationSpec(dtype="bfloat16", qscheme="per_tensor", observer="placeholder"),
}


def quantized(spec, rows=24, columns=64, dtype=torch.bfloat16):
    weight = torch.randn(rows, columns, generator=seeded())
    return rtn(weight, None, spec, spec.scale_format(dtype, spec.global_scale(weight))).weight


@pytest.mark.parametrize("name", SPECS)
def test_rows_of_a_quantized_weight_are_rescaled_exactly(name):
    weight = quantized(SPECS[name])
    factor = torch.exp2(torch.randint(-2, 1, (24,), generator=seeded()).float())
    possible = rescalable_rows(weight, factor)
    assert possible.float().mean() > 0.5
    factor = torch.where(possible, factor, 1.0)
    rescaled = rescale_rows(weight, factor)
    assert torch.equal(rescaled.dequantize(), weight.dequantize() * factor.unsqueeze(1))
    assert rescaled.scale.dtype == weight.scale.dtype
    if name != "cast":
        assert torch.equal(rescaled.codes, weight.codes)


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("nvfp4", torch.bfloat16, 2.0),  # the largest scale is near 448 already
        ("nvfp4", torch.bfloat16, 2.0**-14),
        ("mxfp4", torch.bfloat16, 2.0**-126),
        ("int4", torch.float16, 2.0**18),
        ("int4", torch.float16, 2.0**-14),
        ("int4", torch.bfloat16, 1.3),
        ("cast", torch.bfloat16, 1.3),
    ],
)
def test_what_the_scale_format_cannot_hold_is_refused_and_the_row_kept(name, dtype, factor):
    weight = quantized(SPECS[name], dtype=dtype)
    largest = int(weight.scale_value.float().abs().amax(1).argmax())
    factors = torch.ones(24)
    factors[largest] = factor
    assert (~rescalable_rows(weight, factors)).nonzero().flatten().tolist() == [largest]
    with pytest.raises(ValueError, match=f"row {largest} "):
        rescale_rows(weight, factors)
    folded, _, taken = fold_into_quantized_rows(weight, None, 1 / factors)
    assert torch.equal(taken, torch.ones(24))
    assert torch.equal(folded.dequantize(), weight.dequantize())


def test_rows_that_share_a_scale_are_rescaled_together():
    weight = quantized(QuantizationSpec(dtype="e4m3", qscheme="per_block", block_size=(8, 16)))
    factor = torch.ones(24)
    factor[:8], factor[9] = 2.0, 2.0
    assert rescalable_rows(weight, factor).view(3, 8).all(1).tolist() == [True, False, True]
    bias = torch.full((24,), 1.0).half()
    bias[3] = 60000.0  # twice that is no float16, so its tile keeps 1
    _, _, taken = fold_into_quantized_rows(weight, bias, factor.new_full((24,), 0.5))
    assert taken.view(3, 8).tolist() == [[1.0] * 8, [0.5] * 8, [0.5] * 8]


def test_a_quantized_linear_with_bias_is_divided_as_a_whole():
    weight, bias = quantized(SPECS["int4"]), torch.randn(24, generator=seeded(2)).bfloat16()
    scale = random_powers(24)
    folded, folded_bias, taken = fold_into_quantized_rows(weight, bias, scale)
    assert torch.equal(taken, scale)
    x = torch.randn(5, 64, generator=seeded(3))
    before = nn.functional.linear(x, weight.dequantize(), bias.float())
    after = nn.functional.linear(x, folded.dequantize(), folded_bias.float())
    assert torch.equal(after * scale, before)


def test_values_are_shared_by_neighbouring_query_heads():
    found = channel_map(channels=8, rows=4, head_dim=2)
    assert found.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert per_row(torch.tensor([5.0, 6, 5, 6, 7, 8, 7, 8]), found, 4).tolist() == [5, 6, 7, 8]
    assert channel_map(6, 6, 4).tolist() == list(range(6))
    with pytest.raises(ValueError, match="cannot make"):
        channel_map(10, 4, 2)


def test_every_reader_is_multiplied_in_its_own_dtype(random_model):
    model = random_model("llama").bfloat16()
    tensors = {name: parameter.data for name, parameter in model.model.layers[0].named_parameters()}
    scaling = replace(LLAMA[0], others=("mlp.gate_proj.weight",))
    changed, columns = fold(tensors, scaling, random_powers(64), 16)
    assert set(changed) == {
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "mlp.gate_proj.weight",
    }
    for name, tensor in changed.items():
        assert tensor.dtype == torch.bfloat16
        if name != "input_layernorm.weight":
            assert torch.equal(tensor.float(), tensors[name].float() * columns)


def test_a_block_with_smoothed_inputs_and_the_folded_block_that_is_written_agree(random_model):
    """Stage by stage, as the walk does it: the norm takes any scale, quantized producers powers of two."""
    # a checkpoint in bfloat16, computed with in float32
    model = random_model("llama").bfloat16().float().requires_grad_(False)
    block, rotary = model.model.layers[0], model.model.rotary_emb
    adopt(model)
    stored = {name: parameter.data.bfloat16() for name, parameter in block.named_parameters()}
    done: dict[str, QuantTensor] = {}
    spec = SPECS["int4"]
    for number, scaling in enumerate(LLAMA):
        weight = stored[f"{scaling.producer}.weight"]
        if weight.ndim == 1:
            folded, _, taken = fold_into_norm(weight, None, random_scale(64, seed=number))
            stored[f"{scaling.producer}.weight"] = folded
            scale = taken
        else:
            rows, channels = weight.shape[0], stored[f"{scaling.consumers[0]}.weight"].shape[1]
            folded, _, taken = fold_into_quantized_rows(done[scaling.producer], None, random_powers(rows, number))
            done[scaling.producer] = folded
            scale = taken[channel_map(channels, rows, 16)]
        for reader in scaling.consumers:
            scaled = stored[f"{reader}.weight"].float() * scale
            done[reader] = rtn(scaled, None, spec, spec.scale_format(torch.bfloat16)).weight
            linear = block.get_submodule(reader)
            linear.weight.data = done[reader].dequantize()
            linear.divide(scale)
    hidden = torch.randn(1, 12, 64, generator=seeded())
    positions = rotary(hidden, torch.arange(12).unsqueeze(0))
    with torch.no_grad():
        smoothed = block(hidden, position_embeddings=positions)
        for reader in done:
            block.get_submodule(reader).input_steps = ()
            block.get_submodule(reader).weight.data = done[reader].dequantize()
        for name, tensor in stored.items():
            if name.removesuffix(".weight") not in done:
                block.get_parameter(name).data = tensor.float()
        written = block(hidden, position_embeddings=positions)
    torch.testing.assert_close(written, smoothed, rtol=1e-5, atol=1e-5)


def test_channels_that_a_reader_could_not_store_keep_one(random_model):
    model = random_model("llama").half()
    tensors = {name: parameter.data for name, parameter in model.model.layers[0].named_parameters()}
    tensors["self_attn.k_proj.weight"][3, 5] = 40000.0
    tensors["self_attn.q_proj.weight"][:, 7] *= 1e-4
    wanted = torch.full((64,), 4.0)
    wanted[6:8] = 0.25
    changed, columns = fold(tensors, LLAMA[0], wanted, 16)
    assert columns[5] == columns[7] == 1.0
    assert (columns[torch.arange(64) != 5][:5] > 3).all()
    assert columns[6] < 0.3
    for name, tensor in changed.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor[..., 5], tensors[name][..., 5])


def test_a_norm_whose_bias_could_not_be_stored_keeps_one():
    bias = torch.tensor([1.0, 1e-4, 0.0]).half()
    folded, divided, taken = fold_into_norm(torch.ones(3).half(), bias, torch.full((3,), 16.0))
    assert taken.tolist() == [16.0, 1.0, 16.0]
    assert torch.equal(divided.float() * taken, bias.float())
    assert torch.equal(folded.float() * taken, torch.ones(3))
