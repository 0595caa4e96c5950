"""The one protocol all benchmark scripts share: how a text becomes windows of tokens.

A text is tokenized in one go, without special tokens, and cut into disjoint windows; the tail that fills no window is
dropped. Each window begins with the BOS token if the tokenizer itself puts one before a text. Two tools that name the
same text, length, count and seed see the same tokens. Needs only torch and transformers, so it can be imported from
the environment of any tool under test.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer


class Windows:
    """A text's tokens by the tokenizer in `model_dir`, cut as one likes."""

    def __init__(self, text_file: Path, model_dir: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        text = Path(text_file).read_text(encoding="utf-8")
        self.tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self.first = torch.tensor([bos] if begins else [], dtype=torch.int64)

    def all(self, length: int) -> torch.Tensor:
        """The disjoint windows in order: [n, length]."""
        body = length - len(self.first)
        count = len(self.tokens) // body
        if count == 0:
            raise ValueError(f"The text has {len(self.tokens)} tokens: too few for one window of {length}.")
        return torch.cat([self.first.expand(count, -1), self.tokens[: count * body].view(count, body)], dim=1)

    def drawn(self, n: int, length: int, seed: int) -> torch.Tensor:
        """`n` of the disjoint windows, drawn without repetition from `seed` and kept in text order: [n, length]."""
        candidates = self.all(length)
        if n > len(candidates):
            raise ValueError(f"The text gives {len(candidates)} windows of {length}, fewer than the {n} asked for.")
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
        return candidates[order[:n].sort().values]
