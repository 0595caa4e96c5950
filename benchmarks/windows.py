"""The one protocol all benchmark scripts share: how a text becomes windows of tokens.

A text is tokenized in one go, without special tokens, and cut into disjoint windows; the tail that fills no window is
dropped. Two tools that name the same text, length, count and seed see the same tokens. Needs only torch and
transformers, so it can be imported from the environment of any tool under test.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer


def tokenize(text_file: Path, model_dir: Path) -> torch.Tensor:
    """All tokens of `text_file` as one int64 vector, by the tokenizer in `model_dir`, without BOS or EOS."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = Path(text_file).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """The disjoint windows of `tokens`, in order: [tokens // length, length]."""
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"The text has {len(tokens)} tokens: too few for one window of {length}.")
    return tokens[: count * length].view(count, length)


def calibration_windows(tokens: torch.Tensor, n: int, length: int, seed: int) -> torch.Tensor:
    """`n` of the disjoint windows, drawn without repetition from `seed` and kept in text order: [n, length]."""
    candidates = windows(tokens, length)
    if n > len(candidates):
        raise ValueError(f"The text gives {len(candidates)} windows of {length} tokens, fewer than the {n} asked for.")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return candidates[order[:n].sort().values]
