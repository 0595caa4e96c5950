"""What happens to a linear's input before its weight meets it: an ordered list of steps, the same on every linear that
runs (calibration, evaluation, fake-quantized, packed) and in what a run stores.

    divide      by channel scales
    quantize    to the grid of a spec (nn/activation.py)

Another kind of step is one more class here, with `@register` above it; nothing else has to know it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from fewbit.checkpoint.native import StoredStep
from fewbit.errors import CheckpointError

S = TypeVar("S", bound="Step")
QUANTIZE = "quantize"
KINDS: dict[str, type[Step]] = {}
"""Steps by their kinds, all but `quantize`: a run stores it as an activation."""


class KeepsDtypes(nn.Module):
    """A module whose own buffers keep the dtype that they are stored in: `model.half()` must not round scales once
    more. They move between devices; parameters and children follow `.to(dtype)` as usual."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class Step(KeepsDtypes):
    """One change of an input: x [..., in] → [..., in], in x's dtype. What it knows are buffers, and attributes that
    `stored` adds; its constructor takes both by their names."""

    kind: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether the columns of the weight undo it; otherwise it loses something."""
    folded: bool = False
    """Whether what is stored does without it. A resumed run takes it, to compute as the interrupted one did."""

    def stored(self) -> StoredStep:
        """What is stored: tensors by names below the linear's, and plain data."""
        return StoredStep(self.kind, {f"{self.kind}.{name}": tensor for name, tensor in self.named_buffers()})

    @classmethod
    def restored(cls, stored: StoredStep) -> Self:
        """Inverse of `stored`."""
        tensors = {name.rpartition(".")[2]: tensor for name, tensor in stored.tensors.items()}
        return cls(**tensors, **stored.data)


def register(kind: type[S]) -> type[S]:
    """Make a class of steps known by its kind."""
    KINDS[kind.kind] = kind
    return kind


@register
class Divide(Step):
    """x / scale [in], by which the weight's columns are multiplied. `folded`: the layer before is stored divided."""

    kind = "divide"
    scale: Tensor

    def __init__(self, scale: Tensor, folded: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.folded = folded

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.scale).to(x.dtype)

    def stored(self) -> StoredStep:
        return StoredStep(self.kind, {"smoothing": self.scale}, {"folded": True} if self.folded else {})

    @classmethod
    def restored(cls, stored: StoredStep) -> Self:
        return cls(stored.tensors["smoothing"], **stored.data)


def restored(stored: StoredStep) -> Step:
    """The step that a run has stored; CheckpointError for a kind that nobody registered."""
    if stored.kind not in KINDS:
        raise CheckpointError(f"the run has an input step {stored.kind!r}, which this fewbit does not know")
    return KINDS[stored.kind].restored(stored)
