"""The linear that blocks compute with."""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from fewbit.errors import ArchitectureError
from fewbit.nn.exchange import INSTANCES, Exchange, carry_over
from fewbit.nn.stepped import Stepped
from fewbit.numerics import matmul


class Linear(Stepped, nn.Linear):
    """nn.Linear on the fast product; the same name, so that recipes that go by class names find it."""

    saves_steps = False  # a block's tensors are its checkpoint's

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The same linear, with the same parameters and attributes, and no hooks."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        there = {*vars(made), *INSTANCES}
        vars(made).update({name: value for name, value in vars(linear).items() if name not in there})
        return made

    def multiply(self, seen: Tensor) -> Tensor:
        return product(seen, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] · weightᵀ [out, in] + bias → [..., out], in x's dtype."""
    out = matmul.linear(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        out += bias.to(out.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])  # there may be no token at all


def adopt(module: nn.Module) -> None:
    """Exchange every nn.Linear below `module` that holds nothing but weight and bias for a Linear, and families' own
    kinds of linears that compute the same. Parameters and hooks stay."""
    changes = Exchange()
    linears = [child for child in module.modules() if isinstance(child, nn.Linear) and not isinstance(child, Linear)]
    plain = [child for child in linears if child.state_dict().keys() <= {"weight", "bias"} and multiplies(child)]
    made: dict[nn.Module, nn.Module] = {child: Linear.from_linear(child) for child in plain}
    for child, new in made.items():
        carry_over(child, new)
    changes.replace(module, made)
    changes.commit()


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name; ArchitectureError if it is none."""
    try:
        module = block.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(f"{type(block).__name__} has no linear {name!r}") from None
    if not isinstance(module, nn.Linear):
        raise ArchitectureError(f"{name!r} of {type(block).__name__} is a {type(module).__name__}, not a linear")
    return module


def multiplies(linear: nn.Linear) -> bool:
    """Whether a linear computes x Wᵀ + b whatever its class's code looks like: tried on a copy with a small weight."""
    kind = type(linear)
    if kind.forward is nn.Linear.forward:
        return True
    small = copy.copy(linear)
    sizes = nn.Linear(5, 3, bias=linear.bias is not None, device="cpu", dtype=torch.float32)
    vars(small).update(_parameters=sizes._parameters, in_features=5, out_features=3)
    x = torch.linspace(-1, 2, 10).view(2, 5)
    try:
        found = kind.forward(small, x)
    except (AttributeError, TypeError, RuntimeError):  # it needs something else
        return False
    return isinstance(found, Tensor) and torch.allclose(found, sizes(x))
