"""What a user's words for models, devices and sizes mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fewbit.errors import CheckpointError, ConfigError, RunError, first_line, printable, shown
from fewbit.files import check_regular

DEFAULT_ACTIVATION_MEMORY = "4GiB"
_OF_TOKENIZERS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken*",
)
_NOT_FETCHED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.npz", "*.pkl", "*.ot",
    "consolidated*.safetensors",
)  # fmt: skip
"""Of a model of the hub: weights in formats that fewbit does not read."""
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def resolve_directory(model: str | Path) -> Path:
    """The directory of a checkpoint: the path itself, or where the hub's client put the model of that id."""
    try:
        path = Path(model)
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # a name that is too long, a null byte
        raise CheckpointError(f"{printable(model)[:200]!r} cannot be a directory: {first_line(error)}") from None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise CheckpointError(
            f"{model} does not exist; give a checkpoint's directory or a model id of the hub (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), ignore_patterns=list(_NOT_FETCHED)))
    except Exception as error:  # whatever the hub's client raises, the user can check name and network only
        raise CheckpointError(
            f"{model} is no directory here and could not be fetched from the hub: {first_line(error)}"
        ) from None


def choose_device(name: str) -> torch.device:
    """The device that computes. "auto" takes a CUDA GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"unknown device {shown(name)}; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise RunError(f"device {name!r} was asked for, but this machine has no such GPU; use --device cpu")
    return device


def parse_size(value: str | int) -> int:
    """Bytes of "4GiB", "500MB" or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"{shown(value)} is no size; write for example 4GiB or 500MB")
    return int(min(float(match[1]), 2.0**62) * _UNITS[match[2].lower()])


def load_tokenizer(directory: Path | None) -> Any:
    """The tokenizer beside a checkpoint; None if there is none. CheckpointError for one that cannot be read."""
    if directory is None:
        return None
    files = [path for pattern in _OF_TOKENIZERS for path in sorted(directory.glob(pattern))]
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
