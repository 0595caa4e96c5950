"""A scale type that fewbit does not know is one class: 6-bit scales of scales, as in K-quants, go everywhere."""

import pytest
import torch

import fewbit
from fewbit.algorithms.clip import clip
from fewbit.algorithms.gptq import gptq
from fewbit.algorithms.rtn import rtn
from fewbit.algorithms.scale_search import search_scales
from fewbit.calibration.observers import make_observer
from fewbit.calibration.statistics import Statistics
from fewbit.checkpoint.native import NativePart, block_file
from fewbit.config.algorithms import AWQConfig, GPTQConfig
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.activation import ActivationQuantizer
from fewbit.numerics.formats import FORMATS
from fewbit.numerics.scale_format import SCALE_TYPES, Float, ScaleFormat
from fewbit.numerics.scales import GridRule
from fewbit.numerics.search import RangeSearch
from fewbit.numerics.second_moment import quadratic_form

BLOCK, LARGEST = 8, 63
ROWS, COLUMNS = 45, 256  # blocks run along rows, of which there may be any number


class ScalesOfScales(ScaleFormat):
    """A float16 for 8 neighbouring groups, times 1 … 63 for each. Both are held in one int32 per group."""

    name = "6bit"
    own_dtype = torch.int32
    block = BLOCK

    def store(self, scale):
        blocks = scale.float().unflatten(-1, (-1, BLOCK))
        top = blocks.amax(-1, keepdim=True)
        wanted = torch.where(top == 0, 1.0, torch.where(blocks == 0, 1e-30, blocks))
        shared = self._shared(top / LARGEST)
        for largest in range(1, LARGEST + 1):  # what was stored before comes out again
            unit = self._shared(top / largest)
            exact = (unit * (wanted / unit).round() == wanted).all(-1, keepdim=True)
            shared = torch.where(exact, unit, shared)
        steps = (wanted / shared).round().clamp(1, LARGEST).nan_to_num(1.0)
        bits = shared.half().view(torch.int16).int() << 16
        return (bits | steps.int()).flatten(-2)

    def value(self, stored):
        return (stored >> 16).to(torch.int16).view(torch.float16).float() * (stored & LARGEST)

    def alternatives(self, covering):
        top = covering.unflatten(-1, (-1, BLOCK)).amax(-1, keepdim=True)
        for share in (1.0, 0.9, 0.8, 0.7):
            unit = self._shared(share * top / LARGEST).expand(*top.shape[:-1], BLOCK).flatten(-2)
            yield [unit * (each * covering / unit).round().clamp(1, LARGEST) for each in (1.0, 0.9, 0.8, 0.7, 0.6)]

    def stored_bits(self, scales):
        return 6 * scales + 16 * scales // BLOCK

    @staticmethod
    def _shared(unit):
        """Rounded to float16; a block of zeros has 1; what is not finite is NaN."""
        half = torch.where(unit == 0, 1.0, unit).half()
        smallest = torch.tensor(2.0**-24, dtype=torch.float16)
        return half.masked_fill(~half.isfinite(), torch.nan).maximum(smallest).float()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(SCALE_TYPES, ScalesOfScales.name, ScalesOfScales)


def spec(**fields):
    return QuantizationSpec(**{"dtype": "int3", "group_size": 16, "scale_type": "6bit"} | fields)


