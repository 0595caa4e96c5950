"""A linear in integers alone: int8 in, int8 · int8 products added up in int32, a shift, int8 out.

If every scale is a power of two (scale_type "pof2": s = 2^−e), y = s_x · s_w · Σ x̂ŵ + b goes back to the grid of the
output without a multiplication (Jacob et al. 2018, arXiv:1712.05877, has arbitrary scales and needs one):

    Σ x̂ŵ + b̂          int32, in units of s_x · s_w = 2^−(e_x + e_w); the bias is rounded to these units
    ≫ e_x + e_w − e_y   to units of s_y; a negative shift goes left. Ties to even, then saturate

An output channel may have its own weight scale, and so its own shift; a negative one negates the sum. Several such
linears follow each other on codes: the output's scale of one is the input's scale of the next. What compares codes can
stay between them (ReLU, max-pooling, reshapes); an addition must first shift one activation to the other's scale.

What is not piecewise linear stays in float: SiLU, GELU and softmax (exponentials), norms (a square root, a division by
data), rotary embeddings (sines). An LLM's block is islands of integers; a network of linears and ReLU can be one.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fewbit.errors import CalibrationError, ConfigError
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.fake_quant import FakeQuantLinear

LARGEST_SUM = 2**30  # of 65536 products of int8; a bias below it cannot make an int32 overflow


class IntegerLinear(nn.Module):
    """int8 codes [..., in] → codes [..., out] (int8) with integer additions, multiplications and shifts.

    codes: int8 [out, in]. bias: int32 [out], in units of s_x · s_w. shift: int32 [out]. sign: int32 [out], ±1.
    scales, bits: of in- and output codes; scales are powers of two.
    """

    codes: Tensor
    bias: Tensor
    shift: Tensor
    sign: Tensor

    def __init__(
        self, codes: Tensor, bias: Tensor, shift: Tensor, sign: Tensor, scales: Sequence[float], bits: Sequence[int]
    ) -> None:
        super().__init__()
        for name, tensor in (("codes", codes), ("bias", bias), ("shift", shift), ("sign", sign)):
            self.register_buffer(name, tensor)
        self.input_scale, self.output_scale = scales
        self.input_bits, self.output_bits = bits

    @classmethod
    def from_module(cls, module: FakeQuantLinear) -> Self:
        """The integers behind a calibrated FakeQuantLinear.

        Its weight (per tensor or per channel), inputs and outputs (static, per tensor) must be symmetric integers with
        scale_type "pof2". It computes what the module computes, exactly, where the module's float sums are exact
        (|Σ| < 2^24 in float32) and its bias lies on the grid; a bias elsewhere is rounded to it.
        """
        if not isinstance(module, FakeQuantLinear):
            raise ConfigError(f"an integer-only linear is made of a FakeQuantLinear, not of {type(module).__name__}")
        weight = module.quantized_weight()
        if weight is None:
            raise ConfigError("an integer-only linear needs a quantized weight; name a spec for weight")
        if weight.scale.shape[1] != 1:
            raise ConfigError(f"the sum over inputs needs one scale per output, not {weight.spec.summary}")
        if not (weight.spec.format.is_integer and weight.spec.symmetric and weight.spec.scale_type == "pof2"):
            raise ConfigError(f"weight {weight.spec.summary}: use a symmetric integer dtype and scale_type pof2")
        if module.in_features * 2**14 > LARGEST_SUM:
            raise ConfigError(f"{module.in_features} products of int8 may not fit into int32; 65536 do")
        inputs = _shiftable(module.input_quantizer, "input_tensors")
        outputs = _shiftable(module.output_quantizer, "output_tensors")
        input_exponent, output_exponent = _exponent(inputs, "input_tensors"), _exponent(outputs, "output_tensors")
        scale = weight.scale_value.flatten().expand(module.out_features)
        exponent = torch.frexp(scale.abs()).exponent - 1 + input_exponent  # of the sum's units, one per output
        bias = torch.zeros(module.out_features, dtype=torch.int32, device=scale.device)
        if (floats := module.fake_bias()) is not None:
            units = torch.ldexp(floats.double(), -exponent).round()
            bias = units.clamp(-LARGEST_SUM, LARGEST_SUM - 1).to(torch.int32)
        shift, sign = (output_exponent - exponent).to(torch.int32), scale.sign().to(torch.int32)
        scales, bits = (2.0**input_exponent, 2.0**output_exponent), (inputs.spec.bits, outputs.spec.bits)
        return cls(weight.codes, bias, shift, sign, scales, bits)

    def forward(self, codes: Tensor) -> Tensor:
        """int8 [..., in] → int8 [..., out]. CPU: torch multiplies matrices of int32 only there."""
        total = codes.to(torch.int32) @ self.codes.to(torch.int32).T  # int32, as int8 matrix units add up
        return requantize(total * self.sign + self.bias, self.shift, self.output_bits)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of a float input [..., in]: where the integers begin."""
        return _saturate(torch.round(x / self.input_scale), self.input_bits)

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of output codes: where the integers end."""
        return codes.float() * self.output_scale


def requantize(total: Tensor, shift: Tensor, bits: int = 8) -> Tensor:
    """total · 2^−shift to the nearest integer, ties to even, saturated to `bits` (≤ 8) signed bits: int8. `total`
    int32 [..., out], `shift` int32 [out]. Integer operations only."""
    right = shift.clamp(0, 31)
    floor = total >> right
    rest = total - (floor << right)
    half = torch.where(right > 0, 1 << (right - 1).clamp(min=0), 1)  # without a shift there is no rest
    up = (rest > half) | ((rest == half) & (floor & 1 == 1))
    rounded = torch.where(shift > 31, 0, floor + up)  # beyond 31 less than half a step, whatever the total
    left = (-shift).clamp(0, bits)  # beyond that everything but 0 saturates
    return _saturate(_saturate(rounded, bits).to(torch.int32) << left, bits)


def _saturate(steps: Tensor, bits: int) -> Tensor:
    return steps.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def _shiftable(quantizer: ActivationQuantizer | None, field: str) -> ActivationQuantizer:
    """The quantizer; ConfigError if its scale is no power of two that is known beforehand."""
    if quantizer is None:
        raise ConfigError(f"an integer-only linear needs quantized in- and outputs; name a spec for {field}")
    spec = quantizer.spec
    spec.check_stored(field)
    pure = spec.format.is_integer and spec.symmetric and spec.scale_type == "pof2" and not spec.residual
    if not pure or spec.is_dynamic or spec.qscheme != "per_tensor" or spec.round_method != "half_even":
        raise ConfigError(f"{field} {spec.summary}: use a static, symmetric per_tensor integer with scale_type pof2")
    return quantizer


def _exponent(quantizer: ActivationQuantizer, field: str) -> int:
    """log2 of a calibrated scale."""
    if quantizer.scale is None:
        raise CalibrationError(f"{field} has no scale yet; run data through the model inside fewbit.calibrate first")
    return int(torch.frexp(quantizer.scale.float()).exponent) - 1
