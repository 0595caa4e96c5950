"""A linear that holds its weight as packed codes and runs: the forward dequantizes some rows at a time, so of the
float weight only a few megabytes exist at once.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit import process
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn.exchange import carry_over
from fewbit.nn.in_memory import check_plain
from fewbit.nn.linear import multiplies, product
from fewbit.nn.quantizer import quantize_matrix
from fewbit.nn.stepped import Stepped
from fewbit.nn.steps import KeepsDtypes
from fewbit.nn.words import GROUPED, method_name, weight_spec
from fewbit.tensor import QuantTensor

CHUNK_ELEMENTS = 2**21  # weights that are dequantized at a time: 8 MB of float32


class QuantLinear(Stepped, KeepsDtypes):
    """y = x · Ŵᵀ + b with Ŵ = (codes − zero_point) · scale, in x's dtype.

    Made of a weight that any algorithm has quantized, e.g. `NativeCheckpoint.read_quantized(name)`, or `from_module`.

    Buffers: `codes` int32 [out, words] (a cast's are its own dtype [out, in]), `scale` as stored [tiles along out,
    tiles along in], `zero_point` int32 [tiles along out, words] for affine specs, `global_scale` [1] for e4m3 scales,
    `format` uint8, the spec in words, so that a state dict of another spec is refused.
    """

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.spec = weight.spec
        for name, tensor in weight.to_tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("format", torch.tensor(list(self.spec.summary.encode()), dtype=torch.uint8))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    @process.neutral()
    def from_module(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        method: str = "per-block",
        group_size: int | None = None,
        symmetric: bool = True,
        spec: QuantizationSpec | None = None,
        **options: Any,
    ) -> Self:
        """Round a linear's weight to the nearest codes and pack them.

        Args:
            bits, method, group_size, symmetric: see nn/quantizer.py. per-channel: a scale for each output channel.
                group_size of per-block is 128 unless given.
            spec: the whole spec instead of these.
            options: other fields of QuantizationSpec, e.g. observer="minmax", dtype="e4m3".
        """
        if not multiplies(linear):
            kind = type(linear).__name__
            raise ConfigError(f"a QuantLinear stands for nn.Linear, not for {kind}, which computes in another way")
        check_plain(linear)
        if spec is None:
            if group_size is None and method_name(method) in GROUPED:
                group_size = 128
            spec = weight_spec(bits, method, group_size, symmetric=symmetric, **options)
        made = cls(quantize_matrix(linear.weight, spec), linear.bias)
        carry_over(linear, made)
        return made

    @property
    def quantized(self) -> QuantTensor:
        """The weight, unpacked."""
        return self._rows(0, self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias as they are held."""
        return sum(tensor.nbytes for tensor in (*self._buffers.values(), self.bias) if tensor is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [out, in]."""
        return self.quantized.dequantize(dtype)

    def multiply(self, seen: Tensor) -> Tensor:
        chunks = (self._rows(start, stop).dequantize(seen.dtype) for start, stop in self._chunks())
        out = torch.cat([product(seen, chunk) for chunk in chunks], dim=-1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _chunks(self) -> list[tuple[int, int]]:
        """Ranges of rows of about CHUNK_ELEMENTS weights that cut no tile. (A tile of all rows may be cut: its scale
        goes with every piece.)"""
        tile = self.spec.tiling.rows or 1
        step = max(1, CHUNK_ELEMENTS // (self.in_features * tile)) * tile
        return [(start, min(start + step, self.out_features)) for start in range(0, self.out_features, step)]

    def _rows(self, start: int, stop: int) -> QuantTensor:
        """Some rows of the weight."""
        tile = self.spec.tiling.rows
        scales = slice(start // tile, -(-stop // tile)) if tile else slice(None)
        own = {"codes": slice(start, stop), "global_scale": slice(None)}
        names = QuantTensor.stored_names(self.spec)
        tensors = {name: getattr(self, name)[own.get(name, scales)] for name in names}
        return QuantTensor.from_tensors(tensors, self.spec, (stop - start, self.in_features))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}format")
        words = self.spec.summary if found is None else bytes(found.tolist()).decode(errors="replace")
        if words != self.spec.summary:
            raise ConfigError(f"{prefix[:-1]!r} of the state dict is {words}, the model's is {self.spec.summary}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.spec.summary}"
