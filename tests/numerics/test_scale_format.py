"""What a wanted scale becomes when it is stored, against plain Python arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.numerics.formats import FORMATS
from fewbit.numerics.scale_format import (
    E4M3,
    E8M0,
    PAIRS,
    SCALE_TYPES,
    Float,
    Microexponent,
    PowerOfTwo,
    block_exponent_scale,
    nearest_power_of_two,
)

FLOAT_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8, EXPONENT = torch.float8_e4m3fn, torch.float8_e8m0fnu
SCALE_FORMATS = [
    *(scale_type(dtype) for scale_type in (Float, PowerOfTwo) for dtype in FLOAT_DTYPES),
    E4M3(FLOAT8),
    E4M3(FLOAT8, 2.0**-7),
    E8M0(EXPONENT),
    Microexponent(EXPONENT),
]
every_format = pytest.mark.parametrize(
    "format", SCALE_FORMATS, ids=lambda format: f"{format.name}-{str(format.dtype).removeprefix('torch.')}"
)
power_of_two = pytest.mark.parametrize(
    "format", [format for format in SCALE_FORMATS if format.is_power_of_two], ids=lambda format: format.name
)
ELEMENTS = ["int4", "int8", "e4m3", "e5m2", "e3m2", "e2m3", "e2m1"]


def wanted(rows: int = 40, columns: int = 4 * PAIRS) -> torch.Tensor:
    """Scales of many sizes, with zeros among them, a row of zeros, and a whole block of them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.empty(rows, columns).uniform_(-12, 4, generator=generator))
    scale[torch.rand(rows, columns, generator=generator) < 0.2] = 0
    scale[3] = 0
    scale[5, :PAIRS] = 0
    return scale


def is_power_of_two(x: torch.Tensor) -> torch.Tensor:
    return torch.frexp(x).mantissa.abs() == 0.5


@every_format
class TestEveryScaleFormat:
    def test_storing_what_was_stored_changes_nothing(self, format):
        stored = format.store(wanted())
        again = format.store(format.value(stored))
        assert stored.dtype == again.dtype == format.dtype
        assert torch.equal(again.float(), stored.float())

    def test_no_stored_scale_is_zero(self, format):
        assert (format.store(wanted()).float() > 0).all()
        assert (format.store(wanted() * 2.0**-140).float() > 0).all()

    def test_where_nothing_is_to_be_scaled_the_scale_is_one_or_the_smallest_of_e4m3(self, format):
        stored = format.store(torch.zeros(2, PAIRS)).float()
        assert (stored == (2.0**-9 if format.name == "e4m3" else 1.0)).all()

    def test_value_is_stored_times_global_scale_in_float32(self, format):
        stored = format.store(wanted())
        assert format.value(stored).dtype == torch.float32
        assert torch.equal(format.value(stored), stored.float() * format.global_scale)

    def test_round_is_the_value_of_what_is_stored(self, format):
        assert torch.equal(format.round(wanted()), format.value(format.store(wanted())))

    def test_the_argument_is_left_alone(self, format):
        scale = wanted()
        format.store(scale)
        assert torch.equal(scale, wanted())

    def test_a_sign_is_kept_exactly_where_the_format_has_one(self, format):
        stored = format.store(-wanted())
        negative = (stored.float() < 0)[wanted() > 0]
        assert bool(negative.all()) == bool(negative.any()) == format.may_be_negative


class TestFloat:
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_scales_are_rounded_to_the_dtype(self, dtype):
        scale = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Float(dtype).store(scale), scale.to(dtype))


@power_of_two
def test_scales_are_powers_of_two(format):
    assert is_power_of_two(format.value(format.store(wanted()))).all()


class TestNearestPowerOfTwo:
    def test_no_other_power_has_a_nearer_logarithm(self):
        x = torch.exp2(torch.linspace(-20, 20, 10_001))
        power = nearest_power_of_two(x)
        assert is_power_of_two(power).all()
        assert ((power.double().log2() - x.double().log2()).abs() <= 0.5 + 1e-6).all()

    @pytest.mark.parametrize(("x", "power"), [(1.0, 1.0), (1.414, 1.0), (1.4143, 2.0), (3.0, 4.0), (0.7, 0.5)])
    def test_by_hand(self, x, power):
        assert nearest_power_of_two(torch.tensor([x, -x])).tolist() == [power, -power]

    def test_zero_stays_zero_and_the_ends_saturate(self):
        found = nearest_power_of_two(torch.tensor([0.0, 2.0**-140, 1.9 * 2.0**127]))
        assert found.tolist() == [0.0, 2.0**-126, 2.0**127]


