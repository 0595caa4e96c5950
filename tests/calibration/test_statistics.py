"""H = XᵀX and the token count, accumulated batch by batch."""

import pytest
import torch

from fewbit.calibration.statistics import Statistics
from fewbit.errors import CalibrationError
from fewbit.numerics.second_moment import NARROWEST as TILE


def inputs(batch, tokens, channels, seed=0):
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


def collect(channels, *batches):
    statistics = Statistics.empty(channels)
    for x, mask in batches:
        statistics.add(x, mask)
    return statistics.finish("linear")


def brute_force(*rows):
    """Σ x xᵀ over single tokens, in float64."""
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in rows]).double()
    return sum(torch.outer(row, row) for row in x)


@pytest.mark.parametrize("channels", [8, 64, TILE - 1, TILE, TILE + 1, 2 * TILE + 37])
def test_moment_is_the_sum_of_outer_products(channels):
    x = inputs(2, 9, channels)
    statistics = collect(channels, (x, None))
    torch.testing.assert_close(statistics.moment.double(), brute_force(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(statistics.moment, statistics.moment.T)
    assert statistics.moment.dtype == torch.float32
    assert statistics.tokens == 18


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_float_dtype_are_summed_in_float32(dtype):
    x = inputs(2, 9, 16).to(dtype)
    moment = collect(16, (x, None)).moment
    assert moment.dtype == torch.float32
    torch.testing.assert_close(moment.double(), brute_force(x), rtol=1e-5, atol=1e-5)


def test_padding_is_left_out():
    x = inputs(3, 7, 16)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, :4] = False
    mask[2, 5:] = False
    statistics = collect(16, (x, mask))
    assert statistics.tokens == 21 - 4 - 2
    torch.testing.assert_close(statistics.moment.double(), brute_force(x[0], x[1, 4:], x[2, :5]), rtol=1e-5, atol=1e-5)


def test_values_at_padding_do_not_matter_not_even_nan():
    x = inputs(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :4] = False
    damaged = x.clone()
    damaged[1, :4] = torch.nan
    assert torch.equal(collect(16, (damaged, mask)).moment, collect(16, (x, mask)).moment)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_batches_matters_only_to_rounding(seed):
    batches = [(inputs(1, 5 + number, 24, seed=number), None) for number in range(6)]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    forward, shuffled = collect(24, *batches), collect(24, *(batches[number] for number in order))
    torch.testing.assert_close(forward.moment, shuffled.moment, rtol=1e-5, atol=1e-5)
    assert forward.tokens == shuffled.tokens


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_partition_into_batches_matters_only_to_rounding(parts):
    x = inputs(12, 5, 24)
    whole = collect(24, (x, None))
    split = collect(24, *((part, None) for part in x.chunk(parts)))
    torch.testing.assert_close(whole.moment, split.moment, rtol=1e-5, atol=1e-5)
    assert whole.tokens == split.tokens


def test_the_same_batches_give_the_same_bits():
    batches = [(inputs(2, 9, 40, seed=number), None) for number in range(4)]
    assert torch.equal(collect(40, *batches).moment, collect(40, *batches).moment)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 5, TILE + 3])
def test_a_non_finite_input_is_an_error_that_names_linear_and_channel(value, channel):
    x = inputs(2, 9, TILE + 16)
    x[1, 3, channel] = value
    statistics = Statistics.empty(TILE + 16)
    statistics.add(x)
    with pytest.raises(CalibrationError, match=rf"'mlp\.down_proj' holds NaN or infinity \(channel {channel}\)"):
        statistics.finish("mlp.down_proj")


def test_the_input_is_not_changed():
    x = inputs(2, 9, 16)
    before = x.clone()
    collect(16, (x, None))
    assert torch.equal(x, before)


# --- a sample of tokens ---------------------------------------------------------------------------------------------


def numbered(count, channels=4):
    """Tokens [count, channels] that tell their number."""
    return torch.arange(count, dtype=torch.float32).unsqueeze(1).expand(-1, channels)


def sampled(wanted, *parts, masks=None):
    statistics = Statistics.empty(4, sample=wanted)
    for part, mask in zip(parts, masks or [None] * len(parts), strict=True):
        statistics.add(part, mask)
    return statistics


