"""Checkpoints by a directory or a model id of the hub."""

import os
import re
from pathlib import Path

from fewbit.errors import CheckpointError, first_line, printable

_NOT_FETCHED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.tflite", "*.npz", "*.pkl", "*.ot",
    "consolidated*.safetensors",
)  # fmt: skip
"""Of a model of the hub: weights in formats that fewbit does not read."""


def resolve_directory(model: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint: the path itself, or the hub client's copy of the model of that id."""
    model = os.fspath(model)
    try:
        path = Path(model)
        if path.exists():
            return path
    except (OSError, ValueError) as error:  # a name that is too long, a null byte
        raise CheckpointError(f"{printable(model)[:200]!r} cannot be a directory: {first_line(error)}") from None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"{model} does not exist; give a checkpoint's directory or a model id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=list(_NOT_FETCHED)))
    except Exception as error:  # whatever the hub's client raises, the user can check name and network only
        raise CheckpointError(
            f"{model} is no directory here and could not be fetched from the hub: {first_line(error)}"
        ) from None
