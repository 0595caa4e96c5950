"""Batches on their way through a stack of blocks, as the model computes now and in full precision."""

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fewbit.calibration.hidden_states import HiddenStates, RecordedCalls, check_finite
from fewbit.calibration.tokens import padding_mask
from fewbit.models.block_stack import BlockCall, BlockStack
from fewbit.models.blockwise import BlockwiseModel
from fewbit.models.nested import of_kind
from fewbit.models.token_identity import TokenIdentity
from fewbit.nn.attach import detach


class Calls(Protocol):
    """What blocks are called with beside hidden states."""

    def get(self, batch: int, block: int) -> BlockCall: ...


@dataclass(frozen=True)
class Passage:
    """What goes into the next block, by batch."""

    stack: BlockStack
    device: torch.device | None
    """Where blocks compute; None leaves that to the stack."""
    masks: Sequence[Tensor | None]
    """Per batch, bool [batch, tokens], which leaves padding out; None if all tokens count."""
    calls: Calls
    states: HiddenStates
    full: HiddenStates | None = None
    """In full precision, of the `reference` batches."""
    reference: Sequence[int] = ()
    """Numbers of the batches that also pass in full precision."""
    first: Sequence[int] = ()
    """By batch: the number of its first sequence, for messages."""

    def __len__(self) -> int:
        return len(self.masks)

    def forward(
        self,
        block: nn.Module,
        index: int,
        states: HiddenStates | None = None,
        identity: TokenIdentity | None = None,
    ) -> Callable[[int], Tensor]:
        """Runs a batch, given by its number, through block `index`, which may be replaced by what `block` is; its
        tokens are followed by `identity`."""
        source = self.states if states is None else states

        def forward(batch: int) -> Tensor:
            hidden = source.get(batch)
            hidden = hidden.to(self.device or hidden.device)
            call = self.calls.get(batch, index)
            if identity is not None:
                mask = self.masks[batch]
                identity.begin(hidden, of_kind(call, Tensor), None if mask is None else mask.shape)
            return self.stack.call_block(block, hidden, call)

        return forward

    def emit(self, batch: int, output: Tensor, index: int) -> None:
        """A batch has passed block `index`: what it gave goes into the next. CalibrationError if that is no number."""
        first = self.first[batch] if self.first else batch
        check_finite(output, f"block {self.stack.prefix(index)[:-1]!r}", first, self.masks[batch])
        self.states.put(batch, output)

    def cross(self, block: nn.Module, index: int) -> None:
        """Every batch through a block that is done."""
        forward = self.forward(block, index)
        for batch in range(len(self)):
            self.emit(batch, forward(batch), index)

    def cross_in_full_precision(self, block: nn.Module, index: int) -> None:
        """The reference batches through a block that has its own weights."""
        if self.full is not None:
            forward = self.forward(full_precision(block), index, self.full)
            for batch in self.reference:
                self.full.put(batch, forward(batch))

    def close(self) -> None:
        """Forget all states and remove their files."""
        self.states.close()
        if self.full is not None:
            self.full.close()


def enter(
    model: BlockwiseModel,
    batches: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    memory: int,
    directory: Path,
    reference: Sequence[int] = (),
) -> Passage:
    """All batches ({"input_ids": [batch, tokens], maybe "attention_mask"}) before the first block of a model.

    States beyond `memory` bytes live in files under `directory`, until the passage is closed.
    """
    share = memory // (2 if reference else 1)
    states = HiddenStates(share, directory / "states")
    full = HiddenStates(share, directory / "reference") if reference else None
    calls = RecordedCalls(states, directory / "calls")
    masks = [padding_mask(batch) for batch in batches]
    first = list(accumulate((batch["input_ids"].shape[0] for batch in batches), initial=0))
    passage = Passage(model, device, masks, calls, states, full, reference, first)
    try:
        for batch, inputs in enumerate(model.enter(batches, device)):
            check_finite(inputs.hidden, "the embedding", first[batch], masks[batch])
            states.put(batch, inputs.hidden)
            if full is not None and batch in reference:
                full.put(batch, inputs.hidden)
            calls.append(inputs.calls, padded=masks[batch] is not None)
    except BaseException:
        passage.close()
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return passage


def spread(share: float, total: int) -> list[int]:
    """Numbers of a share of `total` batches, evenly spaced, at least one; none if the share is 0."""
    count = max(1, round(share * total)) if share else 0
    return sorted({number * total // count for number in range(count)})


def full_precision(block: nn.Module) -> nn.Module:
    """A copy that quantizes no activations and shares its weights with the block until those are replaced."""
    copied = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    detach(copied)
    return copied
