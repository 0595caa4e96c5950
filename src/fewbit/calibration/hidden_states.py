"""Hidden states between blocks, and what blocks are called with: in memory up to a budget, the rest in files."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.errors import CalibrationError, disk_errors_as_sentences
from fewbit.models.block_stack import BlockCall
from fewbit.models.nested import map_tensors, of_kind
from fewbit.numerics.finite import is_finite
from fewbit.safetensors_file import write_tensors


class HiddenStates:
    """One tensor per batch, float32. A batch that does not fit the budget any more lives in a file.

    What is put is copied, block after block into the same memory: a tensor that was made in the middle of a forward
    and kept would hold the heap's pages around it, so that memory grew with every block.
    """

    def __init__(
        self, budget_bytes: int | None, directory: Path | None, device: torch.device | str | None = "cpu"
    ) -> None:
        """No budget (and no directory): everything stays in memory. No device: a batch stays where it came from."""
        self._budget = budget_bytes
        self._directory = directory
        self._device = device
        self._memory: dict[int, Tensor] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.bytes_in_memory = 0

    def __len__(self) -> int:
        return len(self._shapes)

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep a copy of the states of one batch."""
        if index not in self._shapes and self.reserve(hidden.numel() * 4):
            self._memory[index] = hidden.new_empty(0, device=self._device)
        self._shapes[index] = tuple(hidden.shape)
        if (kept := self._memory.get(index)) is not None:
            small = hidden.is_floating_point() and hidden.dtype.itemsize < 4
            dtype = torch.float32 if small or self._budget is not None else hidden.dtype
            if kept.shape != hidden.shape or kept.dtype != dtype:
                kept = self._memory[index] = torch.empty(hidden.shape, dtype=dtype, device=kept.device)
            kept.copy_(hidden.detach())
            return
        values, file = hidden.detach().to("cpu", torch.float32).contiguous().numpy(), self._file(index)
        with disk_errors_as_sentences(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(values.data)  # tofile's error would not say why

    def reserve(self, size: int) -> bool:
        """Take `size` bytes of the budget, if there are so many left; also for what else has to be in memory."""
        fits = self._budget is None or self.bytes_in_memory + size <= self._budget
        self.bytes_in_memory += size if fits else 0
        return fits

    def get(self, index: int) -> Tensor:
        """States of one batch [batch, tokens, channels], until others are put in their place."""
        if index in self._memory:
            return self._memory[index]
        values = np.fromfile(self._file(index), dtype=np.float32)
        return torch.from_numpy(values).view(self._shapes[index])

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._memory.clear()
        self._shapes.clear()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _file(self, index: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{index:05d}.f32"


@dataclass(frozen=True)
class _InFile:
    """Stands for a tensor that lies in the batch's file."""

    name: str


class RecordedCalls:
    """Arguments of blocks besides hidden states (masks, rotary embeddings), by batch and block.

    What is in memory counts to the budget of `states`. Batches without padding share their arguments. One with padding
    has masks of its own, each [batch, 1, tokens, tokens], which for long sequences are larger than its hidden states.
    """

    def __init__(self, states: HiddenStates, directory: Path) -> None:
        self._states = states
        self._directory = directory
        self._calls: list[list[BlockCall]] = []
        self._known: dict[int, Tensor] = {}

    def append(self, calls: list[BlockCall], padded: bool) -> None:
        """Keep the next batch's calls, one per block."""
        new = {id(tensor): tensor for tensor in of_kind(calls, Tensor) if id(tensor) not in self._known}
        size = sum(tensor.nbytes for tensor in new.values())
        if self._states.reserve(size) or not padded:
            self._known |= new  # which keeps them alive, so that no other tensor gets the id
            self._calls.append(calls)
            return
        stored = {key: _InFile(str(number)) for number, key in enumerate(new)}
        with disk_errors_as_sentences(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_tensors(self._file(len(self._calls)), {stored[key].name: tensor for key, tensor in new.items()})
        self._calls.append(map_tensors(calls, lambda tensor: stored.get(id(tensor), tensor)))

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


def check_finite(hidden: Tensor, what: str, first: int, mask: Tensor | None = None, first_token: int = 0) -> None:
    """CalibrationError, which begins with `what`, if states or logits [batch, tokens, channels] hold NaN or infinity.

    `first`, `first_token`: numbers of the first sequence and token; `mask` [batch, tokens]: True where a token counts.
    """
    if is_finite(hidden):
        return
    bad = ~hidden.isfinite().all(-1)  # [batch, tokens]
    if mask is not None and mask.shape == bad.shape:
        bad &= mask.to(bad.device)
    if bad.any():
        sequence, *_, token = [0, *bad.nonzero()[0].tolist()][-max(2, bad.ndim) :]
        raise CalibrationError(
            f"{what} gives NaN or infinity (first for token {first_token + token} of sequence {first + sequence}); is "
            "the model damaged, or are its activations beyond float32?"
        )
