"""Arguments of blocks besides hidden states: masks, rotary embeddings. In memory up to a budget, then in files.

Batches without padding share these, so that they are few. A batch with padding has masks of its own, each [batch, 1,
tokens, tokens], which for long sequences are larger than its hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fewbit.calibration.hidden_states import HiddenStates
from fewbit.errors import disk_errors_as_sentences
from fewbit.models.block_stack import BlockCall
from fewbit.models.nested import map_tensors, of_kind
from fewbit.safetensors_file import write_tensors


@dataclass(frozen=True)
class _InFile:
    """Stands for a tensor that lies in the batch's file."""

    name: str


class RecordedCalls:
    """Keyword arguments by batch and block. What is in memory counts to the budget of `states`."""

    def __init__(self, states: HiddenStates, directory: Path) -> None:
        self._states = states
        self._directory = directory
        self._calls: list[list[BlockCall]] = []
        self._known: dict[int, Tensor] = {}
        self.bytes_on_disk = 0

    def append(self, calls: list[BlockCall], padded: bool) -> None:
        """Keep the next batch's calls, one per block."""
        new = {id(tensor): tensor for tensor in of_kind(calls, Tensor) if id(tensor) not in self._known}
        size = sum(tensor.nbytes for tensor in new.values())
        if self._states.reserve(size) or not padded:
            self._known |= new  # which keeps them alive, so that no other tensor gets the id
            self._calls.append(calls)
            return
        names = {key: str(number) for number, key in enumerate(new)}
        with disk_errors_as_sentences(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self._file(len(self._calls)), {names[key]: tensor for key, tensor in new.items()})
        self.bytes_on_disk += size
        self._calls.append(
            map_tensors(calls, lambda tensor: _InFile(names[id(tensor)]) if id(tensor) in names else tensor)
        )

    def get(self, batch: int, block: int) -> BlockCall:
        """The keyword arguments of one block for one batch."""
        call = self._calls[batch][block]
        if next(of_kind(call, _InFile), None) is None:
            return call
        with safe_open(self._file(batch), framework="pt", device="cpu") as file:
            read: BlockCall = map_tensors(call, lambda found: file.get_tensor(found.name), _InFile)
            return read

    def _file(self, batch: int) -> Path:
        return self._directory / f"{batch:05d}.safetensors"
