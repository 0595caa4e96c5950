"""The calibration batches on their way through a model: how far each has come, quantized and in full precision."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbit.calibration.hidden_states import HiddenStates, check_finite
from fewbit.calibration.recorded_calls import RecordedCalls
from fewbit.calibration.tokens import CalibrationSet, padding_mask
from fewbit.engine.reference import Reference
from fewbit.models.architecture import Groups
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attach import detach


@dataclass(frozen=True)
class Passage:
    """What goes into the next block, by batch."""

    model: BlockwiseModel
    device: torch.device
    masks: list[Tensor | None]
    """Per batch, bool [batch, tokens], which leaves padding out; None if all tokens count."""
    drift_batches: list[int]
    """Numbers of the batches that also pass in full precision."""
    _first: list[int]
    """By batch: the number of its first sequence."""
    _calls: RecordedCalls
    """By batch and block: what a block is called with beside the hidden states."""
    _quantized: HiddenStates
    _full: HiddenStates

    def forward(self, block: nn.Module, index: int) -> Callable[[int], Tensor]:
        """Runs a batch, given by its number, through block `index`, which may be replaced by what `block` is."""
        return self._through(block, index, self._quantized)

    def emit(self, batch: int, output: Tensor, index: int) -> None:
        """A batch has passed block `index`: what it gave goes into the next. CalibrationError if that is no number."""
        check_finite(output, f"block {self.model.block_name(index)!r}", self._first[batch], self.masks[batch])
        self._quantized.put(batch, output)

    def cross(self, block: nn.Module, index: int) -> None:
        """Every batch through a block that is done."""
        forward = self.forward(block, index)
        for batch in range(len(self.masks)):
            self.emit(batch, forward(batch), index)

    def reference(self, block: nn.Module, index: int, groups: Groups) -> Reference | None:
        """Block `index` in full precision, if drift is measured. `block` still has its own weights now, and may get
        others."""
        if not self.drift_batches:
            return None
        original = _full_precision(block)
        forward = self._through(original, index, self._full)
        return Reference(original, groups, self.drift_batches, forward, self._full.put)

    def cross_in_full_precision(self, block: nn.Module, index: int) -> None:
        """Those batches on which drift is measured through a block that has its own weights."""
        forward = self._through(_full_precision(block), index, self._full)
        for batch in self.drift_batches:
            self._full.put(batch, forward(batch))

    def _through(self, block: nn.Module, index: int, states: HiddenStates) -> Callable[[int], Tensor]:
        def forward(batch: int) -> Tensor:
            return self.model.call_block(block, states.get(batch).to(self.device), self._calls.get(batch, index))

        return forward


@contextmanager
def entered(
    model: BlockwiseModel,
    calibration: CalibrationSet,
    device: torch.device,
    drift_batches: list[int],
    memory: int,
    directory: Path,
) -> Iterator[Passage]:
    """All batches before the first block. Hidden states beyond `memory` bytes live in files under `directory`, which
    is removed at the end."""
    share = memory // (2 if drift_batches else 1)
    quantized, full = (HiddenStates(share, directory / name) for name in ("quantized", "reference"))
    try:
        calls = RecordedCalls(quantized, directory / "calls")
        masks = [padding_mask(batch) for batch in calibration.batches]
        first = list(accumulate((batch["input_ids"].shape[0] for batch in calibration.batches), initial=0))
        for batch, inputs in enumerate(model.enter(list(calibration.batches), device)):
            check_finite(inputs.hidden, "the embedding", first[batch], masks[batch])
            quantized.put(batch, inputs.hidden)
            if batch in drift_batches:
                full.put(batch, inputs.hidden)
            calls.append(inputs.calls, padded=masks[batch] is not None)
        yield Passage(model, device, masks, drift_batches, first, calls, quantized, full)
    finally:
        quantized.close()
        full.close()
        shutil.rmtree(directory, ignore_errors=True)


def _full_precision(block: nn.Module) -> nn.Module:
    """A copy that quantizes no activations and shares its weights with the block until those are replaced."""
    copied = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    detach(copied)
    return copied
