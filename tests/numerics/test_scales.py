import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.numerics import scales
from fewbit.numerics.formats import FORMATS

BITS = [2, 3, 4, 8]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (rule, symmetric) of every way that find_scale knows
SYMMETRIC_RULES = ["search", "minmax", "signed-max"]
AFFINE_RULES = ["search", "minmax"]
RULES = [*((rule, True) for rule in SYMMETRIC_RULES), *((rule, False) for rule in AFFINE_RULES)]

per_bits = pytest.mark.parametrize("bits", BITS)
per_format = pytest.mark.parametrize("fmt", [FORMATS[f"{sign}int{b}"] for sign in ("", "u") for b in BITS], ids=str)
per_rule = pytest.mark.parametrize(("rule", "symmetric"), RULES)
per_data = pytest.mark.parametrize("data", ["gaussian", "heavy-tailed"])
weighted = pytest.mark.parametrize("weighting", [None, "per-element", "per-column"])


def tiles_of(data: str, *shape: int, seed: int = 0) -> torch.Tensor:
    gaussian = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    # a ratio of Gaussians has Cauchy tails; the floor keeps the largest within float16's range
    return 0.1 * (gaussian[0] if data == "gaussian" else gaussian[0] / gaussian[1].abs().clamp(min=0.01))


def importance_of(weighting: str | None, *shape: int) -> torch.Tensor | None:
    if weighting is None:
        return None
    shape = shape if weighting == "per-element" else shape[-2:]  # diag(H) is the same for every row of a weight
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9)).square() + 1e-3


def format_of(bits: int, symmetric: bool):
    return FORMATS[f"int{bits}" if symmetric else f"uint{bits}"]


def error_of(tiles, scale, zero, fmt, importance=None) -> torch.Tensor:
    """Σ importance·(x̂ − x)² per tile in float64, straight from the definition of the grid."""
    step = scale.double().unsqueeze(-1)
    offset = torch.zeros_like(step) if zero is None else zero.double().unsqueeze(-1)
    codes = ((tiles / scale.float().unsqueeze(-1)).round().double() + offset).clamp(fmt.smallest, fmt.largest)
    squared = ((codes - offset) * step - tiles.double()).square()
    return (squared if importance is None else squared * importance.double()).sum(-1)


class TestPlainRules:
    @per_bits
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_amax_maps_the_largest_magnitude_to_half_the_number_of_steps(self, bits, dtype):
        tiles = torch.tensor([[0.5, -1.25, 3.0], [0.5, -7.0, 3.0]])
        scale = scales.amax(tiles, FORMATS[f"int{bits}"], dtype)
        assert torch.equal(scale, (torch.tensor([3.0, 7.0]) / ((2**bits - 1) / 2)).to(dtype))

    @per_bits
    def test_signed_max_puts_the_largest_magnitude_on_the_lowest_code_whatever_its_sign(self, bits):
        fmt = FORMATS[f"int{bits}"]
        tiles = torch.tensor([[0.5, -1.25, 3.0], [0.5, -7.0, 3.0]])
        scale = scales.signed_max(tiles, fmt, torch.float32)
        assert torch.equal(scale, torch.tensor([3.0, -7.0]) / -(2 ** (bits - 1)))
        codes = scales.encode(tiles, scale, None, fmt)
        assert codes[0, 2] == codes[1, 1] == -(2 ** (bits - 1))
        decoded = scales.decode(codes, scale, None, fmt)
        assert decoded[0, 2] == 3.0
        assert decoded[1, 1] == -7.0

    @per_bits
    @per_data
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_signed_max_is_the_largest_element_over_the_lowest_code_rounded_to_storage(self, bits, data, dtype):
        tiles = tiles_of(data, 50, 16)
        largest = tiles.gather(-1, tiles.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = scales.signed_max(tiles, FORMATS[f"int{bits}"], dtype)
        assert torch.equal(scale, (largest / -(2 ** (bits - 1))).to(dtype))

    @per_format
    def test_affine_maps_the_ends_of_the_range_to_the_ends_of_the_codes(self, fmt):
        steps = 2**fmt.bits - 1
        low = -float(steps // 2)
        tiles = torch.tensor([[low, 0.0, low + steps]]) / 8
        scale, zero = scales.affine(tiles, fmt, torch.float32)
        assert scale.item() == 1 / 8
        assert scales.encode(tiles, scale, zero, fmt).tolist() == [[fmt.smallest, zero.item(), fmt.largest]]
        assert torch.equal(scales.decode(scales.encode(tiles, scale, zero, fmt), scale, zero, fmt), tiles)

    @per_format
    @pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0], ids=["all-negative", "mixed", "all-positive"])
    def test_the_affine_range_is_widened_to_include_zero(self, fmt, shift):
        tiles = tiles_of("gaussian", 50, 16) + shift
        low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
        scale, zero = scales.affine(tiles, fmt, torch.float32)
        assert torch.equal(scale, (high - low) / (2**fmt.bits - 1))
        assert torch.equal(zero.float(), (fmt.smallest - low / scale).round().clamp(fmt.smallest, fmt.largest))
        if shift > 0:
            assert (zero == fmt.smallest).all()
        if shift < 0:
            assert (zero == fmt.largest).all()

    @per_format
    @per_data
    def test_no_element_of_an_affine_grid_is_further_off_than_one_step(self, fmt, data):
        tiles = tiles_of(data, 200, 16)
        scale, zero = scales.affine(tiles, fmt, torch.float32)
        decoded = scales.decode(scales.encode(tiles, scale, zero, fmt), scale, zero, fmt)
        # half a step for rounding the element, half a step for rounding the zero point
        assert ((decoded - tiles).abs() <= scale.unsqueeze(-1) * (1 + 1e-4)).all()