def test_no_sample_is_kept_unless_wanted():
    assert sampled(0, numbered(9)).sample is None
    assert sampled(5).sample is None


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("wanted", [1, 3, 8])
def test_a_sample_holds_evenly_spaced_tokens_as_many_as_wanted_or_there_are(count, wanted):
    sample = sampled(wanted, numbered(count)).sample
    assert sample.shape == (min(count, wanted), 4)
    numbers = sample[:, 0]
    assert numbers[0] == 0
    gaps = numbers.diff()
    assert len(gaps) == 0 or gaps.max() <= 2 * gaps.min()
    assert numbers[-1] >= count - 2 * count / len(numbers)  # to the end


@pytest.mark.parametrize("sizes", [(100,), (1,) * 100, (50, 50), (3, 90, 7), (99, 1), (0, 60, 0, 40)])
def test_a_sample_does_not_depend_on_how_tokens_are_batched(sizes):
    whole = sampled(6, numbered(100)).sample
    assert torch.equal(sampled(6, *numbered(100).split(sizes)).sample, whole)


def test_a_sample_has_no_padding_and_is_float32():
    x = numbered(12).view(2, 6, 4).to(torch.bfloat16)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :3] = False
    sample = sampled(50, x, masks=[mask]).sample
    assert sample.dtype == torch.float32
    assert sample[:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_a_sample_is_a_copy():
    x = numbered(4).clone()
    statistics = sampled(4, x)
    x.zero_()
    assert statistics.sample[:, 0].tolist() == [0, 1, 2, 3]


def test_a_sample_never_holds_twice_as_many_tokens_as_were_wanted():
    statistics = Statistics.empty(4, sample=5)
    for _ in range(40):
        statistics.add(numbered(7))
        assert sum(kept.shape[0] for kept in statistics._kept) < 10


@pytest.mark.parametrize("sizes", [(100,), (1,) * 100, (50, 50), (0, 60, 0, 40)])
def test_the_tokens_with_the_largest_values_are_kept_however_they_are_batched(sizes):
    x = numbered(100).clone()
    x[17, 2], x[63, 0], x[64, 3] = -900.0, 800.0, 700.0
    assert sampled(16, *x.split(sizes)).outliers.abs().amax(1).tolist() == [900.0, 800.0]
    assert sampled(3, *x.split(sizes)).outliers.abs().amax(1).tolist() == [900.0]
    assert sampled(0, *x.split(sizes)).outliers is None


def test_the_largest_magnitudes_are_those_of_all_tokens_that_count_however_they_are_batched():
    x = inputs(4, 9, 16)
    x[2, 3, 5] = -70.0
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, :4] = False
    x[0, 1] = 1000.0  # padding
    whole = collect(16, (x, mask))
    parts = collect(16, *((x[i : i + 1], mask[i : i + 1]) for i in (3, 1, 0, 2)))
    assert torch.equal(whole.largest, x[mask].abs().amax(0))
    assert torch.equal(parts.largest, whole.largest)
    columns = torch.rand(16) + 0.5
    assert torch.equal(whole.scaled(columns).largest, whole.largest / columns)
    assert collect(16, (x[:0], mask[:0])).largest is None


def test_of_equal_tokens_the_first_are_kept_however_they_are_batched():
    x = inputs(1, 200, 4)[0].bfloat16().float().clamp(-1, 1)  # many have a largest value of one
    kept = []
    for size in (200, 37, 1):
        statistics = Statistics.empty(4, sample=64)
        for part in x.split(size):
            statistics.add(part)
        kept.append(statistics.finish("linear"))
    assert all(torch.equal(each.outliers, kept[0].outliers) for each in kept)
    assert all(torch.equal(each.sample, kept[0].sample) for each in kept)


def test_drift_that_was_measured_on_some_of_the_tokens_stands_for_all():
    x, reference = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0))
    some, every = Statistics.empty(8), Statistics.empty(8)
    some.add(x, None, reference)
    some.add(x)
    for _ in range(2):
        every.add(x, None, reference)
    assert some.finish("x").drift_tokens == 20
    torch.testing.assert_close(some.drift, every.finish("x").drift)
