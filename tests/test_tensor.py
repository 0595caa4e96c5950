import dataclasses

import pytest
import torch

from fewbit.config.spec import QuantizationSpec
from fewbit.tensor import QuantizedActivation, QuantTensor, after_first_stage, quantize

ROWS, COLUMNS = 6, 40  # 40 codes fill no whole number of words at most widths
FLOATS = ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]
GRANULARITIES = {
    "per_tensor": {"qscheme": "per_tensor"},
    "per_channel": {"qscheme": "per_channel"},
    "columns": {"qscheme": "per_channel", "ch_axis": 1},
    "per_group": {"qscheme": "per_group", "group_size": 8},
    "groups_of_rows": {"qscheme": "per_group", "group_size": 3, "ch_axis": 0},
    "block": {"qscheme": "per_block", "block_size": (2, 20)},
}

every_dtype = pytest.mark.parametrize(
    ("dtype", "symmetric"),
    [(f"int{bits}", symmetric) for bits in range(2, 9) for symmetric in (True, False)]
    + [(f"uint{bits}", False) for bits in range(2, 9)]
    + [(name, True) for name in FLOATS],
)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
SPECIAL = {  # scales that are no plain floats, and codes that need none
    "NVFP4": QuantizationSpec(dtype="e2m1", group_size=8, scale_type="e4m3"),
    "INT4-e4m3-blocks": QuantizationSpec(dtype="int4", qscheme="per_block", block_size=(3, 8), scale_type="e4m3"),
    "MXFP4": QuantizationSpec(dtype="e2m1", group_size=8, scale_type="e8m0"),
    "MXFP6": QuantizationSpec(dtype="e3m2", group_size=8, scale_type="e8m0"),
    "MXFP8": QuantizationSpec(dtype="e4m3", group_size=8, scale_type="e8m0"),
    "MXINT8": QuantizationSpec(dtype="int8", group_size=8, scale_type="e8m0"),
    "BFP16": QuantizationSpec(dtype="bfp16"),
    "pof2": QuantizationSpec(dtype="int4", group_size=8, scale_type="pof2"),
    "pof2-affine": QuantizationSpec(dtype="uint4", group_size=8, scale_type="pof2", symmetric=False),
    "bfloat16": QuantizationSpec(dtype="bfloat16"),
    "float16": QuantizationSpec(dtype="float16"),
    "round": QuantizationSpec(dtype="e2m1", qscheme="per_channel", round_method="round"),
    "floor": QuantizationSpec(dtype="uint4", qscheme="per_channel", round_method="floor", symmetric=False),
    "two-stage": QuantizationSpec(
        dtype="int4", qscheme="per_channel", first_stage=QuantizationSpec(dtype="e4m3", qscheme="per_tensor")
    ),
}
MICRO = {name: QuantizationSpec(dtype=name) for name in ("mx6", "mx9")}  # blocks of 16: 40 columns do not divide
special = pytest.mark.parametrize("name", SPECIAL)


def spec_of(dtype: str = "int4", symmetric: bool = True, granularity: str = "per_group") -> QuantizationSpec:
    return QuantizationSpec(dtype=dtype, symmetric=symmetric, observer="minmax", **GRANULARITIES[granularity])


def random_tensor(spec: QuantizationSpec, scale_dtype: torch.dtype = torch.bfloat16) -> QuantTensor:
    """All codes of finite values may occur, scales have both signs."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        start = int(spec.format.smallest) if spec.format.is_integer else 0
        every = torch.arange(start, start + 2**spec.bits).to(spec.format.code_dtype)
        every = every[spec.format.decode(every).isfinite()]
        return every[torch.randint(len(every), shape, generator=generator)]

    shape = spec.tiling.scale_shape((ROWS, COLUMNS))
    scale = torch.randn(shape, generator=generator).to(scale_dtype)
    return QuantTensor(codes(ROWS, COLUMNS), scale, None if spec.symmetric else codes(*shape), spec)


def quantized(spec: QuantizationSpec, rows: int = ROWS, columns: int = COLUMNS) -> QuantTensor:
    """A random weight on the grid that the spec's observer finds."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    format = spec.scale_format(torch.bfloat16, spec.global_scale(weight))
    return quantize(weight, spec, format, *spec.grid_rule(format).find(spec.tiling.split(weight)))


