import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from fewbit.numerics.formats import CAST_DTYPES, FORMATS

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SMALL_FLOATS = {"e2m1": (2, 1), "e2m3": (2, 3), "e3m2": (3, 2)}  # exponent bits, mantissa bits
INTEGERS = {f"{sign}int{bits}": bits for sign in ("", "u") for bits in range(2, 9)}
FLOATS = [*FP8, *SMALL_FLOATS]
CODED = [name for name in FORMATS if name not in CAST_DTYPES]
BELOW_A_HALF = 0.5 - 2.0**-25  # in float32, adding 0.5 to this makes 1


def every_bf16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def positive_values(name: str) -> list[float]:
    """Values of the codes with sign 0, from the definition of a small float and exact arithmetic."""
    exponent_bits, mantissa_bits = SMALL_FLOATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            implicit = 1 if exponent else 0
            significand = implicit + Fraction(mantissa, 2**mantissa_bits)
            values.append(float(significand * Fraction(2) ** (max(exponent, 1) - bias)))
    return values


def test_the_formats_are_those_that_the_design_names():
    assert set(FORMATS) == set(INTEGERS) | set(FP8) | set(SMALL_FLOATS) | {"bfloat16", "float16"}


@pytest.mark.parametrize(
    ("name", "emax"), [("e4m3", 8), ("e5m2", 15), ("e3m2", 4), ("e2m3", 2), ("e2m1", 2), ("int8", 6), ("int5", 3)]
)
def test_emax_is_the_exponent_of_the_largest_binade(name, emax):
    assert FORMATS[name].emax == emax == math.floor(math.log2(FORMATS[name].largest))


@pytest.mark.parametrize("name", FP8)
class TestFP8:
    def test_every_bf16_value_in_range_has_the_code_of_torchs_cast(self, name):
        fmt = FORMATS[name]
        x = every_bf16()
        x = x[x.abs() <= fmt.largest]
        assert x.numel() > 2 * 16_000
        assert torch.equal(fmt.encode(x), x.to(FP8[name]).view(torch.uint8))

    def test_float32_values_beside_every_tie_have_the_code_of_torchs_cast(self, name):
        fmt = FORMATS[name]
        finite = torch.arange(256, dtype=torch.uint8).view(FP8[name]).float()
        finite = finite[finite.isfinite()].unique()
        ties = (finite[1:] + finite[:-1]) / 2
        x = torch.cat([ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)])
        assert torch.equal(fmt.encode(x), x.to(FP8[name]).view(torch.uint8))

    def test_every_bf16_value_beyond_saturates_infinity_too(self, name):
        fmt = FORMATS[name]
        x = every_bf16()
        x = x[x.abs() > fmt.largest]
        assert x.isinf().sum() == 2
        ends = torch.tensor([fmt.largest, -fmt.largest]).to(FP8[name]).view(torch.uint8)
        assert torch.equal(fmt.encode(x), torch.where(x > 0, ends[0], ends[1]))

    def test_every_code_decodes_as_torch_reads_it(self, name):
        codes = torch.arange(256, dtype=torch.uint8)
        torch.testing.assert_close(
            FORMATS[name].decode(codes), codes.view(FP8[name]).float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("name", SMALL_FLOATS)
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
class TestFP4AndFP6:
    def codes(self, name: str, sign: int, codes: torch.Tensor) -> torch.Tensor:
        return codes + (sign < 0) * (1 << (FORMATS[name].bits - 1))

    def test_every_code_decodes_to_the_value_of_its_fields(self, name, sign):
        values = positive_values(name)
        codes = self.codes(name, sign, torch.arange(len(values)))
        assert torch.equal(FORMATS[name].decode(codes), sign * torch.tensor(values))

    def test_every_tie_goes_to_the_even_code(self, name, sign):
        values = positive_values(name)
        lower = torch.arange(len(values) - 1)
        ties = torch.tensor([(a + b) / 2 for a, b in pairwise(values)])
        even = torch.where(lower % 2 == 0, lower, lower + 1)
        assert torch.equal(FORMATS[name].encode(sign * ties).long(), self.codes(name, sign, even))

    def test_values_beside_a_tie_go_to_the_nearest_code(self, name, sign):
        values = positive_values(name)
        lower = torch.arange(len(values) - 1)
        ties = torch.tensor([(a + b) / 2 for a, b in pairwise(values)])
        below, above = ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(torch.inf))
        assert torch.equal(FORMATS[name].encode(sign * below).long(), self.codes(name, sign, lower))
        assert torch.equal(FORMATS[name].encode(sign * above).long(), self.codes(name, sign, lower + 1))

    def test_what_lies_beyond_saturates(self, name, sign):
        largest = max(positive_values(name))
        assert FORMATS[name].largest == largest
        x = sign * torch.tensor([largest * 1.0001, largest * 1.5, 1e30, torch.inf])
        assert torch.equal(FORMATS[name].round(x), torch.full((4,), sign * largest))


