"""Fake quantization of activations: what an engine with quantized activations would compute, in float32.

x [..., tokens, channels] is cut into tiles by the rule of weights. A dynamic spec takes each tile's scale from the
tensor at hand; a static one from calibration, during which x passes and goes to the `observer`. No gradient flows.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.native import StoredStep
from fewbit.config.spec import QuantizationSpec
from fewbit.nn.steps import QUANTIZE, Step
from fewbit.numerics.scale_format import ScaleFormat
from fewbit.tensor import QuantizedActivation


class ActivationQuantizer(Step):
    """Quantizes and dequantizes a tensor; float in, same dtype out.

    Args:
        spec: how. A static spec needs `state` (or calibration, see `observer`) before it can quantize.
        state: what calibration found, if it is known.
        dtype: what scales are stored in where the spec leaves it to the checkpoint.
        persistent: what calibration found is part of `state_dict`. (A block's has exactly its checkpoint's tensors.)
    """

    kind = QUANTIZE
    exact = False
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        spec: QuantizationSpec,
        state: QuantizedActivation | None = None,
        dtype: torch.dtype = torch.float32,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.persistent = persistent
        self.observer: Callable[[Tensor], Any] | None = None  # while set, x is handed to it and passes as it is
        self.passive = False  # x passes as it is; an observer still sees it
        self.global_scale: float | None = None
        self.register_buffer("scale", None, persistent=persistent)
        self.register_buffer("zero_point", None, persistent=persistent)
        if state is not None:
            self.load(state)

    def load(
        self, state: QuantizedActivation, item: Callable[[dict[str, Any], str, Any], Any] = operator.setitem
    ) -> None:
        """Take what calibration found: one `item(mapping, key, value)` each, so that many can take theirs at once."""
        item(self._buffers, "scale", state.scale)
        item(self._buffers, "zero_point", state.zero_point)
        item(vars(self), "global_scale", state.global_scale if self.spec.stored_as.has_global_scale else None)

    def stored(self) -> StoredStep:
        """Its place among the steps; spec and scale are stored as those of an activation."""
        return StoredStep(self.kind)

    def state(self) -> QuantizedActivation:
        """What has to be stored."""
        return QuantizedActivation(self.spec, self.scale, self.zero_point, self.global_scale or 1.0)

    @property
    def needs_calibration(self) -> bool:
        """Whether something is missing that only data can tell."""
        return self.spec.needs_data and self.scale is None and self.global_scale is None

    def format(self, x: Tensor | None = None) -> ScaleFormat:
        """How scales are stored; without calibration the global scale comes from x."""
        if (global_scale := self.global_scale) is None:
            global_scale = 1.0 if x is None else self.spec.global_scale(x)
        # no checkpoint holds a dynamic scale, so it is not rounded to what scales are stored in there
        return self.spec.scale_format(torch.float32 if self.spec.is_dynamic else self.dtype, global_scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.observed(x) or self.passive:
            return x
        quantized = self.once(x)
        if self.spec.residual:
            quantized = quantized + self.once(x - quantized)
        return quantized

    def observed(self, x: Tensor) -> bool:
        """Show x to the observer, if there is one; whether x has to pass as it is."""
        if self.observer is not None:
            self.observer(x)
        return self.observer is not None  # it may have found the scale meanwhile and taken itself away

    @torch.no_grad()
    def encode(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points of a matrix, as `QuantizedActivation.encode` gives them."""
        return self.state().encode(matrix, self.format(matrix))

    @torch.no_grad()
    def once(self, x: Tensor) -> Tensor:
        """One stage of quantization, whatever the spec says of a residual."""
        return self.state().fake_quantize(x, self.format(x))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.persistent and self.global_scale is not None:
            destination[prefix + "global_scale"] = torch.tensor([self.global_scale])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """A fresh quantizer knows neither that there is a scale nor its shape: it takes what is there."""
        _, unexpected, _ = lists
        for name in ("scale", "zero_point", "global_scale") if self.persistent else ():
            if (found := state_dict.get(prefix + name)) is not None:
                setattr(self, name, float(found) if name == "global_scale" else found.clone())
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if self.persistent and prefix + "global_scale" in unexpected:
            unexpected.remove(prefix + "global_scale")

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.dtype}, {spec.qscheme}, {'dynamic' if spec.is_dynamic else 'static'}"
