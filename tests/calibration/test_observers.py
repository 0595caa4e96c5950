"""Observers: what must hold whatever the data is, on Gaussian and on heavy-tailed values."""

from dataclasses import replace

import pytest
import torch

from fewbit.calibration.float_histogram import FloatHistogram
from fewbit.calibration.observers import (
    HistogramObserver,
    LeastErrorObserver,
    MovingAverageObserver,
    make_observer,
)
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn.activation import ActivationQuantizer

STATIC = QuantizationSpec(dtype="int8", qscheme="per_tensor", observer="minmax")
PERCENTILES = [75.0, 90.0, 99.0, 99.9, 99.99, 100.0]
GRIDS = {
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "uint8": {"dtype": "uint8", "symmetric": False},
    "uint4": {"dtype": "uint4", "symmetric": False},
    "e4m3": {"dtype": "e4m3"},
    "e2m1": {"dtype": "e2m1"},
    "int8-pof2": {"dtype": "int8", "scale_type": "pof2"},
    "uint8-pof2": {"dtype": "uint8", "symmetric": False, "scale_type": "pof2"},
    "int4-e8m0": {"dtype": "int4", "scale_type": "e8m0"},
    "e2m1-e4m3": {"dtype": "e2m1", "scale_type": "e4m3"},
    "int8-floor": {"dtype": "int8", "round_method": "floor"},
}
GRANULARITIES = {
    "tensor": {"qscheme": "per_tensor"},
    "channel": {"qscheme": "per_channel", "ch_axis": 1},
    "columns": {"qscheme": "per_group", "group_size": 8},
}
per_grid = pytest.mark.parametrize("grid", GRIDS)
per_data = pytest.mark.parametrize("data", ["gaussian", "heavy-tailed", "one-sided"])
per_observer = pytest.mark.parametrize("observer", ["minmax", "percentile", "histogram", "mse"])
per_granularity = pytest.mark.parametrize("granularity", ["tensor", "channel"])


def activation(data: str, tokens: int = 256, channels: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(2, tokens, channels, generator=generator)
    if data == "heavy-tailed":
        return gaussian[0] / gaussian[1].abs().clamp(min=0.01)
    return torch.nn.functional.gelu(3 * gaussian[0]) if data == "one-sided" else gaussian[0]


def found(x, *, batches: int = 1, **fields):
    """What the observer finds, given x in so many batches."""
    observer = make_observer(replace(STATIC, **fields))
    for batch in x.chunk(batches):
        observer(batch)
    return observer.result("x")


def error_of(x, state) -> float:
    """Squared error of x quantized that way."""
    return float((ActivationQuantizer(state.spec, state)(x) - x).double().square().sum())


def same(first, second) -> bool:
    zeros = first.zero_point is None and second.zero_point is None
    zeros = zeros or torch.equal(first.zero_point, second.zero_point)
    exact = torch.equal(first.scale.float(), second.scale.float()) and first.scale.dtype == second.scale.dtype
    return exact and zeros and first.global_scale == second.global_scale


class TestEveryObserver:
    @per_observer
    @per_grid
    @per_granularity
    def test_the_result_does_not_depend_on_batches_or_their_order(self, observer, grid, granularity):
        fields = {"observer": observer, **GRIDS[grid], **GRANULARITIES[granularity]}
        x = activation("heavy-tailed")
        whole = found(x, **fields)
        assert same(found(x, batches=7, **fields), whole)
        assert same(
            found(x[torch.randperm(256, generator=torch.Generator().manual_seed(1))], batches=50, **fields), whole
        )

    @per_observer
    @per_grid
    @pytest.mark.parametrize("power", [-6, 5])
    def test_data_scaled_by_a_power_of_two_gives_the_scale_scaled_by_it(self, observer, grid, power):
        x = activation("heavy-tailed")
        fields = {"observer": observer, **GRIDS[grid]}
        before, after = found(x, **fields), found(x * 2.0**power, **fields)
        value = before.scale.float() * before.global_scale
        assert torch.equal(after.scale.float() * after.global_scale, value * 2.0**power)
        if before.zero_point is not None:
            assert torch.equal(before.zero_point, after.zero_point)

    @per_observer
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @per_granularity
    def test_scales_come_as_they_are_stored_with_one_per_tile(self, observer, dtype, granularity):
        spec = replace(STATIC, observer=observer, **GRANULARITIES[granularity])
        seen = make_observer(spec, dtype)
        seen(activation("gaussian").view(4, 64, 16))
        state = seen.result()
        assert state.scale.dtype == dtype
        assert state.scale.shape == ((1, 1) if granularity == "tensor" else (1, 16))
        assert bool((state.scale > 0).all())

    @per_observer
    @pytest.mark.parametrize("scale_type", ["pof2", "e8m0"])
    def test_powers_of_two_are_found_where_the_spec_asks_for_them(self, observer, scale_type):
        scale = found(activation("gaussian"), observer=observer, scale_type=scale_type).scale.float()
        assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))

    @per_observer
    @pytest.mark.parametrize("granularity", ["channel", "tensor"])
    def test_what_was_calibrated_can_quantize(self, observer, granularity):
        x = activation("gaussian")
        state = found(x, observer=observer, **GRANULARITIES[granularity])
        assert error_of(x, state) < 1e-3 * float(x.square().sum())

    @per_observer
    def test_a_scale_per_row_works_when_rows_stay_the_same(self, observer):
        """Attention heads as rows."""
        heads = torch.stack([torch.full((64,), float(head)) for head in range(1, 5)])
        spec = QuantizationSpec(dtype="int8", qscheme="per_channel", observer=observer)
        seen = make_observer(spec)
        seen(heads[:, :20])
        seen(heads[:, 20:])
        scale = seen.result().scale
        assert scale.shape == (4, 1)
        torch.testing.assert_close(scale / scale[0], torch.arange(1.0, 5).unsqueeze(-1), rtol=2e-3, atol=0)

    @per_observer
    @per_granularity
    def test_an_empty_batch_changes_nothing(self, observer, granularity):
        fields = {"observer": observer, **GRANULARITIES[granularity]}
        x = activation("gaussian")
        seen = make_observer(replace(STATIC, **fields))
        for batch in (x[:0], x, x[:0]):
            seen(batch)
        assert same(seen.result(), found(x, **fields))


