"""Blocks that choose, reorder and give back tokens: each statistic is that of the tokens that it should be of.

Tokens do not see each other in these blocks, so the oracle runs every token by itself, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fewbit.calibration.statistics import Statistics
from fewbit.config.algorithms import GPTQConfig
from fewbit.engine.reference import ReferenceForward
from fewbit.engine.sequential import run_gptq_for_sequential_layers
from fewbit.engine.staged import StagedForward
from fewbit.engine.stages import stages_of
from fewbit.models.architecture import Group
from fewbit.models.forward_manager import LayerForwardManager
from fewbit.models.probe import shared_inputs
from fewbit.models.token_identity import TokenIdentity

CHANNELS, EXPERTS = 16, 3
NAMES = [f"experts.{number}.{name}" for number in range(EXPERTS) for name in ("up", "down")]


class Chosen(nn.Module):
    """Every expert is called with the tokens that chose it (as Mixtral was written)."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.router = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, EXPERTS)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(CHANNELS, 24), "down": nn.Linear(24, CHANNELS)}) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed = x + self.proj(x)
        flat = mixed.reshape(-1, CHANNELS)
        return mixed + self.routed(flat, self.router(flat).argmax(-1)).view_as(mixed)

    def expert(self, number: int, x: Tensor) -> Tensor:
        return self.experts[number]["down"](nn.functional.silu(self.experts[number]["up"](x)))

    def routed(self, flat: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(flat)
        for number in range(EXPERTS):
            (places,) = torch.where(chosen == number)
            total.index_add_(0, places, self.expert(number, flat[places]))
        return total


class Sorted(Chosen):
    """Tokens are sorted by their expert, cut, and put back (as grouped products want them)."""

    def routed(self, flat: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort(stable=True)
        parts = flat.index_select(0, order).split(torch.bincount(chosen, minlength=EXPERTS).tolist())
        mixed = torch.cat([self.expert(number, part) for number, part in enumerate(parts)])
        return mixed[order.argsort()]


class Turned(nn.Module):
    """All tokens go through one linear in another order: as many as came, none where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.inner = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        order = x[..., 0].flatten().argsort()
        mixed = (x + self.proj(x)).view(-1, CHANNELS)[order]
        return self.inner(mixed)[order.argsort()].view_as(x)


class Heads(nn.Module):
    """Every token has a row for each of its heads in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.inner = nn.Linear(CHANNELS, CHANNELS), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (x + self.proj(x)).view(*x.shape[:-1], 4, 4)
        return self.inner(mixed).flatten(-2)


KINDS = {"chosen": Chosen, "sorted": Sorted, "turned": Turned, "heads": Heads}


def made(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return KINDS[kind]().requires_grad_(False)


def batches() -> tuple[list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 9, CHANNELS, generator=generator) for _ in range(3)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, 7:] = False
    inputs[1][~mask] = 50.0  # whatever sees padding is found out
    return inputs, [None, mask, None]


def coarse(weight: Tensor) -> nn.Parameter:
    """Rounded so roughly that some tokens choose another expert."""
    return nn.Parameter((weight * 3).round() / 3, requires_grad=False)


def groups_of(block: nn.Module) -> tuple[Group, ...]:
    inputs, _ = batches()
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and name != "router"]
    return shared_inputs(block, names, [lambda x=x: block(x) for x in inputs])


def walked(kind: str, strategy: str, drift: bool) -> tuple[dict[str, Statistics], list[str]]:
    """Statistics of every group by its first linear, each quantized when they are complete; names in that order."""
    block, (inputs, masks), found = made(kind), batches(), {}
    groups = groups_of(block)
    original = copy.deepcopy(block)

    def decide(stage) -> None:
        found[stage.name] = stage.statistics
        for linear in stage.members.values():
            linear.weight = coarse(linear.weight)

    reference, full, identity = None, list(inputs), TokenIdentity()
    if drift:
        reference = ReferenceForward(
            original, groups, range(3), lambda index: original(inputs[index]), full.__setitem__
        )
    with identity.following(block, original):
        staged = StagedForward(
            stages_of(block, groups, decide), masks, lambda index: block(inputs[index]), reference, (), identity
        )
        staged.run(lambda index, output: None, strategy)
    return found, [group.members[0] for group in groups]


def oracle(kind: str, order: list[str]) -> dict[str, tuple[Tensor, Tensor, int, int]]:
    """H, drift, tokens and tokens of the drift of each linear, a token at a time."""
    inputs, masks = batches()
    tokens = torch.cat([x.flatten(0, 1) if mask is None else x[mask] for x, mask in zip(inputs, masks, strict=True)])
    block, original, found = made(kind).double(), made(kind).double(), {}
    for name in order:
        rows, pairs = [], []
        for token in tokens.double():
            seen = []
            for model in (block, original):
                caught: list[Tensor] = []
                hook = model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, caught=caught: caught.append(args[0].reshape(-1, args[0].shape[-1]))
                )
                model(token.view(1, 1, CHANNELS))
                hook.remove()
                seen.append(torch.cat(caught) if caught else token.new_zeros(0, 1))
            if len(seen[0]):
                rows.append(seen[0])
                pairs += [(seen[1], seen[0])] if len(seen[1]) else []
        x = torch.cat(rows)
        drift = sum((full - now).T @ now for full, now in pairs)
        paired = sum(len(now) for _, now in pairs)
        found[name] = (x.T @ x, drift * len(x) / paired, len(x), paired)
        block.get_submodule(name).weight = coarse(block.get_submodule(name).weight)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_tells_which_groups_are_routed(kind: str) -> None:
    routed = {name: group.routed for group in groups_of(made(kind)) for name in group.members}
    expected = (
        {"proj": False, "inner": True} if kind in ("turned", "heads") else {"proj": False} | dict.fromkeys(NAMES, True)
    )
    assert routed == expected


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("strategy", ["staged", "replay"])
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_tokens_that_came_without_padding(kind: str, strategy: str, drift: bool) -> None:
    found, order = walked(kind, strategy, drift)
    expected = oracle(kind, order)
    assert sum(tokens for name, (*_, tokens, _) in expected.items() if name.endswith("up")) in (0, 3 * 18 - 6)
    some_lost = False
    for name, (moment, moved, tokens, paired) in expected.items():
        assert found[name].tokens == tokens
        torch.testing.assert_close(found[name].moment.double(), moment, rtol=1e-4, atol=1e-4 * float(moment.max()))
        if drift:
            assert found[name].drift_tokens == paired
            limit = 1e-4 * float(moved.abs().max()) + 1e-5
            torch.testing.assert_close(found[name].drift.double(), moved, rtol=1e-4, atol=limit)
            some_lost |= paired < tokens
    assert some_lost == (drift and kind not in ("turned", "heads")), "rounding should send some tokens elsewhere"