@pytest.mark.parametrize(
    ("tie", "value"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
def test_e2m1_ties_are_those_of_the_ocp_table(tie, value):
    x = torch.tensor([tie, -tie])
    assert torch.equal(FORMATS["e2m1"].round(x), torch.tensor([value, -value]))


@pytest.mark.parametrize("name", INTEGERS)
class TestIntegers:
    def test_ties_round_to_the_even_integer_and_both_ends_saturate(self, name):
        bits = INTEGERS[name]
        low, high = (0, 2**bits - 1) if name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        x = torch.arange(-300, 300, 0.25)
        expected = [min(max(round(value), low), high) for value in x.tolist()]  # Python rounds half to even
        assert FORMATS[name].encode(x).tolist() == expected
        assert FORMATS[name].round(x).tolist() == expected

    def test_infinity_saturates(self, name):
        fmt = FORMATS[name]
        assert fmt.encode(torch.tensor([torch.inf, -torch.inf])).tolist() == [fmt.largest, fmt.smallest]

    def test_codes_are_eight_bits_wide_with_the_formats_sign(self, name):
        assert FORMATS[name].encode(torch.zeros(1)).dtype == (torch.uint8 if name[0] == "u" else torch.int8)


@pytest.mark.parametrize("name", CODED)
def test_encoding_a_decoded_code_gives_it_back(name):
    fmt = FORMATS[name]
    start = int(fmt.smallest) if fmt.is_integer else 0
    codes = torch.arange(start, start + 2**fmt.bits).to(fmt.code_dtype)
    values = fmt.decode(codes, torch.float64)
    finite = values.isfinite()
    assert int(finite.sum()) >= 2**fmt.bits - 8  # e5m2 spends 8 codes on infinities and NaN, the others fewer
    assert torch.equal(fmt.encode(values)[finite], codes[finite])


@pytest.mark.parametrize("name", [name for name in CODED if FORMATS[name].nan_code is None])
def test_nan_raises_where_the_format_has_none(name):
    with pytest.raises(ValueError, match=f"NaN.*{name}"):
        FORMATS[name].encode(torch.tensor([1.0, torch.nan]))


@pytest.mark.parametrize(("name", "code"), [("e4m3", 0x7F), ("e5m2", 0x7F)])
def test_nan_has_its_code_where_the_format_has_one(name, code):
    codes = FORMATS[name].encode(torch.tensor([1.0, torch.nan, -torch.nan]))
    assert codes.tolist()[1:] == [code, code]
    assert FORMATS[name].decode(codes).isnan().tolist() == [False, True, True]


def test_only_formats_without_nan_are_integers_fp4_and_fp6():
    assert {name for name in CODED if FORMATS[name].nan_code is None} == set(INTEGERS) | set(SMALL_FLOATS)


def values_of(name: str) -> torch.Tensor:
    """Every finite value of a format in order, float64."""
    fmt = FORMATS[name]
    codes = torch.arange(int(fmt.smallest), int(fmt.largest) + 1) if fmt.is_integer else torch.arange(2**fmt.bits)
    values = fmt.decode(codes, torch.float64)
    return values[values.isfinite()].unique()


def dense(name: str) -> torch.Tensor:
    """float32: every value, every tie and their neighbours, random numbers of all sizes, and what lies beyond."""
    fmt, values = FORMATS[name], values_of(name)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(20_000, generator=generator)
    spread = random.sign() * torch.exp2(torch.empty(20_000).uniform_(-20, 20, generator=generator))
    ends = torch.tensor([fmt.largest, fmt.smallest]) * 1.01
    tiny = torch.tensor([0.0, 1e-30, -1e-30, BELOW_A_HALF, -BELOW_A_HALF])
    infinite = torch.tensor([torch.inf, -torch.inf])
    parts = [points, points.nextafter(infinite[0]), points.nextafter(infinite[1]), random, spread, tiny, infinite]
    return torch.cat([*parts, 3 * random, ends, random * fmt.largest])


def round_by_table(name: str, x: torch.Tensor, method: str) -> torch.Tensor:
    """The meaning of "round" and "floor" spelt out on the sorted table of values, in float64."""
    values = values_of(name)
    x = x.double().clamp(values[0], values[-1])
    below = values[torch.searchsorted(values, x, right=True) - 1]
    if method == "floor":
        return below
    above = values[torch.searchsorted(values, x).clamp(max=len(values) - 1)]
    up, down = above - x, x - below
    outer = torch.where(x > 0, above, below)
    return torch.where(up == down, outer, torch.where(up < down, above, below))


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
class TestRounding:
    def test_half_even_is_what_encoding_and_decoding_gives(self, name):
        x, fmt = dense(name), FORMATS[name]
        assert torch.equal(fmt.round(x), fmt.decode(fmt.encode(x)))

    @pytest.mark.parametrize("method", ["round", "floor"])
    def test_ties_go_away_from_zero_and_floor_goes_down(self, name, method):
        x = dense(name)
        assert torch.equal(FORMATS[name].round(x, method).double(), round_by_table(name, x, method))

    @pytest.mark.parametrize("method", ["half_even", "round", "floor"])
    def test_what_is_representable_stays(self, name, method):
        values = values_of(name).float()
        assert torch.equal(FORMATS[name].round(values, method), values)

    def test_the_methods_differ_where_they_should(self, name):
        x, fmt = dense(name), FORMATS[name]
        found = {method: fmt.round(x, method) for method in ("half_even", "round", "floor")}
        assert (found["floor"] <= found["half_even"]).all()
        assert (found["round"].abs() >= found["half_even"].abs()).all()
        assert not torch.equal(found["round"], found["half_even"])
        assert not torch.equal(found["floor"], found["half_even"])

    def test_round_leaves_its_argument_alone_and_round_in_place_does_not(self, name):
        x = torch.tensor([0.3, 1.7, 1e9])
        before = x.clone()
        rounded = FORMATS[name].round(x)
        assert torch.equal(x, before)
        assert FORMATS[name].round_(x) is x
        assert torch.equal(x, rounded)


@pytest.mark.parametrize(
    ("x", "half_even", "away", "floor"), [(2.5, 2, 3, 2), (-2.5, -2, -3, -3), (0.5, 0, 1, 0), (-1.2, -1, -1, -2)]
)
def test_the_three_methods_by_hand(x, half_even, away, floor):
    found = [FORMATS["int4"].round(torch.tensor([x]), method).item() for method in ("half_even", "round", "floor")]
    assert found == [half_even, away, floor]


@pytest.mark.parametrize("name", CAST_DTYPES)
class TestCasts:
    def test_values_are_those_of_torchs_cast(self, name):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
        codes = FORMATS[name].encode(x)
        assert codes.dtype == FORMATS[name].code_dtype == CAST_DTYPES[name]
        assert torch.equal(codes, x.to(CAST_DTYPES[name]))
        assert torch.equal(FORMATS[name].decode(codes), codes.float())
        assert torch.equal(FORMATS[name].round(x), codes.float())

    def test_what_lies_beyond_saturates(self, name):
        fmt, largest = FORMATS[name], torch.finfo(CAST_DTYPES[name]).max
        x = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).max])
        expected = torch.tensor([largest, -largest, largest])
        assert (fmt.largest, fmt.smallest) == (largest, -largest)
        assert torch.equal(fmt.encode(x).float(), expected)
        assert torch.equal(fmt.round(x), expected)

    def test_nan_stays_nan(self, name):
        assert FORMATS[name].encode(torch.tensor([torch.nan])).isnan().all()
