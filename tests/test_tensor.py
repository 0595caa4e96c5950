import dataclasses

import pytest
import torch

from fewbit.config.spec import QuantizationSpec
from fewbit.numerics import scales
from fewbit.tensor import QuantTensor, quantize

ROWS, COLUMNS = 6, 40  # 40 codes fill no whole number of words at most widths
GRANULARITIES = {"per_tensor": None, "per_channel": None, "per_group": 8}

every_dtype = pytest.mark.parametrize(
    ("dtype", "symmetric"),
    [(f"int{bits}", symmetric) for bits in range(2, 9) for symmetric in (True, False)]
    + [(f"uint{bits}", False) for bits in range(2, 9)],
)
every_scheme = pytest.mark.parametrize("qscheme", GRANULARITIES)
every_scale_dtype = pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def spec_of(dtype: str = "int4", symmetric: bool = True, qscheme: str = "per_group") -> QuantizationSpec:
    return QuantizationSpec(
        dtype=dtype, qscheme=qscheme, group_size=GRANULARITIES[qscheme], symmetric=symmetric, observer="minmax"
    )


def random_tensor(spec: QuantizationSpec, scale_dtype: torch.dtype = torch.bfloat16) -> QuantTensor:
    """All codes may occur, scales have both signs."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        smallest, largest = int(spec.format.smallest), int(spec.format.largest)
        return torch.randint(smallest, largest + 1, shape, generator=generator).to(spec.format.code_dtype)

    shape = spec.tiling.scale_shape((ROWS, COLUMNS))
    scale = torch.randn(shape, generator=generator).to(scale_dtype)
    return QuantTensor(codes(ROWS, COLUMNS), scale, None if spec.symmetric else codes(*shape), spec)


def assert_same(one: QuantTensor, other: QuantTensor) -> None:
    assert one.spec == other.spec
    for field in ("codes", "scale", "zero_point"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@every_dtype
@every_scheme
@every_scale_dtype
def test_what_is_stored_reads_back_exactly(dtype, symmetric, qscheme, scale_dtype):
    tensor = random_tensor(spec_of(dtype, symmetric, qscheme), scale_dtype)
    stored = tensor.to_tensors()
    assert set(stored) == {"codes", "scale"} | (set() if symmetric else {"zero_point"})
    assert stored["codes"].dtype == torch.int32
    assert_same(QuantTensor.from_tensors(stored, tensor.spec, tuple(tensor.shape)), tensor)


@every_dtype
@every_scheme
def test_each_element_is_code_minus_zero_point_times_scale(dtype, symmetric, qscheme):
    tensor = random_tensor(spec_of(dtype, symmetric, qscheme))
    scale_rows, scale_columns = tensor.scale.shape
    by_hand = torch.empty(ROWS, COLUMNS, dtype=torch.float64)
    for row in range(ROWS):
        for column in range(COLUMNS):
            tile = row * scale_rows // ROWS, column * scale_columns // COLUMNS
            zero = 0 if symmetric else tensor.zero_point[tile].item()
            by_hand[row, column] = (tensor.codes[row, column].item() - zero) * tensor.scale[tile].item()
    # 9 bits of code times 8 bits of scale are exact in float32: the only rounding is the one to the dtype asked for
    for out_dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        values = tensor.dequantize(out_dtype)
        assert values.dtype == out_dtype
        assert torch.equal(values, by_hand.to(out_dtype))


@every_dtype
def test_unsigned_codes_start_at_zero_and_keep_their_distance_to_the_zero_point(dtype, symmetric):
    tensor = random_tensor(spec_of(dtype, symmetric))
    unsigned = tensor.unsigned_codes()
    assert unsigned.dtype == torch.uint8
    assert torch.equal(unsigned.int(), tensor.codes.int() - int(tensor.spec.format.smallest))
    zero = tensor.unsigned_zero_point()
    if symmetric:
        assert zero is None
    else:
        assert torch.equal(zero.int() - unsigned[:, ::8].int(), tensor.zero_point.int() - tensor.codes[:, ::8].int())


@every_dtype
@every_scheme
def test_quantize_puts_values_of_the_grid_back_on_their_codes(dtype, symmetric, qscheme):
    tensor = random_tensor(spec_of(dtype, symmetric, qscheme))
    again = quantize(tensor.dequantize(), tensor.spec, tensor.scale, tensor.zero_point)
    assert_same(again, tensor)


@every_scheme
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_is_off_by_at_most_half_a_step_within_the_grid(qscheme, symmetric):
    spec = spec_of("int4", symmetric, qscheme)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    scale, zero = scales.find_scale(
        spec.tiling.split(weight), spec.format, torch.float32, rule="minmax", symmetric=symmetric
    )
    error = (quantize(weight, spec, scale, zero).dequantize() - weight).abs()
    # affine: rounding the zero point may push an end of the range half a step beyond the grid
    bound = (0.5 if symmetric else 1.0) * spec.tiling.expand(scale.abs(), ROWS, COLUMNS)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("dtype", "symmetric", "qscheme", "scale_dtype", "bits"),
    [
        ("int4", True, "per_group", torch.bfloat16, 4 + 16 / 8),
        ("int4", True, "per_group", torch.float32, 4 + 32 / 8),
        ("uint4", False, "per_group", torch.float16, 4 + (16 + 4) / 8),
        ("uint3", False, "per_channel", torch.bfloat16, 3 + (16 + 3) / COLUMNS),
        ("int8", True, "per_channel", torch.bfloat16, 8 + 16 / COLUMNS),
        ("int2", True, "per_tensor", torch.float32, 2 + 32 / (ROWS * COLUMNS)),
    ],
)
def test_bits_per_weight_count_codes_scales_and_zero_points(dtype, symmetric, qscheme, scale_dtype, bits):
    tensor = random_tensor(spec_of(dtype, symmetric, qscheme), scale_dtype)
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

    def test_it_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.symmetric.scale = self.affine.scale
