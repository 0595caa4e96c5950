"""Staged forward: true-sequential calibration at the price of one forward.

Every batch's forward through the block runs in its own greenlet. A linear that will be quantized is wrapped: when it
is called and its stage is not done yet, the forward is suspended with the linear's input in hand. When all batches are
suspended or finished, the earliest stage among those waiting has seen all its tokens: it is quantized, and the batches
that wait at it go on, now through quantized weights. The block's own Python runs unchanged.

`staged` keeps every suspended forward in memory. `replay` keeps none: for each stage it runs every batch only as far
as that stage and throws the forward away. Both see the same inputs, so both give the same bytes; replay repeats the
front of the block (about two forwards in all for a Llama) to need the memory of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fewbit.calibration.statistics import Statistics
from fewbit.errors import ArchitectureError
from fewbit.models.architecture import Groups

Strategy = Literal["staged", "replay"]


@dataclass
class Stage:
    """Linears that share an input, and what is known of that input so far."""

    order: int
    members: dict[str, nn.Linear]
    statistics: Statistics | None = None
    """None until a token arrives; complete when the stage is finished."""
    done: bool = False

    @property
    def name(self) -> str:
        return next(iter(self.members))


class Reference:
    """Forwards of some batches through the block in full precision, each held at the stage its batch has reached.

    Args:
        block: a copy of the block that keeps its weights.
        groups: as for StagedForward.
        batches: numbers of the batches that are run.
        forward: runs one of them through `block`.
        emit: takes (batch number, output) of each.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Groups,
        batches: Collection[int],
        forward: Callable[[int], Tensor],
        emit: Callable[[int, Tensor], None],
    ) -> None:
        self._batches = batches
        self._forward = forward
        self._emit = emit
        self._runs: dict[int, _ReferenceRun] = {}
        for order, group in enumerate(groups):
            for name in group:
                linear = _linear(block, name)
                linear.__dict__["forward"] = _reporting(order, linear.forward)

    def input_of(self, stage: Stage, index: int) -> Tensor | None:
        """The input of `stage` for one batch; None for a batch that is not run or does not come to the stage."""
        if index not in self._batches:
            return None
        run = self._runs.setdefault(index, _ReferenceRun(self._forward, index))
        return run.advance(stage.order)

    def restart(self) -> None:
        """Throw every forward away: batches start again from the front of the block."""
        for run in self._runs.values():
            run.stop()
        self._runs.clear()

    def finish(self) -> None:
        """Run every batch to the end of the block. Only now: until then a restart needs the old hidden states."""
        for index in self._batches:
            run = self._runs.pop(index, None) or _ReferenceRun(self._forward, index)
            self._emit(index, run.output())


class StagedForward:
    """Runs all batches through one block, stopping at each stage for `finish` to quantize it.

    Args:
        block: the block, with weights.
        groups: names of linears inside the block that share an input, in execution order.
        masks: per batch, bool [batch, tokens] that leaves padding out of the statistics, or None.
        forward: runs one batch, given by its number, through the block and returns its output.
        finish: called once per stage, in order; replaces the members' weights. `stage.statistics` is None for a stage
            that no token reached.
        reference: the same block in full precision, for the drift of the inputs.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Groups,
        masks: Sequence[Tensor | None],
        forward: Callable[[int], Tensor],
        finish: Callable[[Stage], None],
        reference: Reference | None = None,
    ) -> None:
        self.stages = [
            Stage(order, {name: _linear(block, name) for name in group}) for order, group in enumerate(groups)
        ]
        self._masks = masks
        self._forward = forward
        self._finish_stage = finish
        self._reference = reference

    def run(self, emit: Callable[[int, Tensor], None], strategy: Strategy) -> None:
        """Call emit(batch number, output) once per batch, the output computed with the quantized weights."""
        with self._wrapped(), torch.no_grad():
            try:
                if strategy == "staged":
                    self._staged(emit)
                else:
                    self._replay(emit)
            finally:
                if self._reference is not None:
                    self._reference.restart()  # ends what an exception left suspended

    def _staged(self, emit: Callable[[int, Tensor], None]) -> None:
        waiting = [_BatchRun(self._forward, index) for index in range(len(self._masks))]
        try:
            self._advance(waiting, emit)
            while waiting := [run for run in waiting if not run.dead]:
                stage = min((run.at for run in waiting if run.at is not None), key=lambda stage: stage.order)
                ready = [run for run in waiting if run.at is stage]
                for run in ready:  # in the order of the batches, whenever they arrived: replay adds up alike
                    self._count(run)
                self._finish(stage)
                self._advance(ready, emit)
        finally:
            for run in waiting:
                if not run.dead:  # a suspended forward refers to its own greenlet, so nothing else would end it
                    run.throw(GreenletExit)
        self._finish_unreached()
        if self._reference is not None:
            self._reference.finish()

    def _advance(self, runs: list[_BatchRun], emit: Callable[[int, Tensor], None]) -> None:
        for run in runs:
            output = run.switch(run.index)  # the index is the forward's argument the first time, ignored later
            if run.dead:
                emit(run.index, output)

    def _replay(self, emit: Callable[[int, Tensor], None]) -> None:
        pending = list(range(len(self._masks)))
        while pending:
            reached: list[Stage] = []
            for index in list(pending):
                run = _BatchRun(self._forward, index)
                output = run.switch(index)  # as far as the first stage that is not done, or to the end
                if run.dead:
                    pending.remove(index)
                    emit(index, output)
                    continue
                assert run.at is not None
                reached.append(run.at)
                self._count(run)
                run.throw(GreenletExit)
                if self._reference is not None:
                    self._reference.restart()
            if reached:
                self._finish(min(reached, key=lambda stage: stage.order))
            for stage in reached:
                stage.statistics = None  # those further on are counted anew when it is their turn
        self._finish_unreached()
        if self._reference is not None:
            self._reference.finish()

    def _finish_unreached(self) -> None:
        for stage in self.stages:
            if not stage.done:
                self._finish(stage)

    def _finish(self, stage: Stage) -> None:
        if stage.statistics is not None:
            stage.statistics.finish(stage.name)
        self._finish_stage(stage)
        stage.statistics = None
        stage.done = True

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        linears = [(stage, name, linear) for stage in self.stages for name, linear in stage.members.items()]
        for stage, name, linear in linears:
            linear.__dict__["forward"] = self._suspending(stage, name, linear.forward)
        try:
            yield
        finally:
            for _, _, linear in linears:
                del linear.forward  # the class's own forward is visible again

    def _suspending(self, stage: Stage, name: str, original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            run = getcurrent()
            if isinstance(run, _BatchRun):
                if not stage.done:
                    run.at, run.input = stage, x
                    run.parent.switch()
                run.check_input(stage, name, x)
            return original(x)

        return forward

    def _count(self, run: _BatchRun) -> None:
        """Add the input that a suspended forward has in hand to its stage's statistics."""
        stage, x, index = run.at, run.input, run.index
        run.input = None
        assert stage is not None
        assert x is not None
        if stage.statistics is None:
            stage.statistics = Statistics.empty(x.shape[-1], x.device)
        mask = self._masks[index]
        if mask is not None and x.shape[:-1].numel() == mask.numel():
            mask = mask.reshape(x.shape[:-1])  # some blocks put the batch's tokens in one row
        else:
            mask = None  # tokens were routed: what reaches the linear is no longer laid out like the batch
        reference = self._reference.input_of(stage, index) if self._reference is not None else None
        if reference is not None and reference.shape != x.shape:
            reference = None  # other tokens were routed here than in full precision
        stage.statistics.add(x, mask, reference)


