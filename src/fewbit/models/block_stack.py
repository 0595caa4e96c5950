"""What engine and evaluation need of whatever holds blocks: a checkpoint, a model in memory, a list of layers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbit.checkpoint.source import TensorSource
from fewbit.models.architecture import Groups

BlockCall = dict[str, Any]
"""Keyword arguments of one block for one batch."""


class BlockStack(Protocol):
    """Blocks in the order of execution, of which each one's output is the next one's input."""

    @property
    def source(self) -> TensorSource:
        """The weights as they are stored, by their full names."""

    def __len__(self) -> int: ...

    def prefix(self, index: int) -> str:
        """What the full names of a block's modules begin with: "model.layers.3."."""

    def block_tensors(self, index: int) -> list[str]:
        """Full names of a block's stored tensors."""

    def groups(self, index: int, passing: Sequence[Callable[[], object]] = ()) -> Groups:
        """Linears of a block that share an input, in execution order. `passing` run a batch each through the block,
        which is loaded, where that can only be found by looking."""

    def loaded(
        self,
        index: int,
        device: torch.device | str = "cpu",
        read: Callable[[], dict[str, Tensor]] | None = None,
    ) -> AbstractContextManager[nn.Module]:
        """A block with its weights, ready to compute in float32; its modules may be given others inside.

        `read` gives other weights than the source's, by their full names.
        """

    def call_block(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
        """A block's output for hidden states [batch, tokens, channels]."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a linear's weight, by its full name: scales are stored in it where a spec leaves that open."""
