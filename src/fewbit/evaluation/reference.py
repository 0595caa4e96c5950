"""The last block's output for every window, with each block loaded once."""

import os
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fewbit import process
from fewbit.calibration.hidden_states import HiddenStates
from fewbit.calibration.passage import enter
from fewbit.formats.table import open_any
from fewbit.models.blockwise import BlockwiseModel
from fewbit.scratch import temporary_directory


class Reference:
    """A model to compare others with. Its hidden states of a text are kept for the next comparison.

    Args:
        model: checkpoint, run, export or module.
    """

    @process.neutral()
    def __init__(self, model: str | os.PathLike[str] | PreTrainedModel) -> None:
        self.model = open_any(model)
        self._scratch = temporary_directory("reference")
        self._ids: Tensor | None = None
        self._states: HiddenStates | None = None

    def last_hidden_states(self, ids: Tensor, device: torch.device, budget: int) -> HiddenStates:
        """Of windows `ids` [windows, tokens]; up to `budget` bytes in memory, the rest in files."""
        if self._states is None or self._ids is None or not torch.equal(ids, self._ids):
            if self._states is not None:
                self._states.close()
                self._states = self._ids = None  # closed states must not be used again, whatever happens next
            self._states = last_hidden_states(self.model, ids, device, budget, self._scratch.path / "states")
            self._ids = ids.clone()
        return self._states


def last_hidden_states(
    model: BlockwiseModel, ids: Tensor, device: torch.device, budget: int, scratch: Path
) -> HiddenStates:
    """Output of the last block for each window of `ids` [windows, tokens]; CalibrationError for NaN or infinity."""
    passage = enter(model, [{"input_ids": window.unsqueeze(0)} for window in ids], device, budget, scratch)
    for index in range(len(model)):
        with model.loaded(index, device) as block, torch.no_grad():
            passage.cross(block, index)
    return passage.states
