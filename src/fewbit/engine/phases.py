"""Methods that work on more than a group of linears, by the name of their options, as `algorithms` has those that do
not: on the model before anything else, on a block when its groups are done."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewbit.engine.block_work import BlockWork
from fewbit.models.blockwise import BlockwiseModel


@dataclass(frozen=True)
class QuantizedBlock:
    """A block whose groups are done; its outputs have not gone on yet."""

    block: nn.Module
    """With what became of its linears. A method that changes `work` changes the modules alike."""
    work: BlockWork
    batches: Sequence[int]
    """Numbers of the calibration batches."""
    forward: Callable[[int], Tensor]
    """A batch's output as the block is now."""
    target: Callable[[int], Tensor] | None
    """Its output in full precision, of the batches in `reference`; None unless a method needs the reference."""
    reference: Sequence[int]


MODEL_PHASES: dict[str, Callable[[BlockwiseModel, Any], BlockwiseModel]] = {}
"""(model, options) → the model that is quantized instead: the same with another tensor source in front, say."""
BLOCK_PHASES: dict[str, Callable[[QuantizedBlock, Any], None]] = {}
"""(block, options): changes `work.results` or `work.dense`, and the block's modules with them."""