class TestMinMax:
    def test_the_largest_magnitude_reaches_the_end_of_the_grid(self):
        x = torch.tensor([[0.5, -12.75], [3.0, 2.0]])
        assert torch.equal(found(x, batches=2).scale, torch.tensor([[12.75]]) / 127.5)
        assert found(x, dtype="e4m3").scale.item() == pytest.approx(12.75 / 448)

    def test_affine_covers_both_ends_and_zero(self):
        state = found(torch.tensor([[-1.0, 50.0]]), dtype="uint8", symmetric=False)
        assert state.scale.item() == pytest.approx(0.2)
        assert state.zero_point.item() == 5
        positive = found(torch.tensor([[10.0, 51.0]]), dtype="uint8", symmetric=False)
        assert (positive.scale.item(), positive.zero_point.item()) == (pytest.approx(0.2), 0)


class TestMovingAverage:
    def test_each_batch_moves_the_range_by_its_weight(self):
        observer = MovingAverageObserver(replace(STATIC, observer="moving-average"), weight=0.25)
        for largest in (8.0, 16.0, 2.0):
            observer(torch.tensor([[-1.0, largest]]))
        assert observer.high.item() == 8 + 0.25 * 8 + 0.25 * (2 - 10)
        assert observer.result().scale.item() == pytest.approx(8.0 / 127.5)

    def test_one_outlier_among_many_batches_counts_little(self):
        batches = [torch.ones(4, 4)] * 50 + [torch.full((4, 4), 100.0)]
        states = {}
        for name in ("minmax", "moving-average"):
            observer = make_observer(replace(STATIC, observer=name))
            for batch in batches:
                observer(batch)
            states[name] = observer.result().scale.item()
        assert states["moving-average"] == pytest.approx(1.99 / 127.5)
        assert states["minmax"] == pytest.approx(100 / 127.5)


