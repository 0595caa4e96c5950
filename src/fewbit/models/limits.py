"""Limits of a model's input, checked before the work: its vocabulary and its positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fewbit.errors import CalibrationError

if TYPE_CHECKING:
    from fewbit.models.blockwise import BlockwiseModel

_TABLES = ("embed_positions", "pos_encoding")  # buffers with one row per position, which some rotary families index
_STRETCHES = ("linear", "dynamic", "yarn")  # kinds of rope scaling whose factor is not yet in max_position_embeddings


@dataclass(frozen=True)
class Positions:
    """Most tokens of a sequence."""

    limit: int
    hard: bool
    """Beyond it there is nothing to look up (learned positions); otherwise results only get worse (rotary ones)."""


def check_tokens(model: BlockwiseModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """CalibrationError if a batch's input_ids hold what the model has no embedding for."""
    for number, batch in enumerate(batches):
        low, high = (int(end) for end in batch["input_ids"].aminmax())
        if low < 0 or high >= model.vocabulary:
            raise CalibrationError(
                f"token ids go from {low} to {high} (batch {number}), but the model has the tokens 0 to "
                f"{model.vocabulary - 1}; is the tokenizer another model's, or larger than the model's embedding?"
            )


def check_length(model: BlockwiseModel, length: int) -> list[str]:
    """CalibrationError if a sequence of `length` tokens has more than the positions that the model has learned; a
    warning if only more than it was trained with."""
    found = positions(model.skeleton, model.architecture.blocks.rpartition(".")[0])
    if found is None or length <= found.limit:
        return []
    advice = f"use a sequence length of at most {found.limit} (--sequence-length)"
    if found.hard:
        raise CalibrationError(
            f"sequences of {length} tokens do not fit the {found.limit} positions that the model has learned; {advice}"
        )
    return [
        f"sequences of {length} tokens are longer than the {found.limit} positions that the model was trained with, "
        f"where it predicts worse than it can; {advice}"
    ]


def positions(skeleton: PreTrainedModel, decoder: str) -> Positions | None:
    """What is known of a model's positions; None if it has no limit.

    `decoder` is the name of the module that holds the blocks: tables elsewhere are those of pictures or sounds.
    """
    if tables := list(_tables(skeleton, decoder)):
        return Positions(min(tables), hard=True)
    config: Any = skeleton.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1 or getattr(config, "alibi", False):
        return None
    return Positions(max([limit, *_stretched(getattr(config, "rope_parameters", None), limit)]), hard=False)


def _tables(skeleton: PreTrainedModel, decoder: str) -> Iterable[int]:
    """Rows of every table that is indexed with positions."""
    words = skeleton.get_input_embeddings()
    for name, module in skeleton.get_submodule(decoder).named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not words:
            described = f"{leaf} {type(module).__name__}".lower()
            if leaf == "wpe" or "position" in described or "pos_emb" in described:
                offset = getattr(module, "offset", 0)  # OPT and its kin leave the first rows to padding
                yield module.num_embeddings - (offset if isinstance(offset, int) else 0)
        for table in _TABLES:
            if (buffer := module._buffers.get(table)) is not None and buffer.ndim == 2:
                yield buffer.shape[0]


def _stretched(rope: Any, limit: int) -> Iterable[int]:
    """Positions that rope scaling makes of those the model was trained with; one set of parameters, or one per kind of
    layer."""
    if not isinstance(rope, Mapping):
        return
    for nested in rope.values():
        yield from _stretched(nested, limit)
    factor = rope.get("factor")
    if rope.get("rope_type") in _STRETCHES and isinstance(factor, int | float):
        yield int((rope.get("original_max_position_embeddings") or limit) * factor)
