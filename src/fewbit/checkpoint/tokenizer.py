"""The tokenizer beside a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fewbit.errors import CheckpointError, first_line
from fewbit.files import check_regular

_FILES = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken*")


def load_tokenizer(directory: Path | None) -> Any:
    """The tokenizer beside a checkpoint; None if there is none. CheckpointError for one that cannot be read."""
    files = [path for pattern in _FILES for path in sorted(directory.glob(pattern))] if directory is not None else []
    if not files:
        return None
    for file in files:
        check_regular(file)  # the library would wait for a pipe
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except BaseException as error:  # damaged files make tokenizers raise anything; a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the tokenizer in {directory} cannot be read ({first_line(error)}); mend its files, give a tokenizer, "
            "or give token ids instead of text"
        ) from None