@pytest.mark.parametrize("kind", ["e8m0", "microexponent"])
def test_bytes_reach_down_to_their_smallest_exponent(kind):
    format = SCALE_TYPES[kind](EXPONENT)
    scale = torch.full((1, PAIRS), 2.0**-127)
    assert format.store(scale).view(torch.uint8).tolist() == [[0] * PAIRS]
    assert torch.equal(format.round(scale), scale)
    assert torch.equal(format.round(scale / 4), scale)


class TestE4M3:
    def test_scales_are_the_nearest_codes_times_the_global_scale(self):
        global_scale = 2.0**-7
        x = torch.exp2(torch.linspace(-9, 8.8, 5000)) * global_scale
        stored = E4M3(FLOAT8, global_scale).store(x)
        assert torch.equal(stored.view(torch.uint8), (x / global_scale).to(FLOAT8).view(torch.uint8))

    def test_both_ends_saturate(self):
        stored = E4M3(FLOAT8).store(torch.tensor([1e-9, 1e9, -3.0]))
        assert stored.float().tolist() == [2.0**-9, 448.0, 2.0**-9]

    @given(st.floats(1e-20, 1e20), st.sampled_from(["e2m1", "int4", "e4m3"]))
    @settings(max_examples=100, deadline=None)
    def test_the_global_scale_is_the_smallest_power_of_two_that_covers(self, magnitude, name):
        fmt = FORMATS[name]
        global_scale = E4M3.global_scale_for(magnitude, fmt)
        assert math.frexp(global_scale)[0] == 0.5
        assert magnitude <= global_scale * 448 * fmt.largest * (1 + 1e-15)
        assert magnitude > global_scale / 2 * 448 * fmt.largest * (1 - 1e-15)

    @pytest.mark.parametrize("magnitude", [0.0, math.nan, math.inf])
    def test_a_tensor_that_nothing_can_be_said_about_has_the_global_scale_one(self, magnitude):
        assert E4M3.global_scale_for(magnitude, FORMATS["e2m1"]) == 1.0

    def test_the_global_scale_of_what_just_fits_is_one(self):
        assert E4M3.global_scale_for(448.0 * 6, FORMATS["e2m1"]) == 1.0
        assert E4M3.global_scale_for(math.nextafter(448.0 * 6, math.inf), FORMATS["e2m1"]) == 2.0


class TestMicroexponents:
    format = Microexponent(EXPONENT)

    def test_no_pair_is_more_than_a_bit_below_the_largest_of_its_block(self):
        stored = self.format.store(wanted()).float().unflatten(-1, (-1, PAIRS))
        largest = stored.amax(-1, keepdim=True)
        assert ((stored == largest) | (stored == largest / 2)).all()

    def test_no_pair_gets_a_smaller_scale_than_it_wants_and_the_largest_gets_just_that(self):
        want = nearest_power_of_two(wanted())
        stored = self.format.store(want).float()
        assert (stored >= want).all()
        blocks, stored = want.unflatten(-1, (-1, PAIRS)), stored.unflatten(-1, (-1, PAIRS))
        some = blocks.amax(-1) > 0
        assert torch.equal(stored.amax(-1)[some], blocks.amax(-1)[some])

    def test_a_pair_of_zeros_lifts_no_other_pair(self):
        want = torch.tensor([[0.0, 2.0**-10, 2.0**-11, 2.0**-15, 0.0, 2.0**-10, 2.0**-10, 2.0**-12]])
        low, high = 2.0**-11, 2.0**-10
        assert self.format.store(want).float().tolist() == [[low, high, low, low, low, high, high, low]]

    def test_pairs_that_fill_no_block_are_refused(self):
        with pytest.raises(ValueError, match="12 pairs do not divide into microexponent blocks of 8"):
            self.format.store(torch.ones(2, 12))


def exponent_by_hand(amax: float, name: str, mode: str) -> int:
    """The exponent of a block, in exact rational arithmetic."""
    fmt = FORMATS[name]
    emax = math.floor(math.log2(fmt.largest))
    exact = Fraction(amax)
    floor = math.frexp(amax)[1] - 1
    assert Fraction(2) ** floor <= exact < Fraction(2) ** (floor + 1)
    if mode == "floor":
        return floor - emax
    if mode == "ceil":
        return floor - emax if exact == Fraction(2) ** floor else floor + 1 - emax
    if mode == "rceil":
        return next(e for e in range(floor - emax - 2, floor + 2) if exact <= Fraction(fmt.largest) * Fraction(2) ** e)
    mantissa_bits = fmt.bits - 2 if fmt.is_integer else fmt.mantissa_bits
    steps = math.floor(exact / Fraction(2) ** floor * 2**mantissa_bits + Fraction(1, 2))  # in [1, 2], half goes up
    return floor + (steps >= 2 ** (mantissa_bits + 1)) - emax


