"""The full-precision forward that runs beside the quantized one, in lockstep, to measure the drift of the inputs."""

from collections.abc import Callable, Collection

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from fewbit.models.architecture import Groups
from fewbit.nn.linear import linear_of


class ReferenceForward:
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
            for name in group.members:
                linear = linear_of(block, name)
                linear.__dict__["forward"] = _reporting(order, linear.forward)

    def input_of(self, order: int, index: int) -> Tensor | None:
        """The input of stage `order` for one batch; None for a batch that is not run or does not come to the stage."""
        if index not in self._batches:
            return None
        run = self._runs.setdefault(index, _ReferenceRun(self._forward, index))
        return run.advance(order)

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