class TestPercentile:
    @per_grid
    @per_data
    def test_the_scale_grows_with_the_percentile_up_to_minmax(self, grid, data):
        x = activation(data)
        states = [found(x, observer="percentile", percentile=p, **GRIDS[grid]) for p in PERCENTILES]
        scales = [float(state.scale.float() * state.global_scale) for state in states]
        assert scales == sorted(scales)
        assert scales[0] < scales[-1]
        assert same(states[-1], replace(found(x, observer="minmax", **GRIDS[grid]), spec=states[-1].spec))

    @pytest.mark.parametrize("percentile", [90.0, 99.0])
    def test_symmetric_ranges_hold_that_share_of_the_magnitudes(self, percentile):
        x = activation("heavy-tailed", 1000, 10)
        scale = found(x, observer="percentile", percentile=percentile).scale.item()
        kept = x.abs().flatten().kthvalue(1 + round(percentile / 100 * (x.numel() - 1))).values.item()
        assert scale == pytest.approx(kept / 127.5, rel=2**-10)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_affine_ranges_leave_out_both_tails(self, sign):
        x = sign * torch.cat([torch.linspace(-1, 3, 9801), torch.full((100,), -50.0), torch.full((100,), 70.0)])
        fields = {"dtype": "uint8", "symmetric": False, "observer": "percentile"}
        kept = found(x.view(1, -1), percentile=97.0, **fields)
        assert kept.scale.item() == pytest.approx(4 / 255, rel=0.02)
        everything = found(x.view(1, -1), percentile=100.0, **fields)
        assert everything.scale.item() == pytest.approx(120 / 255)

    @pytest.mark.parametrize("grid", ["int8", "uint8"])
    def test_where_nearly_everything_is_zero_the_range_is_that_of_the_rest(self, grid):
        x = torch.zeros(1000, 16)
        x[500, 3] = 40.0
        state = found(x, observer="percentile", percentile=99.0, **GRIDS[grid])
        assert torch.equal(state.scale, found(x, observer="minmax", **GRIDS[grid]).scale)

    def test_a_one_sided_outlier_leaves_the_other_end_alone(self):
        x = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([1000.0])]).view(1, -1)
        state = found(x, observer="percentile", percentile=99.0, dtype="uint8", symmetric=False)
        assert state.zero_point.item() == 0
        assert state.scale.item() == pytest.approx(1 / 255, rel=0.01)


class TestLeastError:
    @per_grid
    @per_data
    @per_granularity
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_the_error_is_at_most_that_of_minmax(self, grid, data, granularity, seed):
        x = activation(data, seed=seed)
        fields = GRIDS[grid] | GRANULARITIES[granularity]
        assert error_of(x, found(x, observer="mse", **fields)) <= error_of(x, found(x, observer="minmax", **fields))

    @pytest.mark.parametrize("grid", ["int4", "uint4", "e2m1", "int8"])
    def test_heavy_tails_are_clipped_for_a_much_smaller_error(self, grid):
        x = activation("gaussian", 1000)
        x[0, 0] = 60.0
        mse, minmax = (error_of(x, found(x, observer=name, **GRIDS[grid])) for name in ("mse", "minmax"))
        assert mse < (0.8 if grid != "int8" else 0.999) * minmax

    @pytest.mark.parametrize("grid", ["int8", "int4", "uint4", "e4m3"])
    @per_data
    def test_no_range_of_a_fine_sweep_is_much_better(self, grid, data):
        x = activation(data)
        state = found(x, observer="mse", **GRIDS[grid])
        rule = state.spec.grid_rule(state.spec.scale_format(torch.float32))
        low, high = x.min().view(1, 1), x.max().view(1, 1)
        least = error_of(x, state)
        for share in torch.linspace(0.02, 1.05, 300):
            scale, zero = rule.from_range(low * share, high * share)
            assert error_of(x, replace(state, scale=scale, zero_point=zero)) > 0.95 * least

    def test_histogram_is_another_name_of_mse(self):
        x = activation("heavy-tailed")
        mse, histogram = (found(x, observer=name, dtype="int4") for name in ("mse", "histogram"))
        assert torch.equal(mse.scale, histogram.scale)
        assert isinstance(make_observer(replace(STATIC, observer="histogram")), LeastErrorObserver)

    def test_many_channels_have_wider_bins_and_scales_about_as_good(self):
        x = activation("heavy-tailed", 512, 400)
        fields = {"observer": "mse", "dtype": "int4", **GRANULARITIES["channel"]}
        observer = make_observer(replace(STATIC, **fields))
        observer(x)
        assert isinstance(observer, HistogramObserver)
        assert observer.histogram.mantissa_bits == 8
        finely = sum(error_of(part, found(part, **fields)) for part in x.split(100, dim=1))
        assert error_of(x, observer.result()) < 1.01 * finely
        assert error_of(x, observer.result()) < 0.97 * error_of(x, found(x, **fields | {"observer": "minmax"}))


class TestSecondLevel:
    SPEC = QuantizationSpec(
        dtype="e2m1", qscheme="per_group", group_size=16, scale_type="e4m3", is_dynamic=True, observer="mse"
    )

    def test_a_dynamic_nvfp4_input_gets_the_global_scale_of_its_largest_value(self):
        observer = make_observer(self.SPEC)
        for largest in (3.0, 6 * 448 * 3.0, 1.0):
            observer(torch.full((2, 32), largest))
        state = observer.result()
        assert (state.scale, state.zero_point, state.global_scale) == (None, None, 4.0)

    def test_it_may_see_batches_of_any_number_of_tokens(self):
        observer = make_observer(self.SPEC)
        observer(torch.ones(3, 32))
        observer(torch.ones(2, 5, 32))
        assert observer.result().global_scale == 2.0**-11