def magnitudes(name: str) -> torch.Tensor:
    """Of all sizes, and each side of every point where a mode may change its mind."""
    generator = torch.Generator().manual_seed(0)
    random = torch.exp2(torch.empty(500).uniform_(-30, 30, generator=generator))
    fmt = FORMATS[name]
    edges = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.9921875, fmt.largest, -fmt.smallest, fmt.largest + 1])
    edges = torch.cat([edges * 2.0**power for power in (-20, -1, 0, 13)])
    infinite = torch.tensor(torch.inf)
    return torch.cat([random, edges, edges.nextafter(infinite), edges.nextafter(-infinite)])


@pytest.mark.parametrize("name", ELEMENTS)
class TestBlockExponents:
    @pytest.mark.parametrize("mode", ["floor", "ceil", "rceil", "even"])
    def test_each_mode_is_its_definition(self, name, mode):
        amax = magnitudes(name)
        scale = block_exponent_scale(amax, FORMATS[name], mode)
        by_hand = [2.0 ** exponent_by_hand(value, name, mode) for value in amax.tolist()]
        assert scale.tolist() == by_hand

    def test_rceil_never_saturates_and_half_of_it_would(self, name):
        amax, largest = magnitudes(name).double(), FORMATS[name].largest
        scale = block_exponent_scale(amax.float(), FORMATS[name], "rceil").double()
        assert (amax <= scale * largest).all()
        assert (amax > scale / 2 * largest).all()

    def test_ceil_is_floor_or_twice_floor(self, name):
        amax = magnitudes(name)
        floor, ceil = (block_exponent_scale(amax, FORMATS[name], mode) for mode in ("floor", "ceil"))
        assert torch.equal(ceil, torch.where(is_power_of_two(amax), floor, 2 * floor))

    @pytest.mark.parametrize("mode", ["floor", "ceil", "rceil", "even"])
    def test_blocks_of_zeros_get_one_and_tiny_ones_the_smallest(self, name, mode):
        scale = block_exponent_scale(torch.tensor([0.0, 2.0**-149]), FORMATS[name], mode)
        assert scale.tolist() == [1.0, 2.0**-127]

    @pytest.mark.parametrize("mode", ["floor", "ceil", "rceil", "even"])
    @pytest.mark.parametrize("amax", [3e38, torch.finfo(torch.float32).max, 2.0**127, 1.7e38])
    def test_the_largest_numbers_stay_finite_and_near(self, name, mode, amax):
        fmt = FORMATS[name]
        scale = block_exponent_scale(torch.tensor([amax]), fmt, mode)
        found = fmt.round(torch.tensor([amax, -amax]) / scale) * scale
        assert found.isfinite().all()
        assert (found.abs() >= 0.43 * amax).all()  # at worst 7 of 16 steps: a binade below the largest, saturated

    @pytest.mark.parametrize("mode", ["floor", "ceil", "rceil", "even"])
    def test_every_magnitude_of_float32_has_the_exponent_of_its_definition(self, name, mode):
        amax = torch.exp2(torch.linspace(-126, 126, 127).double()).float() * 1.3
        by_hand = [exponent_by_hand(value, name, mode) for value in amax.tolist()]
        expected = [2.0 ** max(exponent, -127) for exponent in by_hand]
        assert block_exponent_scale(amax, FORMATS[name], mode).tolist() == expected


@pytest.mark.parametrize("power", [-9, 0, 5])
def test_even_moves_fp4_up_a_binade_from_seven_quarters_on(power):
    amax = torch.tensor([1.0, 1.5, 1.7499999, 1.75, 1.99]) * 2.0**power
    scale = block_exponent_scale(amax, FORMATS["e2m1"], "even")
    assert (scale / 2.0 ** (power - 2)).tolist() == [1, 1, 1, 2, 2]


def test_even_moves_int8_up_where_the_largest_would_round_to_128():
    amax = torch.tensor([127.0, 127.49, 127.5, 128.0])
    assert block_exponent_scale(amax, FORMATS["int8"], "even").tolist() == [1, 1, 2, 2]


@every_format
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_does_not_become_a_number(format, bad):
    scale = torch.ones(2, PAIRS)
    scale[0, 3] = bad
    value = format.round(scale)
    assert not bool(value[0, 3].isfinite())
    assert bool(value[1].isfinite().all())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_scale_too_small_for_its_dtype_becomes_the_smallest_and_not_one(dtype):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wanted = torch.tensor([1e-60, -1e-60], dtype=torch.float64).float() if dtype == torch.float32 else None
    wanted = torch.tensor([tiny / 4, -tiny / 4]) if wanted is None else wanted
    stored = Float(dtype).store(wanted)
    if dtype == torch.float32:  # nothing smaller can even be wanted
        assert stored.tolist() == [1.0, 1.0]
    else:
        assert stored.tolist() == [tiny, -tiny]
    assert Float(dtype).store(torch.zeros(1)).item() == 1.0