class TestEveryRule:
    @per_rule
    @per_bits
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scales_come_in_the_dtype_they_are_stored_in_and_none_is_zero(self, rule, symmetric, bits, dtype):
        scale, zero = scales.find_scale(
            tiles_of("gaussian", 8, 16) * 1e-9, format_of(bits, symmetric), dtype, rule=rule, symmetric=symmetric
        )
        assert scale.dtype == dtype
        assert scale.shape == (8,)
        assert (scale != 0).all()
        assert (zero is None) == symmetric

    @per_rule
    @per_bits
    def test_a_group_of_zeros_is_exact_and_has_the_scale_one(self, rule, symmetric, bits):
        fmt = format_of(bits, symmetric)
        tiles = torch.zeros(3, 16)
        tiles[1] = tiles_of("gaussian", 16)
        scale, zero = scales.find_scale(tiles, fmt, torch.bfloat16, rule=rule, symmetric=symmetric)
        assert scale[0] == scale[2] == 1
        decoded = scales.decode(scales.encode(tiles, scale, zero, fmt), scale, zero, fmt)
        assert torch.equal(decoded[::2], tiles[::2])

    @per_rule
    @per_bits
    @per_data
    def test_zero_is_on_every_grid(self, rule, symmetric, bits, data):
        fmt = format_of(bits, symmetric)
        tiles = tiles_of(data, 100, 16) + 0.3
        tiles[:, 3] = 0
        scale, zero = scales.find_scale(tiles, fmt, torch.bfloat16, rule=rule, symmetric=symmetric)
        decoded = scales.decode(scales.encode(tiles, scale, zero, fmt), scale, zero, fmt)
        assert (decoded[:, 3] == 0).all()

    @given(st.sampled_from(RULES), st.sampled_from(BITS), st.integers(-10, 10), st.integers(0, 1000))
    @settings(max_examples=40, deadline=None)
    def test_tiles_times_a_power_of_two_have_the_scale_times_it(self, rule, bits, power, seed):
        name, symmetric = rule
        fmt = format_of(bits, symmetric)
        tiles = tiles_of("heavy-tailed", 6, 16, seed=seed)
        scale, zero = scales.find_scale(tiles, fmt, torch.bfloat16, rule=name, symmetric=symmetric)
        scaled, scaled_zero = scales.find_scale(
            tiles * 2.0**power, fmt, torch.bfloat16, rule=name, symmetric=symmetric
        )
        assert torch.equal(scaled, scale * 2.0**power)
        assert symmetric or torch.equal(scaled_zero, zero)

    @per_rule
    def test_the_rules_name_chooses_the_function(self, rule, symmetric):
        fmt = format_of(4, symmetric)
        tiles = tiles_of("heavy-tailed", 50, 16)
        importance = importance_of("per-element", 50, 16)
        found = scales.find_scale(tiles, fmt, torch.bfloat16, rule=rule, symmetric=symmetric, importance=importance)
        expected = {
            ("search", True): lambda: (scales.search_symmetric(tiles, fmt, torch.bfloat16, importance), None),
            ("minmax", True): lambda: (scales.amax(tiles, fmt, torch.bfloat16), None),
            ("signed-max", True): lambda: (scales.signed_max(tiles, fmt, torch.bfloat16), None),
            ("search", False): lambda: scales.search_affine(tiles, fmt, torch.bfloat16, importance),
            ("minmax", False): lambda: scales.affine(tiles, fmt, torch.bfloat16),
        }[rule, symmetric]()
        assert torch.equal(found[0], expected[0])
        assert found[1] is expected[1] if symmetric else torch.equal(found[1], expected[1])


