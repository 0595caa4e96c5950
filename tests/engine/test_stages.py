"""Stops of a block's forward: their order, what each of them counts, and that what no data reached is an error."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fewbit.calibration.observers import make_observer
from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.engine.staged import StagedForward
from fewbit.engine.stages import (
    ATTENTION,
    INPUT,
    OUTPUT,
    SCALES,
    WEIGHTS,
    CalibrationStop,
    calibration_stops,
    stages_of,
)
from fewbit.errors import CalibrationError
from fewbit.models.architecture import Group
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import attach
from fewbit.nn.linear import adopt

CHANNELS = 16
STRATEGIES = ["staged", "replay"]
STATIC = QuantizationSpec(dtype="int4", qscheme="per_tensor", observer="minmax")
DYNAMIC = QuantizationSpec(dtype="int4", qscheme="per_token", observer="minmax", is_dynamic=True)
NVFP4 = QuantizationSpec(dtype="e2m1", group_size=16, scale_type="e4m3", observer="minmax", is_dynamic=True)
GROUPS = (Group(("q", "k")), Group(("o",)))


class Block(nn.Module):
    """q and k share an input, o comes after them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x):
        return x + self.o(self.q(x) * self.k(x))


class Experts(nn.Module):
    """Tokens go to the first expert; nobody chooses the second."""

    groups = (Group(("experts.0",)), Group(("experts.1",)))

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(2))

    def forward(self, x):
        return x + self.experts[0](x)


def make(kind=Block, groups=GROUPS, **configs):
    """A block whose linears quantize as `configs` says, by name (dots as _) or, for all of them, as `every`."""
    torch.manual_seed(0)
    block = kind().requires_grad_(False)
    adopt(block)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    every = configs.pop("every", None)
    wanted = {name: configs.get(name.replace(".", "_"), every) or QuantizationConfig() for name in linears}
    inputs = {f"{name}.input": config.input_tensors for name, config in wanted.items()}
    outputs = {f"{name}.output": config.output_tensors for name, config in wanted.items()}
    slots = {slot: spec for slot, spec in (inputs | outputs).items() if spec is not None}
    attach(block, slots, groups=[group.members for group in groups])
    return block


def inputs(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, CHANNELS, generator=generator) for shape in shapes]


SHAPES = [(2, 8), (1, 5), (3, 4)]


class Walked:
    """A block through which batches have gone: stops in the order of their decisions, statistics, outputs."""

    def __init__(self, block, batches, strategy, groups=GROUPS, masks=None, samples=None):
        self.order, self.statistics, self.outputs = [], {}, {}
        self.stops = calibration_stops(block, groups)
        for stop in self.stops:
            stop.finish = self._noting(stop)
        self.searched = {}
        stages = stages_of(block, groups, self._decide, self._scale, samples)
        forward = StagedForward(
            stages, masks or [None] * len(batches), lambda index: block(batches[index]), calibrations=self.stops
        )
        forward.run(self.outputs.__setitem__, strategy)

    def _noting(self, stop):
        finish = stop.finish

        def noting():
            self.order.append(stop.order)
            finish()

        return noting

    def _scale(self, stage):
        self.order.append(stage.order)
        self.searched[stage.name] = stage.statistics

    def _decide(self, stage):
        self.order.append(stage.order)
        self.statistics[stage.name] = None if stage.statistics is None else stage.statistics
        for linear in stage.members.values():
            linear.weight = nn.Parameter((linear.weight * 4).round() / 4, requires_grad=False)


# --- which stops there are ------------------------------------------------------------------------------------------


def test_a_quantizer_that_linears_share_is_one_stop():
    stops = calibration_stops(make(every=QuantizationConfig(input_tensors=STATIC)), GROUPS)
    assert [stop.order for stop in stops] == [(0, INPUT), (1, INPUT)]
    assert stops[0].quantizer is not stops[1].quantizer


@pytest.mark.parametrize(("spec", "count"), [(DYNAMIC, 0), (NVFP4, 2), (STATIC, 2)])
def test_only_what_data_can_tell_is_a_stop(spec, count):
    assert len(calibration_stops(make(every=QuantizationConfig(input_tensors=spec)), GROUPS)) == count