@pytest.mark.parametrize("drift", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["chosen", "sorted"])
def test_layers_in_memory_leave_padding_out_of_their_experts(kind: str, drift: float) -> None:
    """Tokens do not see each other, so a padded batch is worth what its sequences are without padding."""
    inputs, masks = batches()
    mask = masks[1].long()
    padded = [inputs[0], {"input_tensor": inputs[1], "kwargs": {"attention_mask": mask}}, inputs[2]]
    cut = [inputs[0], *(x[m][None] for x, m in zip(inputs[1], masks[1], strict=True)), inputs[2]]
    manager = LayerForwardManager({kind: lambda layer, x, **_: layer(x) for kind in KINDS.values()})
    found = []
    for given in (padded, cut):
        layers = [made(kind), made(kind)]
        results = run_gptq_for_sequential_layers(
            layers, given, "W4A16-g8", GPTQConfig(drift=drift), exclude=["*.router"], forward=manager
        )
        found.append({name: (result.tokens, result.fallback) for name, result in results.items()})
        found.append({name: result.loss for name, result in results.items()})
    assert found[0] == found[2]
    assert found[1] == pytest.approx(found[3], rel=0.02)


def test_tokens_that_nobody_could_follow_do_not_count() -> None:
    class Lost(Turned):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.cumsum(x.view(-1, CHANNELS), 0).flip(0)[:7])

    torch.manual_seed(0)
    block, (inputs, masks), found = Lost().requires_grad_(False), batches(), {}
    groups = (Group(("inner",), routed=True),)
    identity = TokenIdentity()
    with identity.following(block):
        staged = StagedForward(
            stages_of(block, groups, lambda stage: found.update({stage.name: stage.statistics})),
            masks,
            lambda index: block(inputs[index]),
            identity=identity,
        )
        staged.run(lambda index, output: None, "staged")
    assert found["inner"].tokens == 14, "of the two batches without padding every row counts, of the other none"
