"""The staged forward sees what true-sequential calibration sees, and leaves nothing behind."""

import gc

import pytest
import torch
from torch import nn

from fewbit.calibration.statistics import Statistics
from fewbit.engine.staged import StagedForward
from fewbit.engine.stages import stages_of
from fewbit.errors import ArchitectureError, CalibrationError
from fewbit.models.architecture import Group
from fewbit.models.blockwise import BlockwiseModel

CHANNELS = 16
STRATEGIES = ["staged", "replay"]


def grouped(*groups):
    """Groups of the named linears."""
    return tuple(Group(members) for members in groups)


class Attention(nn.Module):
    """A block like a decoder layer: q, k, v share an input, then o, then gate and up, then down."""

    groups = grouped(("q", "k", "v"), ("o",), ("gate", "up"), ("down",))

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.gate, self.up = (nn.Linear(CHANNELS, 24) for _ in range(2))
        self.down = nn.Linear(24, CHANNELS)

    def forward(self, x):
        normed = nn.functional.layer_norm(x, x.shape[-1:])
        scores = (self.q(normed) @ self.k(normed).mT).softmax(-1)
        x = x + self.o(scores @ self.v(normed))
        normed = nn.functional.layer_norm(x, x.shape[-1:])
        return x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))


class Experts(nn.Module):
    """Each token goes to the experts that its first channels choose; an expert without tokens is not called."""

    groups = grouped(("proj",), ("experts.0.up",), ("experts.0.down",), ("experts.1.up",), ("experts.1.down",),
              ("experts.2.up",), ("experts.2.down",), ("out",))  # fmt: skip

    def __init__(self):
        super().__init__()
        self.proj, self.out = (nn.Linear(CHANNELS, CHANNELS) for _ in range(2))
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(CHANNELS, 24), "down": nn.Linear(24, CHANNELS)}) for _ in range(3)
        )

    def forward(self, x):
        chosen = [x[..., number] > 0 for number in range(3)]
        mixed = x + self.proj(x)
        total = torch.zeros_like(mixed)
        for expert, mask in zip(self.experts, chosen, strict=True):
            if mask.any():
                total[mask] += expert["down"](expert["up"](mixed[mask]).relu())
        return x + self.out(total)


class Flat(nn.Module):
    """Like OPT: the second linear gets the batch's tokens in one long row."""

    groups = grouped(("first",), ("second",))

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(CHANNELS, CHANNELS) for _ in range(2))

    def forward(self, x):
        return self.second(self.first(x).reshape(-1, CHANNELS)).view(x.shape)


def inputs(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, CHANNELS, generator=generator) for shape in shapes]


def routed(*routes, seed=0):
    """Batches of 5 tokens; each says which experts all of its tokens choose."""
    batches = inputs(*[(1, 5)] * len(routes), seed=seed)
    for x, route in zip(batches, routes, strict=True):
        for expert in range(3):
            x[..., expert] = x[..., expert].abs() * (1 if expert in route else -1)
    return batches


def coarse(weight):
    """A quantization so rough that a stage which sees the unquantized weights is found out."""
    return nn.Parameter((weight * 4).round() / 4, requires_grad=False)


def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind().requires_grad_(False)


def run(block, batches, strategy, masks=None, groups=None, forward=None):
    """Statistics of every stage by name, in the order in which stages were finished, and the outputs."""
    statistics, outputs = {}, {}

    def finish(stage):
        seen = stage.statistics
        statistics[stage.name] = None if seen is None else Statistics(seen.moment.clone(), seen.tokens)
        for linear in stage.members.values():
            linear.weight = coarse(linear.weight)

    def emit(index, output):
        assert index not in outputs
        outputs[index] = output.clone()

    StagedForward(
        stages_of(block, groups or block.groups, finish),
        masks or [None] * len(batches),
        forward or (lambda index: block(batches[index])),
    ).run(emit, strategy)
    return statistics, outputs


def true_sequential(block, batches, masks=None, groups=None, forward=None):
    """The plain way: for each stage the whole block again on all batches, a hook, H in float64, then quantize."""
    masks = masks or [None] * len(batches)
    forward = forward or (lambda index: block(batches[index]))
    moments, tokens = {}, {}
    for group in groups or block.groups:
        rows = []
        for index, mask in enumerate(masks):
            caught = []
            hook = block.get_submodule(group.members[0]).register_forward_pre_hook(
                lambda _module, args, caught=caught: caught.append(args[0])
            )
            forward(index)
            hook.remove()
            for x in caught:
                flat = x.reshape(-1, x.shape[-1]).double()
                rows.append(flat if mask is None else flat[mask.flatten()])
        stacked = torch.cat(rows) if rows else torch.zeros(0, 1)
        moments[group.members[0]], tokens[group.members[0]] = stacked.T @ stacked, stacked.shape[0]
        for name in group.members:
            linear = block.get_submodule(name)
            linear.weight = coarse(linear.weight)
    return moments, tokens, {index: forward(index) for index in range(len(masks))}