def problem():
    """A weight whose groups are of unlike size, and H of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    weight *= torch.exp2(torch.randn(ROWS, COLUMNS // 16, generator=generator)).repeat_interleave(16, 1)
    x = torch.randn(512, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 16
    return weight, x.T @ x


def loss(weight, moment, outcome):
    return float(quadratic_form(outcome.weight.dequantize() - weight, moment).sum())


def test_what_was_stored_is_stored_as_it_was():
    scale = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)).exp()
    scale[3, :BLOCK], scale[4, 2] = 0, 0
    format = ScalesOfScales(torch.int32)
    value = format.round(scale)
    assert torch.equal(format.round(value), value)
    assert (value > 0).all()


@pytest.mark.parametrize("importance", [None, "columns"])
def test_the_search_is_never_worse_than_the_covering_scales_and_near_float_ones(importance):
    weight, moment = problem()
    tiles = weight.unflatten(1, (-1, 16))
    costs = None if importance is None else moment.diagonal().view(-1, 16)

    def error(rule):
        stored, _ = rule.find(tiles, costs)
        by_tile = rule.error(tiles, rule.scale.value(stored), None, costs)
        return by_tile.unflatten(-1, (-1, BLOCK)).sum(-1)

    rule = GridRule(FORMATS["int3"], ScalesOfScales(torch.int32))
    searched = error(rule)
    assert (searched <= error(GridRule(FORMATS["int3"], rule.scale, rule="minmax")) * (1 + 1e-5)).all()
    assert searched.sum() < 1.15 * error(GridRule(FORMATS["int3"], Float(), signed=False)).sum()


def test_no_state_of_what_a_block_shares_is_better_than_the_one_that_was_found():
    weight, _ = problem()
    tiles = weight.unflatten(1, (-1, 16))
    rule = GridRule(FORMATS["int3"], ScalesOfScales(torch.int32))

    def error(value):
        return rule.error(tiles, value, None, None)

    found = error(rule.scale.value(rule.find(tiles)[0])).unflatten(-1, (-1, BLOCK)).sum(-1)
    for values in rule.scale.alternatives(rule.covering(tiles.abs().amax(-1))):
        best = torch.stack([error(value) for value in values]).amin(0)
        assert (found <= best.unflatten(-1, (-1, BLOCK)).sum(-1) * (1 + 1e-5)).all()


def test_no_share_of_the_ranges_is_better_than_the_ones_that_were_found():
    weight, _ = problem()
    tiles = weight.unflatten(1, (-1, 16))
    rule = GridRule(FORMATS["int3"], ScalesOfScales(torch.int32))
    low, high = tiles.amin(-1), tiles.amax(-1)

    def error(value, zero=None):
        return rule.error(tiles, value, zero, None)

    def of_blocks(value):
        return error(value).unflatten(-1, (-1, BLOCK)).sum(-1)

    shares = (0.9, 0.8, 0.7, 0.6)
    found = RangeSearch(rule, low, high, error)
    found.sweep(shares)
    assert torch.equal(rule.scale.round(found.value), found.value)
    for share in (1.0, *shares):
        stored, _ = rule.from_range(share * low, share * high)
        assert (of_blocks(found.value) <= of_blocks(rule.scale.value(stored)) * (1 + 1e-5)).all()


@pytest.mark.parametrize("observer", ["search", "mse", "minmax"])
def test_rounding_and_gptq_end_in_scales_that_can_be_stored(observer):
    weight, moment = problem()
    how = spec(observer=observer)
    format = how.scale_format(torch.bfloat16)
    rounded = rtn(weight, moment, how, format)
    compensated = gptq(weight, moment, how, format, GPTQConfig())
    assert loss(weight, moment, compensated) < 0.8 * loss(weight, moment, rounded)
    for outcome in (rounded, compensated):
        value = outcome.weight.scale_value
        assert torch.equal(format.round(value), value)
        assert outcome.weight.bits_per_weight == 3 + (6 + 2) / 16


def test_gptq_fits_the_scales_to_the_codes_jointly():
    weight, moment = problem()
    how = spec()
    format = how.scale_format(torch.bfloat16)
    fitted, found = (gptq(weight, moment, how, format, GPTQConfig(refits=refits)) for refits in (1, 0))
    assert loss(weight, moment, fitted) < loss(weight, moment, found)


def test_clipping_takes_them():
    weight, moment = problem()
    how = spec(dtype="e2m1", observer="minmax")  # whose largest element is the end of the range
    format = how.scale_format(torch.bfloat16)
    inside = moment * torch.block_diag(*[torch.ones(16, 16)] * (COLUMNS // 16))  # what clipping counts
    clipped = rtn(clip(weight, moment, how, format), None, how, format)
    assert loss(weight, inside, clipped) < 0.99 * loss(weight, inside, rtn(weight, None, how, format))


def test_the_search_for_channel_scales_takes_them():
    weight, moment = problem()
    found = search_scales([weight], [spec()], Statistics(moment, 512), AWQConfig())
    assert found.loss <= found.loss_before


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "moving-average"])
def test_observers_find_static_scales(observer):
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 16)
    how = spec(dtype="int4", qscheme="per_channel", ch_axis=1, group_size=None, observer=observer)

    def error(watched):
        watch = make_observer(watched)
        watch(x)
        return float((ActivationQuantizer(watched, watch.result())(x) - x).square().sum())

    plain = error(spec(dtype="int4", qscheme="per_channel", ch_axis=1, group_size=None, observer="minmax"))
    assert error(how) <= 1.1 * plain
    if observer == "mse":
        assert error(how) < 0.95 * plain


def test_how_many_scales_an_observer_works_on_at_a_time_does_not_matter(monkeypatch):
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    how = spec(dtype="int4", qscheme="per_channel", ch_axis=1, group_size=None, observer="mse")

    def result():
        watch = make_observer(how)
        watch(x)
        return watch.result().scale

    whole = result()
    monkeypatch.setattr("fewbit.calibration.observers.PIECE", 1)
    assert torch.equal(result(), whole)


def test_dynamic_activations_have_them():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    quantized = ActivationQuantizer(spec(dtype="int8", observer="minmax", is_dynamic=True))(x)
    assert 0 < float((quantized - x).abs().max()) < 0.1


def test_a_spec_says_where_they_cannot_be():
    with pytest.raises(ConfigError, match="symmetric specs"):
        spec(dtype="uint4", symmetric=False)
    with pytest.raises(ConfigError, match="ch_axis 0: scale_type 6bit stores the scales along a row jointly"):
        spec(ch_axis=0)
    with pytest.raises(ValueError, match="tiles of 1 × 128 do not divide"):
        spec().tiling.scale_shape((4, 64))


def test_a_run_is_stored_and_read_back(llama, quick, tmp_path):
    config = {"global_quant_config": {"weight": {"dtype": "int3", "group_size": 8, "scale_type": "6bit"}}}
    options = quick | {"algorithm": "gptq", "scheme": None, "group_size": None, "config": config}
    run = fewbit.quantize(llama, output=tmp_path / "run", **options)
    part = NativePart(block_file(run.directory, 0))
    assert all(how == spec(group_size=8) for how, _ in part.quantized.values())
    for name in part.quantized:
        weight = part.read_quantized(name)
        assert weight.scale.dtype == torch.int32
        assert torch.equal(weight.scale_format.round(weight.scale_value), weight.scale_value)
    with pytest.raises(ConfigError, match="6bit scales, which the format cannot hold"):
        run.export("compressed-tensors")


class Plain(ScalesOfScales):
    """The same, without an enumeration of its own."""

    name = "6bit plain"
    shares = (1.0, 0.9, 0.8, 0.7)
    alternatives = ScaleFormat.alternatives


class CoarsePlain(Float):
    """Floats of a coarse kind that enumerates nothing of its own."""

    name = "coarse"
    is_coarse = True


@pytest.mark.parametrize("kind", [Plain, CoarsePlain])
def test_a_type_that_enumerates_nothing_of_its_own_is_searched_at_its_shares(kind, monkeypatch):
    monkeypatch.setitem(SCALE_TYPES, kind.name, kind)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    errors = {}
    for observer in ("search", "minmax"):
        wanted = spec(scale_type=kind.name, observer=observer)
        found = rtn(weight, None, wanted, wanted.scale_format(torch.float32)).weight.dequantize()
        errors[observer] = float((found - weight).square().sum())
    assert errors["search"] < 0.97 * errors["minmax"]
