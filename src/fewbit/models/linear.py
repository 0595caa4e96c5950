"""The linear that blocks compute with."""

from __future__ import annotations

from torch import Tensor, nn

from fewbit.numerics import matmul


class Linear(nn.Linear):
    """nn.Linear on the fast product; the same name, so that recipes that go by class names find it."""

    smoothing: Tensor | None = None
    """[in]: the input is divided by this first, until the layer before is divided by it for good."""
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
        out = product.view(*seen.shape[:-1], -1)
        return out if self.output_quantizer is None else self.output_quantizer(out)


def adopt(module: nn.Module) -> None:
    """Make every plain nn.Linear below `module` a Linear. Weights and everything else stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = Linear
            child.register_module("input_quantizer", None)
            child.register_module("output_quantizer", None)