def assert_same_bits(one, other):
    (statistics, outputs), (other_statistics, other_outputs) = one, other
    assert list(statistics) == list(other_statistics)
    for name, seen in statistics.items():
        if seen is None:
            assert other_statistics[name] is None
            continue
        assert seen.tokens == other_statistics[name].tokens
        assert torch.equal(seen.moment, other_statistics[name].moment), name
    assert sorted(outputs) == sorted(other_outputs)
    assert all(torch.equal(outputs[index], other_outputs[index]) for index in outputs)


def assert_equals_true_sequential(found, expected):
    statistics, outputs = found
    moments, tokens, expected_outputs = expected
    assert {name: seen.tokens if seen else 0 for name, seen in statistics.items()} == tokens
    for name, seen in statistics.items():
        if seen is not None:
            torch.testing.assert_close(seen.moment.double(), moments[name], rtol=1e-4, atol=1e-4)
    assert sorted(outputs) == sorted(expected_outputs)
    for index, output in outputs.items():
        torch.testing.assert_close(output, expected_outputs[index], rtol=1e-5, atol=1e-5)


def padded(*shapes):
    masks = [torch.ones(*shape, dtype=torch.bool) for shape in shapes]
    for mask in masks:
        mask[-1, :3] = False
    return masks


SHAPES = [(2, 8), (1, 5), (3, 8), (1, 13)]
ROUTES = [(0, 1), (1,), (0,), (1,), (0, 1), ()]  # nobody chooses expert 2
CASES = {
    "attention": (Attention, inputs(*SHAPES), None),
    "attention, padding": (Attention, inputs(*SHAPES), padded(*SHAPES)),
    "one batch": (Attention, inputs((2, 8)), None),
    "experts": (Experts, routed(*ROUTES), None),
    "experts, the later first": (Experts, routed((1,), (0, 1), (0,)), None),
    "experts that nobody reaches": (Experts, routed((), ()), None),
    "flattened": (Flat, inputs(*SHAPES), None),
    "flattened, padding": (Flat, inputs(*SHAPES), padded(*SHAPES)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", list(CASES))
def test_statistics_and_outputs_are_those_of_true_sequential_calibration(case, strategy):
    kind, batches, masks = CASES[case]
    expected = true_sequential(make(kind), batches, masks)
    assert_equals_true_sequential(run(make(kind), batches, strategy, masks), expected)


@pytest.mark.parametrize("case", list(CASES))
def test_staged_and_replay_give_the_same_bits(case):
    kind, batches, masks = CASES[case]
    assert_same_bits(run(make(kind), batches, "staged", masks), run(make(kind), batches, "replay", masks))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_of_every_family_are_calibrated_true_sequentially(checkpoint, family, strategy):
    model = BlockwiseModel.from_directory(checkpoint(family))
    ids = torch.randint(304, (3, 2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :7] = 0
    batches = [{"input_ids": ids[0]}, {"input_ids": ids[1], "attention_mask": mask}, {"input_ids": ids[2][:, :11]}]
    masks = [None, mask.bool(), None]
    entered = list(model.enter(batches))
    index = len(model) - 1

    def walk(function, *arguments):
        with model.loaded(index) as block, torch.no_grad():
            return function(
                block,
                batches,
                *arguments,
                masks=masks,
                groups=model.groups(index),
                forward=lambda i: model.call_block(block, entered[i].hidden, entered[i].calls[index]),
            )

    found = walk(run, strategy)
    assert {seen.tokens for seen in found[0].values()} == {48 + 41 + 22}
    assert_equals_true_sequential(found, walk(true_sequential))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stages_are_finished_once_each_in_order(strategy):
    statistics, _ = run(make(Attention), inputs(*SHAPES), strategy)
    assert list(statistics) == ["q", "o", "gate", "down"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_expert_that_no_token_reached_is_finished_without_statistics(strategy):
    statistics, outputs = run(make(Experts), routed(*ROUTES), strategy)
    unreached = {name for name, seen in statistics.items() if seen is None}
    assert unreached == {"experts.2.up", "experts.2.down"}
    assert statistics["experts.0.up"].tokens == 5 * 3
    assert statistics["experts.1.up"].tokens == 5 * 4
    assert sorted(outputs) == list(range(len(ROUTES)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stage_called_in_another_order_than_listed_still_sees_all_its_tokens(strategy):
    block, batches = make(Attention), inputs(*SHAPES)
    tokens = sum(x.shape[0] * x.shape[1] for x in batches)
    statistics, _ = run(block, batches, strategy, groups=grouped(("down",), ("gate", "up"), ("q", "k", "v"), ("o",)))
    assert {name: seen.tokens for name, seen in statistics.items()} == dict.fromkeys(
        ("q", "o", "gate", "down"), tokens
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_linears_in_no_group_are_left_alone(strategy):
    block = make(Attention)
    before = block.o.weight.clone()
    statistics, _ = run(block, inputs(*SHAPES), strategy, groups=grouped(("q", "k", "v"), ("down",)))
    assert list(statistics) == ["q", "down"]
    assert torch.equal(block.o.weight, before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_batches_finish_every_stage_without_statistics(strategy):
    statistics, outputs = run(make(Attention), [], strategy)
    assert statistics == dict.fromkeys(("q", "o", "gate", "down"))
    assert outputs == {}


class TwoNorms(nn.Module):
    """q and k have inputs of the same size; that of q is freed before that of k is made, often in the same place."""

    groups = grouped(("q", "k"))

    def __init__(self):
        super().__init__()
        self.q, self.k = (nn.Linear(CHANNELS, CHANNELS) for _ in range(2))

    def forward(self, x):
        queries = self.q(x * 2)
        return queries + self.k(x * 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("kind", "groups", "names"),
    [(Attention, grouped(("q", "k", "v", "o")), ("o", "q")), (TwoNorms, TwoNorms.groups, ("k", "q"))],
    ids=["input kept", "input freed"],
)
def test_linears_grouped_that_do_not_share_an_input_are_an_error(kind, groups, names, strategy):
    with pytest.raises(ArchitectureError, match=f"'{names[0]}' does not have the same input as '{names[1]}'"):
        run(make(kind), inputs(*SHAPES), strategy, groups=groups)


@pytest.mark.parametrize(("name", "reason"), [("absent", "no linear 'absent'"), ("experts", "not a linear")])
def test_a_group_that_names_no_linear_is_an_error(name, reason):
    with pytest.raises(ArchitectureError, match=reason):
        run(make(Experts), [], "staged", groups=grouped((name,)))


def patched(block):
    return [name for name, module in block.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_left_patched_after_a_run(strategy):
    block = make(Attention)
    run(block, inputs(*SHAPES), strategy)
    assert patched(block) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("failing", [0, 2])
def test_an_exception_in_a_forward_reaches_the_caller_and_leaves_nothing_patched(strategy, failing):
    block, batches = make(Attention), inputs(*SHAPES)
    block.down.register_forward_pre_hook(
        lambda _module, args: (
            (_ for _ in ()).throw(ZeroDivisionError) if args[0].shape[:2] == SHAPES[failing] else None
        )
    )
    with pytest.raises(ZeroDivisionError):
        run(block, batches, strategy)
    assert patched(block) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_in_finish_reaches_the_caller_and_the_suspended_forwards_die(strategy):
    block, batches, ended = make(Attention), inputs(*SHAPES), []

    def forward(index):
        try:
            return block(batches[index])
        finally:
            ended.append(index)

    def finish(stage):
        if stage.name == "gate":
            raise ZeroDivisionError

    stages = stages_of(block, block.groups, finish)
    with pytest.raises(ZeroDivisionError):
        StagedForward(stages, [None] * 4, forward).run(lambda index, output: None, strategy)
    gc.collect()
    assert patched(block) == []
    assert set(ended) == {0, 1, 2, 3}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_in_the_input_of_a_linear_is_an_error_that_names_it(strategy):
    block = make(Attention)
    block.v.bias.data[3] = torch.nan
    with pytest.raises(CalibrationError, match="'o' holds NaN"):
        run(block, inputs(*SHAPES), strategy)
    assert patched(block) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_off_inside(strategy):
    enabled = []
    block, (batch,) = make(Attention), inputs((1, 4))

    def forward(index):
        enabled.append(torch.is_grad_enabled())
        return block(batch)

    run(block, [batch], strategy, forward=forward)
    assert enabled
    assert not any(enabled)


def test_a_block_in_inference_mode_is_refused_and_leaves_none_behind():
    class Inferring(Flat):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    with pytest.raises(ArchitectureError, match=r"'first' runs inside of torch.inference_mode"):
        run(make(Inferring), inputs((1, 3), (1, 3)), "staged")
    assert not torch.is_inference_mode_enabled()
