"""Linears of other classes are taken over if they compute a product, and stay what they are if they do not."""

import copy

import pytest
import torch
from torch import nn

from fewbit.errors import ArchitectureError
from fewbit.nn.linear import Linear, adopt, linear_of


class Renamed(nn.Linear):
    pass


class Rewritten(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Extended(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.ones(()))


class Needy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.made_elsewhere


@pytest.mark.parametrize("kind", [nn.Linear, Renamed, Rewritten])
@pytest.mark.parametrize("bias", [True, False])
def test_what_computes_a_product_becomes_ours_and_computes_the_same(kind, bias):
    stack = nn.Sequential(kind(8, 4, bias=bias)).requires_grad_(False)
    before = copy.deepcopy(stack)
    adopt(stack)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert type(stack[0]) is Linear
    torch.testing.assert_close(stack(x), before(x))
    assert stack.state_dict().keys() == before.state_dict().keys()


def test_hooks_and_what_a_linear_was_given_stay_with_it():
    stack, seen = nn.Sequential(Renamed(8, 4)).eval(), []
    stack[0].note = "kept"
    handle = stack[0].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    adopt(stack)
    stack(torch.ones(1, 8))
    handle.remove()
    stack(torch.ones(1, 8))
    assert seen == [Linear]
    assert stack[0].note == "kept"
    assert not stack[0].training


@pytest.mark.parametrize("kind", [Scaled, Extended, Needy])
def test_what_computes_something_else_stays(kind):
    stack = nn.Sequential(kind(8, 4))
    adopt(stack)
    assert type(stack[0]) is kind


def test_a_linear_is_found_by_name_and_nothing_else_is():
    stack = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert linear_of(stack, "0") is stack[0]
    with pytest.raises(ArchitectureError, match="no linear '2'"):
        linear_of(stack, "2")
    with pytest.raises(ArchitectureError, match="'1' of Sequential is a ReLU"):
        linear_of(stack, "1")