class TestBadInput:
    @per_observer
    def test_no_data_is_an_error_that_names_the_activation(self, observer):
        with pytest.raises(CalibrationError, match=r"layers\.3\.q_proj\.input saw no data"):
            make_observer(replace(STATIC, observer=observer)).result("layers.3.q_proj.input")

    @per_observer
    @pytest.mark.parametrize("constant", [0.0, -0.0])
    def test_constant_zero_is_an_error_that_names_the_activation(self, observer, constant):
        seen = make_observer(replace(STATIC, observer=observer))
        seen(torch.full((4, 8), constant))
        with pytest.raises(CalibrationError, match=r"h\.0\.input was zero throughout"):
            seen.result("h.0.input")

    @per_observer
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity_are_errors(self, observer, bad):
        x = activation("gaussian")
        x[17, 3] = bad
        seen = make_observer(replace(STATIC, observer=observer))
        for batch in x.chunk(8):
            seen(batch)
        with pytest.raises(CalibrationError, match="h holds NaN or infinity"):
            seen.result("h")

    @per_observer
    def test_dead_channels_get_the_range_of_the_tensor(self, observer):
        x = 1e4 * activation("gaussian")
        x[:, 5] = 0
        scale = found(x, observer=observer, **GRANULARITIES["channel"]).scale
        assert torch.equal(scale[:, 5:6], found(x, observer="minmax").scale)

    def test_widths_that_change_are_an_error(self):
        seen = make_observer(replace(STATIC, **GRANULARITIES["channel"]))
        seen(torch.ones(4, 8))
        with pytest.raises(CalibrationError, match="batches of one width"):
            seen(torch.ones(4, 16))

    def test_scales_for_each_token_are_refused_when_batches_differ(self):
        seen = make_observer(replace(STATIC, qscheme="per_token"))
        seen(torch.ones(4, 8))
        with pytest.raises(CalibrationError, match="per_token"):
            seen(torch.ones(5, 8))

    def test_what_needs_no_data_has_no_observer(self):
        with pytest.raises(ConfigError, match="nothing to calibrate"):
            make_observer(replace(STATIC, is_dynamic=True))
        with pytest.raises(ConfigError, match="nothing to calibrate"):
            make_observer(QuantizationSpec(dtype="bfloat16"))

    def test_observers_of_weights_are_refused(self):
        with pytest.raises(ConfigError, match="search is for weights"):
            make_observer(replace(STATIC, observer="search"))


class TestFloatHistogram:
    def test_every_value_is_counted_in_the_bin_that_holds_it(self):
        values = activation("heavy-tailed").flatten()
        histogram = FloatHistogram(1)
        histogram.add(values.unsqueeze(0))
        low, high = histogram.edges()
        for index in (0, 100, histogram.bins - 1):
            inside = (values >= low[index]) & (values <= high[index])
            assert histogram.counts[0, histogram.bins + 1 + index] == inside.sum()
            inside = (values <= -low[index]) & (values >= -high[index])
            assert histogram.counts[0, histogram.bins - 1 - index] == inside.sum()
        assert histogram.counts.sum() == values.numel()

    def test_zeros_and_subnormal_numbers_count_as_zero(self):
        histogram = FloatHistogram(1)
        histogram.add(torch.tensor([[0.0, -0.0, 1e-40, -1e-40]]))
        histogram.add(torch.tensor([[0.0, 1.0, -1e-45]]))
        assert histogram.counts[0, histogram.bins] == 6
        assert histogram.counts.sum() == 7

    def test_bins_touch_and_are_a_tenth_of_a_percent_wide(self):
        histogram = FloatHistogram(1)
        histogram.add(torch.tensor([[1e-3, 7.0]]))
        low, high = histogram.edges()
        assert torch.equal(torch.nextafter(high[:-1], torch.tensor(torch.inf)), low[1:])
        assert bool((high / low < 1 + 2**-10).all())

    def test_points_stand_for_all_values_but_zeros(self):
        tiles = torch.stack([activation("gaussian").flatten(), activation("heavy-tailed").flatten()])
        tiles[0, :10] = 0
        histogram = FloatHistogram(2)
        histogram.add(tiles)
        points, counts = histogram.points()
        assert counts.sum(1).tolist() == [tiles.shape[1] - 10, tiles.shape[1]]
        torch.testing.assert_close((points * counts).sum(1), tiles.sum(1), rtol=1e-3, atol=0.5)
