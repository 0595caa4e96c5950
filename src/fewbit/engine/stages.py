"""Where a block's forward stops: what is gathered there from all batches, and what is decided once all have come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from fewbit.calibration.observers import make_observer
from fewbit.calibration.statistics import Statistics
from fewbit.models.architecture import Groups
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attention import ATTRIBUTE
from fewbit.nn.linear import linear_of
from fewbit.nn.stepped import Stepped

Order = tuple[int, int]
"""Group of linears, and what of it: earlier stops are decided first when batches wait at several."""
SCALES, INPUT, WEIGHTS, OUTPUT, ATTENTION = range(5)
PLACES = {"input_quantizer": INPUT, "output_quantizer": OUTPUT}


class Stop(Protocol):
    """A point where a forward is suspended."""

    order: Order
    done: bool
    waits: bool
    """Whether the forward waits for a decision. Else what it came with is counted, and it goes on."""

    @property
    def name(self) -> str: ...

    def add(self, x: Tensor, mask: Tensor | None, reference: Tensor | None, known: Tensor | None = None) -> None:
        """Count one batch's tensor, as `Statistics.add` does."""

    def reset(self) -> None:
        """Forget what was counted."""

    def finish(self) -> None:
        """All batches have been counted: decide."""


class Stage:
    """Linears that share an input: when all batches have come, something is decided about their weights.

    Args:
        order: number of the group in the block.
        members: the linears by name.
        decide: quantizes them (at SCALES, scales their columns). `statistics` is complete then, or None if no token
            arrived.
        place: WEIGHTS sees the input as the weights meet it (smoothed, quantized), SCALES as it comes.
        sample: tokens of the input to keep, evenly spread over the batches' order of arrival.
        before: the stop at SCALES that comes first, if there is one.
        waits: False where nothing is decided that would change the forward.
        routed: tokens are chosen or reordered before they come here.
    """

    def __init__(
        self,
        order: int,
        members: dict[str, nn.Linear],
        decide: Callable[[Stage], None],
        *,
        place: int = WEIGHTS,
        sample: int = 0,
        before: Stage | None = None,
        waits: bool = True,
        routed: bool = False,
    ) -> None:
        self.order: Order = (order, place)
        self.waits = waits
        self.routed = routed
        self.members = members
        self.before = before
        self.done = False
        self.statistics: Statistics | None = None
        self.lost = False
        """Whether rows came that could not be told from padding."""
        self._decide = decide
        self._sample = sample

    @property
    def name(self) -> str:
        return next(iter(self.members))

    def add(self, x: Tensor, mask: Tensor | None, reference: Tensor | None, known: Tensor | None = None) -> None:
        if self.statistics is None:
            self.statistics = Statistics.empty(x.shape[-1], x.device, self._sample)
        first = next(iter(self.members.values()))
        if reference is not None and isinstance(first, Stepped):
            reference = first.exactly(reference)  # as x came
        self.statistics.add(x, mask, reference, known)

    def reset(self) -> None:
        self.statistics = None

    def finish(self) -> None:
        if self.statistics is not None and self.statistics.tokens == 0:  # an expert that was called without any
            self.statistics = None
        if self.statistics is not None:
            self.statistics.finish(self.name)
        self._decide(self)
        self.statistics = None
        self.done = True


class CalibrationStop:
    """An activation with a static scale: when all batches have come, the scale is fixed."""

    waits = True

    def __init__(self, order: Order, name: str, quantizer: ActivationQuantizer) -> None:
        self.order = order
        self.done = False
        self.name = name
        self.quantizer = quantizer
        self._observer = make_observer(quantizer.spec, quantizer.dtype)

    def add(self, x: Tensor, mask: Tensor | None, reference: Tensor | None, known: Tensor | None = None) -> None:
        self._observer(x if mask is None else x[mask])

    def reset(self) -> None:
        self._observer = make_observer(self.quantizer.spec, self.quantizer.dtype)

    def finish(self) -> None:
        self.quantizer.load(self._observer.result(self.name))
        self.quantizer.observer = None
        self.done = True


def stages_of(
    block: nn.Module,
    groups: Groups,
    decide: Callable[[Stage], None],
    scale: Callable[[Stage], None] | None = None,
    samples: Mapping[int, int] | None = None,
) -> list[Stage]:
    """One stage per group of linears of a block that is not empty, numbered as the groups are.

    Those in `samples` have a stop before, for `scale`: it gets their input as it comes, and keeps that many of its
    tokens. (Where nothing happens to an input, what the stage itself gets is the input as it comes.)
    """
    stages = []
    for order, group in enumerate(groups):
        if not group.members:
            continue
        members = {name: linear_of(block, name) for name in group.members}
        before = None
        if scale is not None and samples is not None and order in samples:
            before = Stage(order, members, scale, place=SCALES, sample=samples[order], routed=group.routed)
        stages.append(Stage(order, members, decide, before=before, routed=group.routed))
    return stages


def calibration_stops(block: nn.Module, groups: Groups, prefix: str = "") -> list[CalibrationStop]:
    """A stop for every activation quantizer of a block that only data can tell its scale, in order of execution.

    `prefix` is the block's name and a dot, for messages.
    """
    group_of = {name: number for number, group in enumerate(groups) for name in group.members}
    stops = []
    for path, module in block.named_modules():  # one that linears share comes once
        if isinstance(module, ActivationQuantizer) and module.needs_calibration:
            owner, _, slot = path.rpartition(".")
            if slot in PLACES:
                order = (group_of.get(owner, len(groups)), PLACES[slot])
            else:  # inside attention, which runs once the linears of its first group have
                attention = path.partition(".")[0] + "."
                order = (min((n for name, n in group_of.items() if name.startswith(attention)), default=0), ATTENTION)
            name = prefix + path.removesuffix("_quantizer").replace(f"{ATTRIBUTE}.", "")
            stops.append(CalibrationStop(order, name, module))
    return stops
