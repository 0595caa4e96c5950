"""Calibration data: from text or token ids to batches. Texts are packed into full sequences; none is dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import CalibrationError

HUB_PREFIX = "hub:"
TOKENS_PER_BATCH = 2048  # enough to keep matrix products efficient, few enough to keep a block's activations small

CalibrationData = str | Path | Tensor | Sequence[str] | Sequence[Mapping[str, Tensor]]
"""A text file, "hub:DATASET", texts, token ids [sequences, tokens], or a dataloader's batches (see `token_batch`)."""


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
        return sum(
            int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            for batch in self.batches
        )

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
    """A batch as dataloaders give it: token ids, the first of several tensors, or a mapping with input_ids.

    Ids may be lists; one sequence alone is a batch of one.
    """
    if isinstance(item, Mapping) and "input_ids" in item:
        return {name: _rows(value) for name, value in item.items() if value is not None}
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        item = item[0]
    if isinstance(item, Tensor) or (isinstance(item, list) and item):
        return {"input_ids": _rows(item)}
    raise CalibrationError(f"a batch must be token ids or a mapping with input_ids, not {type(item).__name__}")


def _rows(ids: Any) -> Tensor:
    """Token ids or a mask as [sequences, tokens]."""
    try:
        rows = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"a batch holds a {type(ids).__name__} that is no matrix of whole numbers; sequences of unlike lengths "
            "need padding and an attention_mask, or batches of their own"
        ) from None
    return rows.unsqueeze(0) if rows.ndim == 1 else rows


def calibration_set(
    data: CalibrationData | None, tokenizer: Any, num_samples: int, sequence_length: int, seed: int
) -> CalibrationSet:
    """Turn whatever the user gave into batches of `num_samples` sequences (fewer if the text is shorter).

    `None` is the WikiText-2 excerpt that ships with fewbit. Raises CalibrationError if there is not even one sequence.
    """
    if isinstance(data, Tensor):
        return CalibrationSet(_batches(checked_ids(data)), "token ids", data.shape[0])
    if not isinstance(data, str | Path) and data is not None:
        items: list[Any] = [data] if isinstance(data, Mapping) else list(data)
        if not all(isinstance(item, str) for item in items):
            return _ready_batches([token_batch(item) for item in items])
        texts, source = items, "texts"
    else:
        texts, source = read_texts(data)
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: the model's directory has none, so pass token ids")
    tokens = tokenize(texts, tokenizer)
    first = beginning(tokenizer)
    chosen = choose_windows(tokens, num_samples, sequence_length - first.numel(), seed, source)
    batches = _batches(begin_with(first, chosen))
    rest = tokens[chosen.numel() :]
    if chosen.shape[0] < num_samples and rest.numel():  # every window is taken, so what is left over counts too
        batches += _batches(begin_with(first, rest.unsqueeze(0)))
    return CalibrationSet(batches, source, num_samples)


def read_texts(data: str | Path | None) -> tuple[list[str], str]:
    """Texts and a name for them: a file, "hub:DATASET[:CONFIG]", or None for the text that ships with fewbit."""
    if data is None:
        packaged = resources.files("fewbit") / "data" / "calibration.txt"
        return [packaged.read_text(encoding="utf-8")], "WikiText-2 excerpt shipped with fewbit"
    if str(data).startswith(HUB_PREFIX):
        return _hub_texts(str(data).removeprefix(HUB_PREFIX)), str(data)
    path = Path(data)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"calibration text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"calibration text {path} is not UTF-8 text") from None
    if not text.strip():
        raise CalibrationError(f"calibration text {path} is empty")
    return [text], path.name


def tokenize(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """All texts in one stream of token ids [tokens], separated by the end-of-text token if there is one."""
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    stream: list[int] = []
    for text in texts:
        if stream:
            stream += separator
        stream += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(stream, dtype=torch.int64)


def beginning(tokenizer: Any) -> Tensor:
    """Token ids that the tokenizer itself puts before a text: a beginning-of-sequence token [1], or nothing [0].

    Families that were trained with one (Gemma, Llama 3) are not themselves without it, neither in calibration nor in
    evaluation.
    """
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a", verbose=False).input_ids[:1] == [bos]
    return torch.tensor([bos] if begins else [], dtype=torch.int64)


def begin_with(first: Tensor, windows: Tensor) -> Tensor:
    """Windows [n, length] that each begin with the tokens `first` [k]: [n, k + length]."""
    return torch.cat([first.expand(windows.shape[0], -1), windows], dim=1) if first.numel() else windows


def choose_windows(tokens: Tensor, num_samples: int, length: int, seed: int, source: str = "the text") -> Tensor:
    """`num_samples` of the disjoint windows of `length` tokens, chosen by `seed`, in their order: [sequences, length].

    All windows if there are fewer. CalibrationError if there is none.
    """
    windows = tokens[: tokens.numel() // length * length].view(-1, length)
    if windows.shape[0] == 0:
        raise CalibrationError(
            f"calibration text ({source}) has {tokens.numel()} tokens, less than one sequence of {length}; "
            "give more text or a smaller --sequence-length"
        )
    if windows.shape[0] <= num_samples:
        return windows
    chosen = torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))[:num_samples]
    return windows[chosen.sort().values]


def _ready_batches(items: Sequence[Mapping[str, Tensor]]) -> CalibrationSet:
    for item in items:
        if "input_ids" not in item or not set(item) <= {"input_ids", "attention_mask"}:
            raise CalibrationError(f"a calibration batch has input_ids and maybe attention_mask, not {sorted(item)}")
        if "attention_mask" in item and item["attention_mask"].shape != item["input_ids"].shape:
            raise CalibrationError("the attention mask of a calibration batch has another shape than its input_ids")
    batches = [{"input_ids": checked_ids(item["input_ids"])} for item in items]
    for batch, item in zip(batches, items, strict=True):
        if "attention_mask" in item:
            batch["attention_mask"] = item["attention_mask"].cpu()
    if not any(batch.get("attention_mask", batch["input_ids"] == batch["input_ids"]).any() for batch in batches):
        raise CalibrationError("the attention masks of the calibration batches leave every token out")
    return CalibrationSet(batches, "batches", sum(batch["input_ids"].shape[0] for batch in batches))


def _batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1]))]


def checked_ids(ids: Tensor) -> Tensor:
    """Token ids [sequences, tokens] as int64 on the CPU; CalibrationError if they are something else."""
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise CalibrationError(f"token ids must be integers [sequences, tokens], not {ids.dtype} {tuple(ids.shape)}")
    return ids.to("cpu", torch.int64)


def _hub_texts(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(f"hub:{name} needs the datasets library: pip install 'fewbit[hub]'") from None
    dataset, _, config = name.partition(":")
    try:
        rows = load_dataset(dataset, config or None, split="train", streaming=True)
        texts = [row["text"] for row, _ in zip(rows, range(20_000), strict=False) if row.get("text")]
    except Exception as error:  # whatever the hub client raises, the user can only check name and network
        raise CalibrationError(f"dataset {dataset!r} cannot be read from the hub: {error}") from None
    if not texts:
        raise CalibrationError(f"dataset {dataset!r} has no column 'text' with text in it")
    return texts