def assert_same(one: QuantTensor, other: QuantTensor) -> None:
    assert one.spec == other.spec
    assert one.global_scale == other.global_scale
    for field in ("codes", "scale", "zero_point"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.float(), b.float())


@every_dtype
@every_granularity
@every_scale_dtype
def test_what_is_stored_reads_back_exactly(dtype, symmetric, granularity, scale_dtype):
    tensor = random_tensor(spec_of(dtype, symmetric, granularity), scale_dtype)
    stored = tensor.to_tensors()
    assert set(stored) == {"codes", "scale"} | (set() if symmetric else {"zero_point"})
    assert set(stored) == set(QuantTensor.stored_names(tensor.spec))
    assert stored["codes"].dtype == torch.int32
    assert_same(QuantTensor.from_tensors(stored, tensor.spec, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("name", [*SPECIAL, *MICRO])
def test_special_scales_read_back_exactly(name):
    tensor = quantized((SPECIAL | MICRO)[name], columns=48 if name in MICRO else COLUMNS)
    stored = tensor.to_tensors()
    assert set(stored) == set(QuantTensor.stored_names(tensor.spec))
    assert ("global_scale" in stored) == (tensor.spec.scale_type == "e4m3")
    assert stored["scale"].dtype == tensor.spec.stored_scale_dtype(torch.bfloat16)
    again = QuantTensor.from_tensors(stored, tensor.spec, tuple(tensor.shape))
    assert_same(again, tensor)
    assert torch.equal(again.dequantize(), tensor.dequantize())


@every_dtype
@every_granularity
def test_each_element_is_code_minus_zero_point_times_scale(dtype, symmetric, granularity):
    tensor = random_tensor(spec_of(dtype, symmetric, granularity))
    scale_rows, scale_columns = tensor.scale.shape
    levels = tensor.spec.format.decode(tensor.codes, torch.float64)
    by_hand = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(COLUMNS):
            tile = row * scale_rows // ROWS, column * scale_columns // COLUMNS
            zero = 0 if symmetric else tensor.zero_point[tile].item()
            by_hand[row, column] = (levels[row, column].item() - zero) * tensor.scale[tile].item()
    # 9 bits of code times 8 bits of scale are exact in float32: the only rounding is the one to the dtype asked for
    for out_dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        values = tensor.dequantize(out_dtype)
        assert values.dtype == out_dtype
        assert torch.equal(values, by_hand.to(out_dtype))


def test_the_global_scale_multiplies_every_scale():
    tensor = quantized(SPECIAL["NVFP4"])
    assert tensor.global_scale < 1
    levels = tensor.spec.format.decode(tensor.codes).unflatten(-1, (-1, 8))
    by_hand = levels * (tensor.scale.float() * tensor.global_scale).unsqueeze(-1)
    assert torch.equal(tensor.dequantize(), by_hand.flatten(1))
    assert torch.equal(tensor.scale_value, tensor.scale.float() * tensor.global_scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_torchs(dtype):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    tensor = quantized(SPECIAL[dtype])
    assert torch.equal(tensor.codes, weight.to(getattr(torch, dtype)))
    assert torch.equal(tensor.dequantize(), weight.to(getattr(torch, dtype)).float())
    assert tensor.bits_per_weight == 16


@every_dtype
def test_unsigned_codes_start_at_zero_and_keep_their_distance_to_the_zero_point(dtype, symmetric):
    tensor = random_tensor(spec_of(dtype, symmetric))
    unsigned = tensor.unsigned_codes()
    assert unsigned.dtype == torch.uint8
    offset = int(tensor.spec.format.smallest) if tensor.spec.format.is_integer else 0
    assert torch.equal(unsigned.int(), tensor.codes.int() - offset)
    zero = tensor.unsigned_zero_point()
    if symmetric:
        assert zero is None
    else:
        assert torch.equal(zero.int() - unsigned[:, ::8].int(), tensor.zero_point.int() - tensor.codes[:, ::8].int())


@every_dtype
@every_granularity
def test_quantize_puts_values_of_the_grid_back_on_their_codes(dtype, symmetric, granularity):
    tensor = random_tensor(spec_of(dtype, symmetric, granularity))
    again = quantize(tensor.dequantize(), tensor.spec, tensor.scale_format, tensor.scale, tensor.zero_point)
    if tensor.spec.format.is_integer:
        assert_same(again, tensor)
    else:  # two codes of a float stand for zero
        assert torch.equal(again.dequantize(), tensor.dequantize())


@special
def test_what_was_quantized_once_stays_as_it_is(name):
    tensor = quantized(dataclasses.replace(SPECIAL[name], round_method="half_even"))
    again = quantize(tensor.dequantize(), tensor.spec, tensor.scale_format, tensor.scale, tensor.zero_point)
    assert torch.equal(again.dequantize(), tensor.dequantize())


@every_granularity
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_is_off_by_at_most_half_a_step_within_the_grid(granularity, symmetric):
    spec = spec_of("int4", symmetric, granularity)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    format = spec.scale_format(torch.float32)
    scale, zero = spec.grid_rule(format).find(spec.tiling.split(weight))
    error = (quantize(weight, spec, format, scale, zero).dequantize() - weight).abs()
    tiles = scale.abs().unsqueeze(-1).expand_as(spec.tiling.split(weight))
    # affine: rounding the zero point may push an end of the range half a step beyond the grid
    bound = (0.5 if symmetric else 1.0) * spec.tiling.merge(tiles, ROWS, COLUMNS)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_floor_never_gives_more_than_there_was(granularity):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    for dtype, symmetric in (("int4", True), ("uint4", False), ("e2m1", True)):
        spec = dataclasses.replace(spec_of(dtype, symmetric, granularity), round_method="floor")
        format = spec.scale_format(torch.float32)
        scale, zero = spec.grid_rule(format).find(spec.tiling.split(weight))
        values = quantize(weight, spec, format, scale, zero).dequantize()
        lowest = spec.tiling.split(values).amin(-1, keepdim=True)  # what lies below the grid cannot go down
        inside = spec.tiling.split(weight) >= lowest
        assert (spec.tiling.split(values - weight)[inside] <= 1e-6).all()
        assert inside.float().mean() > 0.9


@pytest.mark.parametrize("name", ["per_channel", "per_group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_the_rows(name, symmetric):
    tensor = random_tensor(spec_of("int4", symmetric, name))
    some = tensor.rows(slice(2, 5))
    assert torch.equal(some.dequantize(), tensor.dequantize()[2:5])
    assert some.codes.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "symmetric", "granularity", "scale_dtype", "bits"),
    [
        ("int4", True, "per_group", torch.bfloat16, 4 + 16 / 8),
        ("int4", True, "per_group", torch.float32, 4 + 32 / 8),
        ("uint4", False, "per_group", torch.float16, 4 + (16 + 4) / 8),
        ("uint3", False, "per_channel", torch.bfloat16, 3 + (16 + 3) / COLUMNS),
        ("int8", True, "per_channel", torch.bfloat16, 8 + 16 / COLUMNS),
        ("int2", True, "per_tensor", torch.float32, 2 + 32 / (ROWS * COLUMNS)),
        ("e4m3", True, "block", torch.float32, 8 + 32 / 40),
        ("e3m2", True, "columns", torch.bfloat16, 6 + 16 / ROWS),
    ],
)
def test_bits_per_weight_count_codes_scales_and_zero_points(dtype, symmetric, granularity, scale_dtype, bits):
    tensor = random_tensor(spec_of(dtype, symmetric, granularity), scale_dtype)
    assert tensor.bits_per_weight == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("NVFP4", 4 + 8 / 8 + 32 / (ROWS * COLUMNS)), ("MXFP6", 6 + 8 / 8), ("mx6", 6.0), ("mx9", 9.0), ("BFP16", 9.0)],
)
def test_bits_per_weight_of_block_formats_are_those_of_the_format(name, bits):
    tensor = quantized((SPECIAL | MICRO)[name], columns=48 if name in MICRO else COLUMNS)
    assert tensor.bits_per_weight == pytest.approx(bits, rel=1e-12)


class TestValidation:
    affine = random_tensor(spec_of("int4", False))
    symmetric = random_tensor(spec_of("int4", True))

    @pytest.mark.parametrize("shape", [(ROWS, 4), (ROWS, 1), (1, 5), (ROWS,), (ROWS * 5,)])
    def test_scales_must_have_the_shape_that_the_spec_says(self, shape):
        with pytest.raises(ValueError, match=rf"scale has shape .*, the spec says \({ROWS}, 5\)"):
            dataclasses.replace(self.symmetric, scale=torch.ones(shape))

    def test_groups_must_divide_the_matrix(self):
        with pytest.raises(ValueError, match="do not divide"):
            dataclasses.replace(self.symmetric, codes=torch.zeros(ROWS, COLUMNS + 1, dtype=torch.int8))

    def test_an_affine_tensor_needs_a_zero_point(self):
        with pytest.raises(ValueError, match="zero point"):
            dataclasses.replace(self.affine, zero_point=None)

    def test_a_symmetric_tensor_has_none(self):
        with pytest.raises(ValueError, match="zero point"):
            dataclasses.replace(self.symmetric, zero_point=self.affine.zero_point)

    def test_zero_points_have_the_shape_of_the_scales(self):
        with pytest.raises(ValueError, match="zero point has shape"):
            dataclasses.replace(self.affine, zero_point=self.affine.zero_point[:, :1])

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
    def test_codes_have_the_formats_dtype(self, dtype):
        with pytest.raises(ValueError, match=r"codes of int4 are torch\.int8"):
            dataclasses.replace(self.symmetric, codes=self.symmetric.codes.to(dtype))

    def test_packed_codes_of_another_shape_are_refused(self):
        with pytest.raises(ValueError, match="words"):
            QuantTensor.from_tensors(self.symmetric.to_tensors(), self.symmetric.spec, (ROWS, 2 * COLUMNS))

    def test_only_two_level_scales_have_a_global_scale(self):
        with pytest.raises(ValueError, match="scales of type float have no global scale"):
            dataclasses.replace(self.symmetric, global_scale=0.5)

    def test_it_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.symmetric.scale = self.affine.scale


class TestActivation:
    STATIC = QuantizationSpec(dtype="uint8", qscheme="per_tensor", symmetric=False, observer="minmax")
    NVFP4 = QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3", observer="minmax", is_dynamic=True)

    @pytest.mark.parametrize(
        "activation",
        [
            QuantizedActivation(STATIC, torch.tensor([[0.25]]), torch.tensor([[3]], dtype=torch.uint8)),
            QuantizedActivation(dataclasses.replace(STATIC, is_dynamic=True)),
            QuantizedActivation(NVFP4, global_scale=2.0**-9),
            QuantizedActivation(QuantizationSpec(dtype="float16")),
        ],
        ids=["static", "dynamic", "global-scale", "cast"],
    )
    def test_what_is_stored_reads_back_exactly(self, activation):
        stored = activation.to_tensors()
        again = QuantizedActivation.from_tensors(stored, activation.spec)
        assert again.spec == activation.spec
        assert again.global_scale == activation.global_scale
        for field in ("scale", "zero_point"):
            a, b = getattr(again, field), getattr(activation, field)
            assert (a is None) == (b is None) == (field not in stored)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("name", ["per_channel", "block", "NVFP4", "MXFP8", "affine"])
def test_some_rows_of_another_tensor_take_the_place_of_ours(name):
    spec = SPECIAL.get(name) or QuantizationSpec(
        dtype="uint4", symmetric=False, **GRANULARITIES.get(name, {"group_size": 8})
    )
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        quantize(w, spec, f := spec.scale_format(torch.bfloat16), *spec.grid_rule(f).find(spec.tiling.split(w)))
        for w in torch.randn(2, ROWS, COLUMNS, generator=generator)
    )
    rows = torch.tensor([False, False, True, True, False, False])  # whole tiles of the block
    mixed, before = ours.with_rows(rows, theirs), ours.dequantize()
    assert torch.equal(mixed.dequantize(), torch.where(rows.unsqueeze(1), theirs.dequantize(), before))
    assert torch.equal(ours.dequantize(), before)


def test_a_first_stage_has_the_global_scale_of_its_weight():
    weight = 1e6 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    first = QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3")
    two = QuantizationSpec(dtype="int4", group_size=32, first_stage=first)
    rounded = after_first_stage(weight, two, torch.bfloat16)
    assert float((rounded - weight).square().sum()) < 0.02 * float(weight.square().sum())
    assert after_first_stage(weight, first, torch.bfloat16) is weight