def test_a_quantizer_that_knows_its_scale_is_no_stop():
    block = make(every=QuantizationConfig(input_tensors=STATIC))
    observer = make_observer(STATIC)
    observer(torch.ones(1, CHANNELS))
    block.o.input_quantizer.load(observer.result())
    assert [stop.order for stop in calibration_stops(block, GROUPS)] == [(0, INPUT)]


def test_outputs_have_stops_of_their_own_behind_the_weights():
    stops = calibration_stops(make(every=QuantizationConfig(output_tensors=STATIC)), GROUPS)
    assert [stop.order for stop in stops] == [(0, OUTPUT), (0, OUTPUT), (1, OUTPUT)]
    assert INPUT < WEIGHTS < OUTPUT < ATTENTION


def test_attention_stops_behind_the_linears_that_feed_it(checkpoint):
    model = BlockwiseModel.from_directory(checkpoint("llama"))
    attention.attach(model.skeleton, AttentionConfig(key=STATIC, value=STATIC, query=DYNAMIC))
    stops = calibration_stops(model.blocks[1], model.groups(1))
    assert [stop.order for stop in stops] == [(0, ATTENTION), (0, ATTENTION)]


# --- what they see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_are_decided_before_weights_and_outputs_after_them(strategy):
    block = make(every=QuantizationConfig(input_tensors=STATIC, output_tensors=STATIC))
    walked = Walked(block, inputs(*SHAPES), strategy)
    assert walked.order == [
        (0, INPUT), (0, WEIGHTS), (0, OUTPUT), (0, OUTPUT), (1, INPUT), (1, WEIGHTS), (1, OUTPUT),
    ]  # fmt: skip
    assert sorted(walked.outputs) == [0, 1, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("observer", ["minmax", "moving-average", "percentile"])
def test_a_scale_is_that_of_all_batches_without_padding(strategy, observer):
    spec = replace(STATIC, observer=observer)
    batches = inputs(*SHAPES)
    masks = [None, torch.tensor([[True, False, True, True, False]]), None]
    batches[1][0, 1] = 1000.0
    block = make(every=QuantizationConfig(input_tensors=spec))
    Walked(block, batches, strategy, masks=masks)
    expected = make_observer(spec)
    for x, mask in zip(batches, masks, strict=True):
        expected(x if mask is None else x[mask])
    assert torch.equal(block.q.input_quantizer.scale, expected.result().scale)
    assert block.q.input_quantizer is block.k.input_quantizer


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spec", [STATIC, DYNAMIC, NVFP4], ids=lambda spec: spec.summary)
def test_statistics_are_of_the_quantized_input_and_outputs_of_the_quantized_block(strategy, spec):
    block, batches = make(every=QuantizationConfig(input_tensors=spec)), inputs(*SHAPES)
    walked = Walked(block, batches, strategy)
    rows = torch.cat([block.q.input_quantizer(x).flatten(0, 1) for x in batches]).double()
    torch.testing.assert_close(walked.statistics["q"].moment.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    rows = torch.cat([block.o.seen(block.q(x) * block.k(x)).flatten(0, 1) for x in batches]).double()
    torch.testing.assert_close(walked.statistics["o"].moment.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)
    for index, x in enumerate(batches):
        torch.testing.assert_close(walked.outputs[index], block(x))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stage_whose_scales_are_searched_sees_the_input_as_it_comes_and_keeps_a_sample(strategy):
    block, batches = make(every=QuantizationConfig(input_tensors=STATIC)), inputs(*SHAPES)
    walked = Walked(block, batches, strategy, samples={0: 6})
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    found = walked.searched["q"]
    torch.testing.assert_close(found.moment, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.sample.shape == (6, CHANNELS)
    assert {tuple(row.tolist()) for row in found.sample} <= {tuple(row.tolist()) for row in rows}
    assert list(walked.searched) == ["q"]
    assert walked.statistics["q"].sample is None
    met = torch.cat([block.q.input_quantizer(x).flatten(0, 1) for x in batches])
    torch.testing.assert_close(walked.statistics["q"].moment, met.T @ met, rtol=1e-4, atol=1e-4)
    assert walked.order[:3] == [(0, SCALES), (0, INPUT), (0, WEIGHTS)]  # the range is known once channels are scaled


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_range_is_that_of_the_smoothed_input(strategy):
    block, batches = make(every=QuantizationConfig(input_tensors=STATIC)), inputs(*SHAPES)
    columns = torch.linspace(0.5, 4.0, CHANNELS)
    stages = stages_of(block, GROUPS, lambda stage: None, lambda stage: _smooth(stage, columns), {0: 1})
    stops = calibration_stops(block, GROUPS)
    StagedForward(stages, [None] * 3, lambda index: block(batches[index]), calibrations=stops).run(
        lambda index, output: None, strategy
    )
    largest = max(float((x / columns).abs().max()) for x in batches)
    assert float(block.q.input_quantizer.scale) == pytest.approx(largest / 7.5)


def _smooth(stage, columns):
    for linear in stage.members.values():
        linear.divide(columns)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_members_with_specs_of_their_own_are_each_calibrated(strategy):
    other = QuantizationSpec(dtype="e4m3", qscheme="per_tensor", observer="minmax")
    block = make(q=QuantizationConfig(input_tensors=STATIC), k=QuantizationConfig(input_tensors=other))
    batches = inputs(*SHAPES)
    Walked(block, batches, strategy)
    largest = max(float(x.abs().max()) for x in batches)
    assert float(block.q.input_quantizer.scale) == pytest.approx(largest / 7.5)
    assert float(block.k.input_quantizer.scale) == pytest.approx(largest / 448)
    assert block.o.input_quantizer is None


def test_staged_and_replay_give_the_same_bits():
    made = []
    for strategy in STRATEGIES:
        block = make(every=QuantizationConfig(input_tensors=STATIC, output_tensors=NVFP4))
        walked = Walked(block, inputs(*SHAPES), strategy)
        scales = [module.scale for module in block.modules() if isinstance(module, ActivationQuantizer)]
        moments = [found.moment for found in walked.statistics.values()]
        made.append([tensor for tensor in (*scales, *moments, *walked.outputs.values()) if tensor is not None])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_observes_any_more_after_a_run_or_a_failure(strategy):
    for broken in (False, True):
        block, batches = make(every=QuantizationConfig(input_tensors=STATIC)), inputs(*SHAPES)
        if broken:
            block.q.bias[0] = torch.nan
            with pytest.raises(CalibrationError, match="NaN or infinity"):
                Walked(block, batches, strategy)
        else:
            Walked(block, batches, strategy)
        left = [module for module in block.modules() if isinstance(module, ActivationQuantizer) and module.observer]
        assert left == []
        assert not any("forward" in vars(module) for module in block.modules())


# --- what cannot be decided -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_static_scale_that_no_data_reached_is_an_error_that_names_it(strategy):
    block = make(Experts, Experts.groups, every=QuantizationConfig(input_tensors=STATIC))
    with pytest.raises(CalibrationError, match=r"experts\.1\.input.* saw no data in calibration"):
        Walked(block, inputs(*SHAPES), strategy, groups=Experts.groups)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_that_no_data_reached_are_still_decided(strategy):
    block = make(Experts, Experts.groups, every=QuantizationConfig(input_tensors=DYNAMIC))
    walked = Walked(block, inputs(*SHAPES), strategy, groups=Experts.groups)
    assert walked.statistics["experts.1"] is None
    assert walked.statistics["experts.0"].tokens == 16 + 5 + 12


def test_data_of_zeros_is_an_error_that_names_the_activation():
    block = make(every=QuantizationConfig(input_tensors=STATIC))
    with pytest.raises(CalibrationError, match=r"q\.input.* was zero throughout calibration"):
        Walked(block, [torch.zeros(1, 4, CHANNELS)], "staged")


def test_what_was_counted_before_a_reset_does_not_count():
    stop = CalibrationStop((0, INPUT), "q.input", ActivationQuantizer(STATIC))
    stop.add(torch.full((1, CHANNELS), 99.0), None, None)
    stop.reset()
    stop.add(torch.full((1, CHANNELS), -15.0), None, None)
    stop.finish()
    assert stop.done
    assert float(stop.quantizer.scale) == 2.0