@per_bits
@per_data
@weighted
class TestSearch:
    def test_symmetric_search_beats_every_plain_rule(self, bits, data, weighting):
        fmt, shape = FORMATS[f"int{bits}"], (64, 4, 32)
        tiles, importance = tiles_of(data, *shape), importance_of(weighting, *shape)
        best = error_of(
            tiles, scales.search_symmetric(tiles, fmt, torch.bfloat16, importance), None, fmt, importance
        ).sum()
        for rule in (scales.amax, scales.signed_max):
            assert best < error_of(tiles, rule(tiles, fmt, torch.bfloat16), None, fmt, importance).sum()

    def test_affine_search_beats_the_plain_range(self, bits, data, weighting):
        fmt, shape = FORMATS[f"uint{bits}"], (64, 4, 32)
        tiles, importance = tiles_of(data, *shape), importance_of(weighting, *shape)
        best = error_of(tiles, *scales.search_affine(tiles, fmt, torch.bfloat16, importance), fmt, importance).sum()
        assert best < error_of(tiles, *scales.affine(tiles, fmt, torch.bfloat16), fmt, importance).sum()

    def test_no_group_gets_worse_than_with_the_rule_that_the_search_starts_from(self, bits, data, weighting):
        shape = (64, 4, 32)
        tiles, importance = tiles_of(data, *shape), importance_of(weighting, *shape)
        for symmetric, rule in ((True, "signed-max"), (False, "minmax")):
            fmt = format_of(bits, symmetric)
            found = scales.find_scale(
                tiles, fmt, torch.bfloat16, rule="search", symmetric=symmetric, importance=importance
            )
            plain = scales.find_scale(tiles, fmt, torch.bfloat16, rule=rule, symmetric=symmetric)
            # the search compares in float32; here it is float64
            assert (
                error_of(tiles, *found, fmt, importance) <= error_of(tiles, *plain, fmt, importance) * (1 + 1e-5)
            ).all()

    def test_symmetric_search_finds_the_best_candidate_as_it_will_be_stored(self, bits, data, weighting):
        fmt, shape = FORMATS[f"int{bits}"], (64, 4, 32)
        tiles, importance = tiles_of(data, *shape), importance_of(weighting, *shape)
        magnitude = tiles.abs().amax(-1)
        candidates = [scales.signed_max(tiles, fmt, torch.bfloat16)]
        candidates += [
            (factor * magnitude / end).to(torch.bfloat16)
            for end in (fmt.smallest, fmt.largest)
            for factor in scales.SHRINK_FACTORS
        ]
        least = torch.stack([error_of(tiles, scale, None, fmt, importance) for scale in candidates]).amin(0)
        found = scales.search_symmetric(tiles, fmt, torch.bfloat16, importance)
        torch.testing.assert_close(error_of(tiles, found, None, fmt, importance), least, rtol=1e-5, atol=0)

    def test_affine_search_finds_the_best_candidate_as_it_will_be_stored(self, bits, data, weighting):
        fmt, shape = FORMATS[f"uint{bits}"], (64, 4, 32)
        tiles, importance = tiles_of(data, *shape), importance_of(weighting, *shape)
        low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
        candidates = [scales.affine(tiles, fmt, torch.bfloat16)]
        for factor in scales.SHRINK_FACTORS:
            scale = (factor * (high - low) / (2**bits - 1)).to(torch.bfloat16)
            candidates.append((scale, (-factor * low / scale.float()).round().clamp(0, fmt.largest)))
        least = torch.stack([error_of(tiles, *candidate, fmt, importance) for candidate in candidates]).amin(0)
        found = scales.search_affine(tiles, fmt, torch.bfloat16, importance)
        torch.testing.assert_close(error_of(tiles, *found, fmt, importance), least, rtol=1e-5, atol=0)


