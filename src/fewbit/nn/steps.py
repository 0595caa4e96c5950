"""What happens to a linear's input before its weight meets it: an ordered list of steps, the same on every linear that
runs (calibration, evaluation, fake-quantized, packed) and in what a run stores.

    divide      by channel scales
    quantize    to the grid of a spec (nn/activation.py)

Another kind of step is one more class here, with `@register` above it; nothing else has to know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from torch import Tensor, nn

from fewbit.checkpoint.native import StoredStep
from fewbit.errors import CheckpointError, ConfigError
from fewbit.nn import saving

if TYPE_CHECKING:
    from fewbit.nn.activation import ActivationQuantizer

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


class Stepped(nn.Module):
    """A linear whose input takes steps, and whose output may be quantized. Subclasses say how it multiplies. Steps are
    its children (divide_input, …); the quantizer, `input_quantizer`, is the last one unless it was given a place."""

    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    saves_steps: ClassVar[bool] = True
    """Whether steps are part of the state dict."""
    _order: tuple[str, ...] = ("input_quantizer",)
    """Names of the children that are steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("input_quantizer", None)
        self.register_module("output_quantizer", None)
        saving.guard()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        saving.guard()

    @property
    def input_steps(self) -> tuple[Step, ...]:
        """The steps, in order."""
        found: Any = (self._modules.get(name) for name in self._order)
        return tuple(step for step in found if step is not None)

    @input_steps.setter
    def input_steps(self, steps: Iterable[Step]) -> None:
        steps = tuple(steps)
        kinds = [step.kind for step in steps]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(f"an input takes one step of a kind, not {', '.join(kinds)}")
        by_name = {f"{step.kind}_input" if step.kind != QUANTIZE else "input_quantizer": step for step in steps}
        for name in self._order:
            self._modules.pop(name, None)
        self.register_module("input_quantizer", None)
        for name, step in by_name.items():
            self.register_module(name, step)
            if step.kind != QUANTIZE:
                step._non_persistent_buffers_set = set() if self.saves_steps else set(step._buffers)
        self._order = tuple(dict.fromkeys((*by_name, "input_quantizer")))

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the children beside weight and bias."""
        return (*self._order, "output_quantizer")

    @property
    def scales_at(self) -> int:
        """Where channel scales are found and divided by: the number of steps before them."""
        steps = self.input_steps
        found = (number for number, step in enumerate(steps) if step.kind == Divide.kind or not step.exact)
        return next(found, len(steps))

    def divide(self, scale: Tensor, folded: bool = False) -> None:
        """Divide the input by channel scales [in] from now on."""
        steps, place = self.input_steps, self.scales_at
        self.input_steps = (*steps[:place], Divide(scale, folded), *steps[place:])

    def leave_folded(self) -> None:
        """Take the steps off that are folded into what is stored."""
        self.input_steps = [step for step in self.input_steps if not step.folded]

    def restore_steps(self, stored: Sequence[StoredStep], folded: bool = False) -> None:
        """Take the steps that a run has stored (those that are folded only with `folded`). The quantizer, which is
        stored as an activation, is here already."""
        steps = [self.input_quantizer if one.kind == QUANTIZE else _restored(one) for one in stored]
        self.input_steps = [step for step in steps if step is not None and (folded or not step.folded)]

    def seen(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The input as the weight meets it; or on its way there, after steps `start` to `stop`."""
        for step in self.input_steps[start:stop]:
            x = step(x)
        return x

    def exactly(self, x: Tensor) -> Tensor:
        """The input as the weight would meet it if nothing were lost."""
        for step in self.input_steps:
            x = step(x) if step.exact else x
        return x

    def multiply(self, seen: Tensor) -> Tensor:
        """The product, with the bias, of an input as the weight meets it: [..., in] → [..., out]."""
        raise NotImplementedError

    def output(self, seen: Tensor) -> Tensor:
        """`multiply`, quantized if outputs are."""
        out = self.multiply(seen)
        return out if self.output_quantizer is None else self.output_quantizer(out)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return self.output(self.seen(x))


def _restored(stored: StoredStep) -> Step:
    if stored.kind not in KINDS:
        raise CheckpointError(f"the run has an input step {stored.kind!r}, which this fewbit does not know")
    return KINDS[stored.kind].restored(stored)
