"""Linears with one input are found together, in the order in which they run, whichever batches reach them."""

import torch
from torch import nn

from fewbit.models.probe import shared_inputs


class Attention(nn.Module):
    def __init__(self, make=lambda: nn.Linear(8, 8)):
        super().__init__()
        # declared in another order than they run
        self.down, self.up, self.gate, self.o, self.v, self.k, self.q = (make() for _ in range(7))

    def forward(self, x):
        mixed = self.o(self.q(x) * self.k(x) + self.v(x))
        return self.down(self.gate(mixed) * self.up(mixed))


class Experts(nn.Module):
    """Tokens whose channel e is positive go to expert e."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(8, 8), "up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(4)
        )

    def forward(self, x):
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = x[..., number] > 0
            if chosen.any():
                part = x[chosen]
                total[chosen] += expert["down"](expert["gate"](part) * expert["up"](part))
        return self.out(total)


def groups_of(block, batches, names=None):
    names = names or [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    calls = []
    forwards = [lambda x=x: calls.append(block(x)) for x in batches]
    with torch.no_grad():
        found = shared_inputs(block, names, forwards)
    assert not any(module._forward_pre_hooks for module in block.modules())
    return tuple(group.members for group in found), len(calls)


def routed(*experts):
    x = -torch.ones(3, 8)
    x[:, list(experts)] = 1
    return x


def expert(number):
    return [(f"experts.{number}.gate", f"experts.{number}.up"), (f"experts.{number}.down",)]


def test_linears_with_one_input_are_one_group_in_order_of_execution():
    found, calls = groups_of(Attention(), [torch.randn(2, 3, 8)] * 4)
    assert found == (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    assert calls == 1


def test_only_the_named_linears_are_looked_at():
    found, _ = groups_of(Attention(), [torch.randn(2, 8)], ["q", "v", "up"])
    assert found == (("q", "v"), ("up",))


def test_a_linear_alone_is_its_own_group():
    assert groups_of(nn.Linear(8, 8), [torch.randn(2, 8)])[0] == (("",),)


def test_an_input_that_was_written_into_is_another_one():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x.clone()
            y = self.first(x)
            return y + self.second(x.mul_(2))

    assert groups_of(Writing(), [torch.randn(2, 8)])[0] == (("first",), ("second",))


def test_inputs_of_inference_mode_are_looked_at_too():
    with torch.inference_mode():
        x = torch.randn(2, 3, 8)
    assert groups_of(Attention(), [x])[0][0] == ("q", "k", "v")


def test_routed_linears_come_in_their_place_whichever_batch_reaches_them():
    expected = (*expert(0), *expert(1), *expert(2), *expert(3), ("out",))
    for batches in ([routed(1, 3), routed(0, 2)], [routed(3), routed(0, 1), routed(2, 3)], [routed(0, 1, 2, 3)]):
        assert groups_of(Experts(), batches)[0] == expected


def test_no_more_batches_run_than_are_needed():
    assert groups_of(Experts(), [routed(0, 1), routed(2, 3), routed(0), routed(1)])[1] == 2


def test_what_no_batch_reaches_is_in_no_group():
    found, calls = groups_of(Experts(), [routed(0, 2), routed(3)])
    assert found == (*expert(0), *expert(2), *expert(3), ("out",))
    assert calls == 2


def test_batches_that_contradict_each_other_still_give_every_linear_once():
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.b(self.a(x)) if x[0, 0] > 0 else self.a(self.b(x)) if x[0, 0] > -1 else self.c(x)

    batches = [torch.full((1, 8), value) for value in (1.0, -0.5, -2.0)]
    found, _ = groups_of(Turning(), batches)
    assert sorted(found) == [("a",), ("b",), ("c",)]