class _BatchRun(greenlet):  # type: ignore[misc]
    """The forward of one batch, suspended or running."""

    def __init__(self, forward: Callable[[int], Tensor], index: int) -> None:
        super().__init__(forward)
        self.index = index
        self.at: Stage | None = None
        """Stage it is suspended at."""
        self.input: Tensor | None = None
        """What the stage was called with, until it is counted."""
        self._inputs: dict[int, tuple[str, int, StorageWeakRef]] = {}
        """Per stage: the first member called, the address of its input, and whether that memory still lives."""

    def check_input(self, stage: Stage, name: str, x: Tensor) -> None:
        """ArchitectureError if a member of a stage is fed something else than the first one."""
        seen = self._inputs.get(stage.order)
        if seen is None or seen[0] == name:
            self._inputs[stage.order] = (name, x.data_ptr(), StorageWeakRef(x.untyped_storage()))
            return
        first, address, storage = seen
        if address != x.data_ptr() or storage.expired():  # freed memory may be given out again at the same address
            raise ArchitectureError(f"{name!r} does not have the same input as {first!r}, so they cannot be one group")


class _ReferenceRun:
    """The full-precision forward of one batch, going from stage to stage on demand."""

    def __init__(self, forward: Callable[[int], Tensor], index: int) -> None:
        self._run = greenlet(forward)
        self._index = index
        self._output: Tensor | None = None
        self._at: tuple[int, Tensor] | None = None
        self._passed: set[int] = set()

    def advance(self, order: int | None) -> Tensor | None:
        """Go on to stage `order` and return its input; None if the forward ends before (or is past) it."""
        while not self._run.dead:
            if self._at is not None and self._at[0] == order:
                return self._at[1]
            if order in self._passed:
                return None
            answer = self._run.switch(self._index)
            if self._run.dead:
                self._at, self._output = None, answer
            elif answer[0] not in self._passed:
                self._at = answer
                self._passed.add(answer[0])
        return None

    def output(self) -> Tensor:
        """Run to the end of the block."""
        self.advance(None)
        assert self._output is not None
        return self._output

    def stop(self) -> None:
        if not self._run.dead:
            self._run.throw(GreenletExit)


def _reporting(order: int, original: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A forward that hands its stage and input to whoever advances the run, then goes on."""

    def forward(x: Tensor) -> Tensor:
        driver = getcurrent().parent
        if driver is not None:
            driver.switch((order, x))
        return original(x)

    return forward


def _linear(block: nn.Module, name: str) -> nn.Linear:
    try:
        module = block.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(f"{type(block).__name__} has no linear {name!r}") from None
    if not isinstance(module, nn.Linear):
        raise ArchitectureError(f"{name!r} of {type(block).__name__} is a {type(module).__name__}, not a linear")
    return module