@per_data
@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_with_stored_scales_beats_rounding_the_scale_afterwards(data, symmetric):
    fmt = format_of(8, symmetric)  # steps so fine that a bf16 scale moves the far end of the grid by several
    tiles = tiles_of(data, 256, 32)
    exact, zero = scales.find_scale(tiles, fmt, torch.float32, rule="search", symmetric=symmetric)
    stored = scales.find_scale(tiles, fmt, torch.bfloat16, rule="search", symmetric=symmetric)
    assert error_of(tiles, *stored, fmt).sum() < error_of(tiles, exact.bfloat16(), zero, fmt).sum()


def test_search_takes_the_sign_that_suits_the_group():
    fmt = FORMATS["int3"]
    tiles = torch.tensor([[4.0, 3.0, 2.0, -1.0, -3.0], [-4.0, -3.0, -2.0, 1.0, 3.0]])
    assert scales.search_symmetric(tiles, fmt, torch.float32).tolist() == [-1.0, 1.0]


def test_elements_without_importance_do_not_matter():
    fmt = FORMATS["int4"]
    tiles = torch.cat([tiles_of("gaussian", 50, 15), torch.full((50, 1), 1.0)], -1)
    importance = torch.ones(16)
    importance[-1] = 0
    scale = scales.search_symmetric(tiles, fmt, torch.float32, importance)
    blind = error_of(tiles, scale, None, fmt, importance).sum()
    assert blind < error_of(tiles, scales.search_symmetric(tiles, fmt, torch.float32), None, fmt, importance).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_the_ratio_of_importances_matters(symmetric):
    fmt = format_of(4, symmetric)
    tiles, importance = tiles_of("heavy-tailed", 50, 16), importance_of("per-element", 50, 16)
    one, other = (
        scales.find_scale(tiles, fmt, torch.bfloat16, rule="search", symmetric=symmetric, importance=i)[0]
        for i in (importance, 1024 * importance)
    )
    assert torch.equal(one, other)


@per_format
def test_elements_go_to_the_nearest_point_of_the_grid(fmt):
    tiles = tiles_of("gaussian", 40, 16)
    symmetric = fmt.is_signed
    scale, zero = scales.find_scale(tiles, fmt, torch.bfloat16, rule="search", symmetric=symmetric)
    every_code = torch.arange(int(fmt.smallest), int(fmt.largest) + 1)
    grid = (every_code - (0 if zero is None else zero.long().unsqueeze(-1))) * scale.double().unsqueeze(-1)
    nearest = (grid.unsqueeze(1) - tiles.double().unsqueeze(-1)).abs().amin(-1)
    decoded = scales.decode(scales.encode(tiles, scale, zero, fmt), scale, zero, fmt)
    torch.testing.assert_close((decoded.double() - tiles.double()).abs(), nearest, rtol=0, atol=1e-7)


@weighted
@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_error_is_the_error_of_encoding_and_decoding(weighting, symmetric):
    fmt = format_of(4, symmetric)
    tiles, importance = tiles_of("heavy-tailed", 8, 4, 16), importance_of(weighting, 8, 4, 16)
    scale, zero = scales.find_scale(tiles, fmt, torch.bfloat16, rule="minmax", symmetric=symmetric)
    before = tiles.clone()
    error = scales.grid_error(tiles, scale, zero, fmt, importance)
    decoded = scales.decode(scales.encode(tiles, scale, zero, fmt), scale, zero, fmt)
    squared = (decoded - tiles).square()
    torch.testing.assert_close(error, (squared if importance is None else squared * importance).sum(-1))
    assert torch.equal(tiles, before)
