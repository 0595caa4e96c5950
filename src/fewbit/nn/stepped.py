"""A linear whose input takes steps before its weight meets it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fewbit.checkpoint.native import StoredStep
from fewbit.errors import ConfigError
from fewbit.nn import saving
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.steps import QUANTIZE, Divide, Step, restored


class Stepped(nn.Module, ABC):
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
        steps = [self.input_quantizer if one.kind == QUANTIZE else restored(one) for one in stored]
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

    @abstractmethod
    def multiply(self, seen: Tensor) -> Tensor:
        """The product, with the bias, of an input as the weight meets it: [..., in] → [..., out]."""

    def output(self, seen: Tensor) -> Tensor:
        """`multiply`, quantized if outputs are."""
        out = self.multiply(seen)
        return out if self.output_quantizer is None else self.output_quantizer(out)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        return self.output(self.seen(x))
