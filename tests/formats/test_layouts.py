"""A weight of every format, as the library's own decompressors and unpackers with Python's integers read it."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from native_runs import SCHEMES, quantized

from fewbit.config.spec import QuantizationSpec
from fewbit.contents import nominal
from fewbit.errors import CheckpointError, ConfigError
from fewbit.formats.compressed_tensors.config import group_entry
from fewbit.formats.compressed_tensors.layouts import LAYOUTS
from fewbit.formats.compressed_tensors.scheme import layout_for
from fewbit.tensor import QuantTensor

BITS = range(2, 9)


def random_matrix(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def encoded(name, weight):
    layout, config = SCHEMES[name]
    made = quantized(weight, config.weight)
    return made, LAYOUTS[layout].encode(made)


def linear_of(config):
    return nominal(config).linears["m"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_decompresses_to_exactly_the_dequantized_weight(name, dtype):
    """Exactly: it rounds once, to the scales' dtype (float scales) or to bfloat16, which holds FP4, NVFP4 and MX."""
    layout, config = SCHEMES[name]
    made, tensors = encoded(name, random_matrix(64, 96, dtype))
    scheme = QuantizationScheme(targets=["Linear"], **group_entry(linear_of(config)))
    weight = BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]
    assert weight.dtype == (dtype if made.spec.scale_type in ("float", "pof2") else torch.bfloat16)
    assert torch.equal(weight, made.dequantize(weight.dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_compresses_the_dequantized_weight_to_the_same_tensors(name):
    """Codes are on the grid, so the library's own compressor finds them again (negative zeros become zeros)."""
    layout, config = SCHEMES[name]
    made, tensors = encoded(name, random_matrix(64, 96))
    if made.spec.format.kind == "float":
        sign = 1 << (made.spec.bits - 1)
        made = replace(made, codes=torch.where(made.codes == sign, 0, made.codes))
        tensors = LAYOUTS[layout].encode(made)
    scheme = QuantizationScheme(targets=["Linear"], **group_entry(linear_of(config)))
    dense = {"weight": made.dequantize(), "weight_scale": made.scale.float()}
    if made.spec.qscheme == "per_tensor":
        dense["weight_scale"] = dense["weight_scale"].reshape(1)
    if made.zero_point is not None:
        dense["weight_zero_point"] = (made.zero_point.to(torch.int16) - 2 ** (made.spec.bits - 1)).to(torch.int8)
    if made.spec.scale_type == "e4m3":
        dense["weight_global_scale"] = tensors["weight_global_scale"]
    found = BaseCompressor.get_value_from_registry(layout).compress(dense, scheme)
    assert set(found) == set(tensors)
    for part, tensor in tensors.items():
        assert found[part].dtype == tensor.dtype or part == "weight_scale"
        assert torch.equal(found[part].float(), tensor.float()), part


@pytest.mark.parametrize("name", SCHEMES)
def test_decode_undoes_encode(name):
    layout, config = SCHEMES[name]
    made, tensors = encoded(name, random_matrix(64, 96, torch.bfloat16))
    assert layout_for(config.weight, config.input_tensors).name == layout
    assert set(tensors) == set(LAYOUTS[layout].needed(made.spec.symmetric))
    back = LAYOUTS[layout].decode(tensors, made.spec)
    assert torch.equal(back.codes, made.codes)
    assert back.scale.dtype == made.scale.dtype
    assert torch.equal(back.scale.float(), made.scale.float())
    assert made.zero_point is None or torch.equal(back.zero_point, made.zero_point)
    assert back.global_scale == made.global_scale


def test_blocks_at_the_edges_may_be_partial():
    layout, config = SCHEMES["FP8_BLOCK"]  # blocks of 32 × 32
    made, tensors = encoded("FP8_BLOCK", random_matrix(80, 100))
    assert tensors["weight_scale"].shape == (3, 4)
    scheme = QuantizationScheme(targets=["Linear"], **group_entry(linear_of(config)))
    weight = BaseCompressor.get_value_from_registry(layout).decompress(tensors, scheme)["weight"]
    assert torch.equal(weight, made.dequantize())
    assert torch.equal(LAYOUTS[layout].decode(tensors, made.spec).dequantize(), weight)


def spec_of(bits, symmetric, group_size):
    return QuantizationSpec(
        dtype=f"int{bits}" if symmetric else f"uint{bits}",
        qscheme="per_channel" if group_size is None else "per_group",
        group_size=group_size,
        symmetric=symmetric,
    )


def random_integers(spec, rows, columns):
    """Every code of the format appears; some scales are negative."""
    generator = torch.Generator().manual_seed(0)
    low, high = int(spec.format.smallest), int(spec.format.largest)

    def integers(*shape):
        return torch.randint(low, high + 1, shape, generator=generator).to(spec.format.code_dtype)

    groups = columns // (spec.group_size or columns)
    scale = torch.randn(rows, groups, generator=generator)
    return QuantTensor(integers(rows, columns), scale, None if spec.symmetric else integers(rows, groups), spec)


def unpacked(words, bits, length, word_bytes=4):
    """Numbers of `bits` bits out of the words of one row, with nothing but Python's integers."""
    mask = (1 << 8 * word_bytes) - 1
    stream = int.from_bytes(b"".join((word & mask).to_bytes(word_bytes, "little") for word in words), "little")
    assert stream >> (length * bits) == 0  # the rest of the last word is empty
    return [(stream >> (position * bits)) & (2**bits - 1) for position in range(length)]


@pytest.mark.parametrize("shape", [(32, 96), (7, 24)])  # 24 codes of 3 bits do not fill whole words; neither do 7 rows
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_an_independent_unpacker_finds_packed_integers(bits, symmetric, group_size, shape):
    weight = random_integers(spec_of(bits, symmetric, group_size), *shape)
    tensors = LAYOUTS["pack-quantized"].encode(weight)
    rows, columns = shape
    offset = 2 ** (bits - 1) if symmetric else 0
    words = tensors["weight_packed"].tolist()
    assert [[code - offset for code in unpacked(row, bits, columns)] for row in words] == weight.codes.tolist()
    assert tensors["weight_shape"].tolist() == [rows, columns]
    assert torch.equal(tensors["weight_scale"], weight.scale)
    assert ("weight_zero_point" in tensors) == (not symmetric)
    if not symmetric:
        packed_along_rows = tensors["weight_zero_point"].T.tolist()
        assert [unpacked(column, bits, rows) for column in packed_along_rows] == weight.zero_point.T.tolist()
    back = LAYOUTS["pack-quantized"].decode(tensors, weight.spec)
    assert torch.equal(back.codes, weight.codes)
    assert symmetric or torch.equal(back.zero_point, weight.zero_point)


@pytest.mark.parametrize(("name", "bits"), [("NVFP4", 4), ("MXFP4", 4), ("MXFP6", 6)])
def test_an_independent_unpacker_finds_packed_floats(name, bits):
    layout, config = SCHEMES[name]
    spec, columns = config.weight, 96
    codes = torch.arange(2 * columns).view(2, columns).remainder(2**bits).to(torch.uint8)  # every code
    scale = torch.ones(spec.tiling.scale_shape((2, columns))).to(spec.stored_scale_dtype(torch.float32))
    packed = LAYOUTS[layout].encode(QuantTensor(codes, scale, None, spec))["weight_packed"]
    assert packed.dtype == torch.uint8
    assert [unpacked(row, bits, columns, word_bytes=1) for row in packed.tolist()] == codes.tolist()


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bit_integers_that_others_store_in_bytes_are_read(symmetric):
    spec = spec_of(4, symmetric, 8)
    weight = random_integers(spec, 6, 24)
    tensors = LAYOUTS["int-quantized"].encode(weight)
    assert tensors["weight"].aminmax() == (-8, 7)  # the library counts from −8 for affine weights, too
    back = LAYOUTS["int-quantized"].decode(tensors, spec)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize("exponent", [-100, -7, 0, 3, 40, 126])
def test_the_global_scale_is_the_exact_reciprocal(exponent):
    spec = SCHEMES["NVFP4A16"][1].weight
    codes, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2).to(torch.float8_e4m3fn)
    tensors = LAYOUTS["nvfp4-pack-quantized"].encode(QuantTensor(codes, scale, None, spec, 2.0**exponent))
    assert tensors["weight_global_scale"].dtype == torch.float32
    assert float(tensors["weight_global_scale"]) * 2.0**exponent == 1.0
    assert LAYOUTS["nvfp4-pack-quantized"].decode(tensors, spec).global_scale == 2.0**exponent


def test_negative_nvfp4_scales_are_refused():
    spec = SCHEMES["NVFP4A16"][1].weight
    scale = torch.tensor([[1.0, -1.0]]).to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="no negative scales"):
        LAYOUTS["nvfp4-pack-quantized"].encode(QuantTensor(torch.zeros(1, 32, dtype=torch.uint8), scale, None, spec))


def test_scales_that_do_not_fit_the_weight_are_refused():
    made, tensors = encoded("W4A16", random_matrix(64, 96))
    tensors["weight_scale"] = tensors["weight_scale"][:, :2]
    with pytest.raises(CheckpointError, match="does not fit"):
        LAYOUTS["pack-quantized"].decode(tensors, made.spec)
