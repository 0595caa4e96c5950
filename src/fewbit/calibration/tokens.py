"""Calibration data: from text or token ids to batches. Texts are packed into full sequences; none is dropped."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.calibration.rows import holds_ids, texts_of
from fewbit.calibration.texts import read_rows
from fewbit.errors import CalibrationError, first_line

_BESIDE = ("text", "messages", "labels", "token_type_ids", "special_tokens_mask", "length")
"""Columns of a tokenized dataset that a causal language model ignores or does not need."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
TOKENS_PER_BATCH = 2048  # enough to keep matrix products efficient, few enough to keep a block's activations small

CalibrationData = str | Path | Tensor | Sequence[str] | Sequence[Mapping[str, Any]]
"""A file (see `texts`), "hub:DATASET", texts, rows with `text` or `messages` (see `rows`), token ids [sequences,
tokens], or a dataloader's batches (see `token_batch`)."""


@dataclass(frozen=True)
class CalibrationSet:
    """Batches that the model is calibrated on."""

    batches: list[dict[str, Tensor]]
    """{"input_ids": [batch, tokens] int64} and, where there is padding, "attention_mask" of the same shape."""
    source: str
    requested: int

    @property
    def sequences(self) -> int:
        return sum(batch["input_ids"].shape[0] for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Tokens that count: padding is left out."""
        masks = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in self.batches)
        return sum(int(mask.sum()) for mask in masks)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for batch in self.batches:
            for name in sorted(batch):
                digest.update(f"{name}{tuple(batch[name].shape)}".encode())
                digest.update(batch[name].to(torch.int64).numpy().tobytes())
        return digest.hexdigest()


def padding_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Bool [batch, tokens], True where a token counts; None if all do."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def token_batch(item: Any) -> dict[str, Tensor]:
    """A batch as dataloaders give it: token ids (or lists), the first of several tensors, or a mapping with input_ids.
    One sequence alone is a batch of one."""
    if isinstance(item, Mapping) and "input_ids" in item:
        return {name: _rows(value) for name, value in item.items() if value is not None and name not in _BESIDE}
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        item = item[0]
    if isinstance(item, Tensor | np.ndarray) or (isinstance(item, list) and item):
        return {"input_ids": _rows(item)}
    raise CalibrationError(f"a batch must be token ids or a mapping with input_ids, not {type(item).__name__}")


def _rows(ids: Any) -> Tensor:
    """Token ids or a mask as [sequences, tokens]."""
    try:
        rows = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise CalibrationError(
            f"a batch holds a {type(ids).__name__} that is no matrix of whole numbers; sequences of unlike lengths "
            "need padding and an attention_mask, or batches of their own"
        ) from None
    return rows.unsqueeze(0) if rows.ndim == 1 else rows


def calibration_set(
    data: CalibrationData | None,
    tokenizer: Any,
    num_samples: int,
    sequence_length: int,
    seed: int,
    load_tokenizer: Callable[[], Any] | None = None,
) -> CalibrationSet:
    """Turn calibration data into batches of `num_samples` sequences (fewer if the text is shorter).

    `None` is the WikiText-2 excerpt that ships with fewbit. `load_tokenizer` gives the tokenizer where `tokenizer` is
    None and texts need one. Raises CalibrationError if there is not even one sequence.
    """
    found, source = rows_of(data)
    if isinstance(found, Tensor):
        return CalibrationSet(_batches(checked_ids(found)), source, found.shape[0])
    if all_ids(found, source):
        return _ready_batches([token_batch(item) for item in found])
    tokens, first = stream_of(found, source, tokenizer, load_tokenizer)
    if first.numel() >= sequence_length:
        raise CalibrationError(f"a sequence of {sequence_length} has no place for text; give a longer one")
    chosen = choose_windows(tokens, num_samples, sequence_length - first.numel(), seed, source)
    batches = _batches(begin_with(first, chosen))
    rest = tokens[chosen.numel() :]
    if chosen.shape[0] < num_samples and rest.numel():  # every window is taken, so what is left over counts too
        batches += _batches(begin_with(first, rest.unsqueeze(0)))
    return CalibrationSet(batches, source, num_samples)


def rows_of(data: Any) -> tuple[Tensor | list[Any], str]:
    """The data as token ids (an unchanged tensor) or as rows, and a name for it."""
    if isinstance(data, np.ndarray):
        data = _rows(data)
    if isinstance(data, Tensor):
        return data, "token ids"
    if data is None or isinstance(data, str | Path):
        return read_rows(data)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a table of pandas, whose items are its columns' names
        data = data.to_dict("records")
    if isinstance(data, Mapping):
        data = [data]
    try:
        items = list(data)
    except TypeError:
        raise CalibrationError(f"give a file, texts, rows or token ids, not a {type(data).__name__}") from None
    return items, "texts" if all(isinstance(item, str) for item in items) else "given rows"


def stream_of(
    rows: Sequence[Any], source: str, tokenizer: Any, load_tokenizer: Callable[[], Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The rows' texts as one stream of token ids [tokens], and the ids [0 or 1] that every window begins with."""
    if tokenizer is None and load_tokenizer is not None:
        tokenizer = load_tokenizer()
    if tokenizer is None:
        raise CalibrationError(
            "a text needs a tokenizer, and there is no tokenizer beside the model; pass one, or token ids"
        )
    if not hasattr(tokenizer, "eos_token_id"):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise CalibrationError(f"the tokenizer must be one of transformers', not a {type(tokenizer).__name__}")
    texts = texts_of(rows, source, tokenizer)
    if rows and not texts:
        raise CalibrationError(f"text ({source}) holds only empty texts")
    try:
        return tokenize(texts, tokenizer), beginning(tokenizer)
    except Exception as error:  # a damaged vocabulary is found only here, in a different way by each tokenizer
        raise CalibrationError(
            f"the tokenizer cannot encode the text ({source}): {type(error).__name__}: {first_line(error)}; is it "
            "damaged?"
        ) from None


def all_ids(rows: Sequence[Any], source: str) -> bool:
    """Whether rows are token ids, not texts; CalibrationError for a mixture."""
    tokens = [holds_ids(row) for row in rows]
    if any(tokens) and not all(tokens):
        number = tokens.index(not tokens[0]) + 1
        raise CalibrationError(
            f"row {number} of {source} holds {'token ids' if tokens[number - 1] else 'text'} and the first row does "
            "not; give batches of token ids, or texts"
        )
    return bool(tokens) and tokens[0]


def tokenize(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """All texts in one stream of token ids [tokens], separated by the end-of-text token if there is one."""
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stream = array("q")
    for text in texts:
        if stream:
            stream.extend(separator)
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return torch.tensor(stream, dtype=torch.int64)


def beginning(tokenizer: Any) -> Tensor:
    """Token ids that the tokenizer itself puts before a text: a beginning-of-sequence token [1], or nothing [0].
    Families trained with one (Gemma, Llama 3) degrade without it."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a", verbose=False).input_ids[:1] == [bos]
    return torch.tensor([bos] if begins else [], dtype=torch.int64)


def begin_with(first: Tensor, windows: Tensor) -> Tensor:
    """Windows [n, length] that each begin with the tokens `first` [k]: [n, k + length]."""
    return torch.cat([first.expand(windows.shape[0], -1), windows], dim=1) if first.numel() else windows


def choose_windows(tokens: Tensor, num_samples: int, length: int, seed: int, source: str = "the text") -> Tensor:
    """`num_samples` of the disjoint windows of `length` tokens, chosen by `seed`, in their order: [sequences, length];
    all if there are fewer. CalibrationError if there is none."""
    windows = tokens[: tokens.numel() // length * length].view(-1, length)
    if windows.shape[0] == 0:
        raise CalibrationError(
            f"text ({source}) has {tokens.numel()} tokens, less than one sequence of {length}; "
            "give more text or a smaller --sequence-length"
        )
    if windows.shape[0] <= num_samples:
        return windows
    chosen = torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))[:num_samples]
    return windows[chosen.sort().values]


def _ready_batches(items: Sequence[Mapping[str, Tensor]]) -> CalibrationSet:
    batches = []
    for item in items:
        if "input_ids" not in item or not set(item) <= {"input_ids", "attention_mask"}:
            raise CalibrationError(f"a calibration batch has input_ids and maybe attention_mask, not {sorted(item)}")
        batches.append({"input_ids": checked_ids(item["input_ids"])})
        if (mask := item.get("attention_mask")) is not None:
            if mask.shape != item["input_ids"].shape:
                raise CalibrationError("the attention mask of a batch has another shape than its input_ids")
            batches[-1]["attention_mask"] = mask.cpu()
    if all("attention_mask" in batch and not batch["attention_mask"].any() for batch in batches):
        raise CalibrationError("the attention masks of the calibration batches leave every token out")
    return CalibrationSet(batches, "batches", sum(batch["input_ids"].shape[0] for batch in batches))


def _batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))]


def checked_ids(ids: Tensor) -> Tensor:
    """Token ids [sequences, tokens] as int64 on the CPU; CalibrationError if they are something else."""
    if ids.ndim != 2 or ids.numel() == 0 or ids.dtype not in _INTEGERS:
        raise CalibrationError(f"token ids must be integers [sequences, tokens], not {ids.dtype} {tuple(ids.shape)}")
    return ids.to("cpu", torch.int64)
