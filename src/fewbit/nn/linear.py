"""The linear that blocks compute with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbit.errors import ArchitectureError
from fewbit.numerics import matmul


class Linear(nn.Linear):
    """nn.Linear on the fast product; the same name, so that recipes that go by class names find it."""

    smoothing: Tensor | None = None
    """[in]: the input is divided by this, until it is folded into the layer before."""
    input_quantizer: nn.Module | None
    output_quantizer: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        if (x.requires_grad or self.weight.requires_grad) and not self.quantizes:
            return super().forward(x)  # the fast product has no gradient
        return self.multiply(self.seen(x))

    @property
    def quantizes(self) -> bool:
        """Whether anything happens to inputs or outputs but the product."""
        return not (self.smoothing is None and self.input_quantizer is None and self.output_quantizer is None)

    def seen(self, x: Tensor) -> Tensor:
        """The input as the weight meets it: smoothed and quantized."""
        if self.smoothing is not None:
            x = x / self.smoothing
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def multiply(self, seen: Tensor) -> Tensor:
        """The output for an input as the weight meets it, quantized if outputs are."""
        product = matmul.linear(seen.reshape(-1, seen.shape[-1]), self.weight)
        if self.bias is not None:
            product += self.bias
        out = product.view(*seen.shape[:-1], product.shape[-1])  # there may be no token at all
        return out if self.output_quantizer is None else self.output_quantizer(out)


def adopt(module: nn.Module) -> None:
    """Make every nn.Linear below `module` a Linear, and families' own kinds of linears that compute the same. Weights
    and everything else stay."""
    for child in module.modules():
        if isinstance(child, nn.Linear) and not isinstance(child, Linear) and _is_plain(child):
            child.__class__ = Linear
            child.register_module("input_quantizer", None)
            child.register_module("output_quantizer", None)


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """A linear of a block by its name; ArchitectureError if it is none."""
    try:
        module = block.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(f"{type(block).__name__} has no linear {name!r}") from None
    if not isinstance(module, nn.Linear):
        raise ArchitectureError(f"{name!r} of {type(block).__name__} is a {type(module).__name__}, not a linear")
    return module


def _is_plain(linear: nn.Linear) -> bool:
    """Whether a linear holds nothing but weight and bias, and its class computes their product."""
    return linear.state_dict().keys() <= {"weight", "bias"} and multiplies(type(linear))


def multiplies(kind: type[nn.Module]) -> bool:
    """Whether a class of linears computes x Wᵀ + b whatever its code looks like: seen on a small one."""
    if kind.forward is nn.Linear.forward:
        return True
    if not issubclass(kind, nn.Linear):
        return False
    small = kind.__new__(kind)
    nn.Linear.__init__(small, 5, 3)
    x = torch.linspace(-1, 2, 10).view(2, 5)
    try:
        found = small(x)
    except (AttributeError, TypeError, RuntimeError):  # it needs what its own __init__ makes
        return False
    return isinstance(found, Tensor) and torch.allclose(found, nn.functional.linear(x, small.weight, small.bias))
