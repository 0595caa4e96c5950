"""Staged forward: true-sequential calibration at the price of one forward.

Every batch's forward through the block runs in its own greenlet. Where something has to be decided from all batches
(the weights of linears that share an input, the scale of a static activation: a stop, see stages.py), the forward is
suspended with the tensor in hand. When all batches are suspended or finished, the earliest stop among those waiting
has seen all its tokens: it is decided, and the batches that wait at it go on, now through quantized weights and
activations. The block's own Python runs unchanged.

`staged` keeps every suspended forward in memory. `replay` keeps none: for each stop it runs every batch only as far
as that stop and throws the forward away. Both see the same inputs, so both give the same bytes; replay repeats the
front of the block (about two forwards in all for a Llama) to need the memory of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fewbit.engine.reference import ReferenceForward
from fewbit.engine.stages import ATTENTION, WEIGHTS, CalibrationStop, Stage, Stop
from fewbit.errors import ArchitectureError
from fewbit.models.token_identity import TokenIdentity
from fewbit.nn.exchange import Exchange
from fewbit.nn.stepped import Stepped

Strategy = Literal["staged", "replay"]


class StagedForward:
    """Runs all batches through one block, stopping wherever something has to be decided.

    Args:
        stages: groups of linears whose weights are quantized, in execution order; their members are modules of the
            block that `forward` runs.
        calibrations: activations of the block whose scales are to be fixed.
        masks: per batch, bool [batch, tokens] that leaves padding out of the statistics, or None.
        forward: runs one batch, given by its number, through the block and returns its output.
        reference: the same block in full precision, for the drift of the inputs.
        identity: follows the tokens, entered while this runs; for blocks in which they are routed.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        masks: Sequence[Tensor | None],
        forward: Callable[[int], Tensor],
        reference: ReferenceForward | None = None,
        calibrations: Sequence[CalibrationStop] = (),
        identity: TokenIdentity | None = None,
    ) -> None:
        self._identity = identity
        self._stages = stages
        self._calibrations = calibrations
        self._masks = masks
        self._forward = forward
        self._reference = reference

    def run(self, emit: Callable[[int, Tensor], None], strategy: Strategy) -> None:
        """Call emit(batch number, output) once per batch, the output computed with everything quantized."""
        with self._wrapped(), torch.no_grad():
            try:
                if strategy == "staged":
                    self._staged(emit)
                else:
                    self._replay(emit)
                for stage in self._stages:  # those that no token reached
                    if not stage.done:
                        stage.finish()
                for stop in self._calibrations:
                    if not stop.done:
                        stop.finish()  # an error that names it: there is no scale to store
                if self._reference is not None:
                    self._reference.finish()
            finally:
                if self._reference is not None:
                    self._reference.restart()  # ends what an exception left suspended

    def _staged(self, emit: Callable[[int, Tensor], None]) -> None:
        waiting = [self._begun(index) for index in range(len(self._masks))]
        try:
            self._advance(waiting, emit)
            while waiting := [run for run in waiting if not run.dead]:
                stop = min((run.at for run in waiting if run.at is not None), key=lambda stop: stop.order)
                ready = [run for run in waiting if run.at is stop]
                for run in ready:  # in the order of the batches, whenever they arrived: replay adds up alike
                    self._count(run)
                stop.finish()
                self._advance(ready, emit)
        finally:
            for run in waiting:
                if not run.dead:  # a suspended forward refers to its own greenlet, so nothing else would end it
                    run.throw(GreenletExit)

    def _advance(self, runs: list[_BatchRun], emit: Callable[[int, Tensor], None]) -> None:
        for run in runs:
            output = run.switch(run.index)  # the index is the forward's argument the first time, ignored later
            if run.dead:
                emit(run.index, output)

    def _replay(self, emit: Callable[[int, Tensor], None]) -> None:
        pending = list(range(len(self._masks)))
        while pending:
            reached: list[Stop] = []
            for index in list(pending):
                run = self._begun(index)
                output = run.switch(index)  # as far as the first stop that is not decided, or to the end
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
                min(reached, key=lambda stop: stop.order).finish()
            for stop in reached:
                if not stop.done:
                    stop.reset()  # counted anew when it is its turn

    def _begun(self, index: int) -> _BatchRun:
        """The forward of a batch, at its beginning."""
        return _BatchRun(self._forward, index, self._count)

    def _count(self, run: _BatchRun) -> None:
        """Add the tensor that a forward has in hand to the stop where it is."""
        stop, x, tokens = run.at, run.tensor, run.tokens
        run.tensor = run.tokens = None
        assert stop is not None
        assert x is not None
        routed = isinstance(stop, Stage) and stop.routed
        mask = self._counted(stop, x, tokens, self._masks[run.index], routed)
        reference = known = None
        if self._reference is not None and stop.order[1] == WEIGHTS:
            reference = self._reference.input_of(stop.order[0], run.index)
            if reference is not None and (routed or tokens is not None):
                reference, known = self._paired(reference, tokens)
            elif reference is not None and reference.shape != x.shape:
                reference = None
        stop.add(x, mask, reference, known)

    def _counted(
        self, stop: Stop, x: Tensor, tokens: Tensor | None, mask: Tensor | None, routed: bool
    ) -> Tensor | None:
        """Which rows [...] of `x` [..., channels] are no padding; None if none is. Rows of which that is not known do
        not count."""
        if mask is None:
            return None
        if isinstance(stop, CalibrationStop) and stop.order[1] == ATTENTION:
            rows = x.shape[0] // mask.numel()  # of a token: its heads, or its channels where heads are columns
            return mask.repeat_interleave(rows, int(stop.quantizer.spec.qscheme == "per_channel")).flatten()
        if tokens is not None:
            return mask.flatten().to(tokens.device)[tokens] | (tokens < 0)
        if routed:
            assert isinstance(stop, Stage)
            stop.lost = True
            return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        # some blocks put the batch's tokens in one row; what is not as many are not the batch's tokens
        return mask.reshape(x.shape[:-1]) if x.shape[:-1].numel() == mask.numel() else None

    def _paired(self, reference: Tensor, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """For each of `tokens` [...] its row of `reference`, and whether it has one there. None if nobody knows."""
        there = None if self._identity is None else self._identity.of(reference)
        if there is None or tokens is None or not there.numel():
            return None, None
        rows = max(there.numel(), tokens.numel())
        ordered, place = _numbered(there, rows).sort()
        wanted = _numbered(tokens, rows).view(tokens.shape)
        found = torch.searchsorted(ordered, wanted).clamp_(max=ordered.numel() - 1)
        known = (ordered[found] == wanted) & (tokens >= 0)
        return reference.reshape(-1, reference.shape[-1])[place[found]], known

    @contextmanager
    def _wrapped(self) -> Iterator[None]:
        """Linears and quantizers suspend the forward that comes to them."""
        for_now = Exchange()
        for stage in self._stages:
            for name, linear in stage.members.items():
                for_now.item(vars(linear), "forward", _suspending(stage, name, linear, self._identity))
        for stop in self._calibrations:
            for_now.item(vars(stop.quantizer), "observer", _parking(stop, self._identity))
        with for_now.for_now():
            yield


def _numbered(tokens: Tensor, rows: int) -> Tensor:
    """A number for each of `tokens` [rows]: its own, and how many of its rows (heads, say) came before."""
    ordered, place = tokens.flatten().sort(stable=True)
    before = torch.arange(ordered.numel(), device=tokens.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(ordered).scatter_(0, place, ordered * rows + before)


def _suspending(
    stage: Stage, name: str, linear: nn.Linear, identity: TokenIdentity | None
) -> Callable[[Tensor], Tensor]:
    """A forward of a stage's member that waits until the stage is done."""
    original = linear.forward

    def forward(x: Tensor) -> Tensor:
        run = getcurrent()
        if not isinstance(run, _BatchRun):
            return original(x)
        tokens = None if identity is None else identity.of(x)
        output = suspended(run, x, tokens)
        if identity is not None and tokens is not None:  # quantizers are no functions that it could follow
            identity.mark(output, tokens)
        return output

    def suspended(run: _BatchRun, x: Tensor, tokens: Tensor | None) -> Tensor:
        if not isinstance(linear, Stepped):
            for stop in (stage.before, stage):
                if stop is not None and not stop.done:
                    run.park(stop, x, tokens)
            run.check_input(stage, name, x)
            return original(x)
        place = linear.scales_at
        coming = linear.seen(x, stop=place)
        if stage.before is not None and not stage.before.done:
            run.park(stage.before, coming, tokens)
        seen, steps = linear.seen(coming, place), linear.input_steps
        if not stage.done:
            run.park(stage, seen, tokens)
        run.check_input(stage, name, x)
        return linear.output(seen if linear.input_steps == steps else linear.seen(coming, place))

    return forward


def _parking(stop: CalibrationStop, identity: TokenIdentity | None) -> Callable[[Tensor], None]:
    """An observer that waits until the scale is fixed."""

    def observe(x: Tensor) -> None:
        run = getcurrent()
        if isinstance(run, _BatchRun) and not stop.done:
            run.park(stop, x, None if identity is None else identity.of(x))

    return observe


class _BatchRun(greenlet):  # type: ignore[misc]
    """The forward of one batch, suspended or running."""

    def __init__(self, forward: Callable[[int], Tensor], index: int, count: Callable[[_BatchRun], None]) -> None:
        super().__init__(forward)
        self.index = index
        self._count = count
        self.at: Stop | None = None
        """Where it is suspended."""
        self.tensor: Tensor | None = None
        """What it came with, until it is counted …"""
        self.tokens: Tensor | None = None
        """… and the token of each of its rows, if somebody knows."""
        self._inputs: dict[Stage, tuple[str, int, StorageWeakRef]] = {}
        """Per stage: the first member called, the address of its input, and whether that memory still lives."""

    def park(self, stop: Stop, x: Tensor, tokens: Tensor | None) -> None:
        """Suspend until the stop is decided, if it is one that waits. ArchitectureError inside of inference mode,
        which would go on in whoever runs next."""
        if torch.is_inference_mode_enabled():
            raise ArchitectureError(
                f"{stop.name!r} runs inside of torch.inference_mode(), in which a forward cannot be suspended; use "
                "torch.no_grad() there"
            )
        self.at, self.tensor, self.tokens = stop, x, tokens
        if stop.waits:
            self.parent.switch()
        else:
            self._count(self)

    def check_input(self, stage: Stage, name: str, x: Tensor) -> None:
        """ArchitectureError if a member of a stage is fed something else than the first one."""
        seen = self._inputs.get(stage)
        if seen is None or seen[0] == name:
            self._inputs[stage] = (name, x.data_ptr(), StorageWeakRef(x.untyped_storage()))
            return
        first, address, storage = seen
        if address != x.data_ptr() or storage.expired():  # freed memory may be given out again at the same address
            raise ArchitectureError(f"{name!r} does not have the same input as {first!r}, so they cannot be one group")
