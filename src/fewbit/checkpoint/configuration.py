"""Reads config.json and other JSON files of a model; nothing else does.

They are untrusted: a file may be a pipe, endless or damaged, or describe a model of a million layers. It is read as
data; code beside it is not run, and nothing is asked on standard input.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from fewbit.errors import ArchitectureError, CheckpointError, first_line, shown
from fewbit.files import read_json_object

CONFIG_FILE = "config.json"
LARGEST_CONFIG = 2**22  # bytes
_COUNTED = (
    (re.compile(r"^(n|num|encoder|decoder)_(\w+_)?(layers?|blocks?|experts?|codebooks?)$|^depth$"), 2**10),
    (re.compile(r"^(n|num)_(\w+_)?heads?$"), 2**14),
    (re.compile(r"^num_labels$"), 2**17),
)
"""Fields that count objects made in Python, with an upper bound for any model."""
_SIZES = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "hidden_size", "n_embd", "d_model", "vocab_size",
    "num_attention_heads", "n_head", "n_heads", "num_heads",
)  # fmt: skip
"""Fields that are at least 1 in every model."""
LARGEST_SIZE = 2**31 - 1


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint, unchanged."""
    if not os.path.lexists(directory / CONFIG_FILE):
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}; is it a checkpoint, a run or an export?")
    return read_json_object(directory / CONFIG_FILE, LARGEST_CONFIG)


def quantization_of(config: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """quantization_config of a config.json; None if it has none."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{directory / CONFIG_FILE} is damaged: quantization_config is no object with fields")
    return quantization


def load_config(directory: Path, stored: int | None = None) -> PretrainedConfig:
    """transformers' configuration of a checkpoint directory.

    `stored` is the number of its tensors: a model has no more layers. Raises CheckpointError for a file that is
    damaged and ArchitectureError for one that transformers cannot use.
    """
    described = read_config(directory)
    file = directory / CONFIG_FILE
    check_sizes(described, file, stored)
    code = described.get("auto_map")
    if isinstance(code, dict) and "AutoConfig" in code and str(described.get("model_type")) not in CONFIG_MAPPING:
        raise ArchitectureError(
            f"{file} names code of its own (auto_map) and the model type {described.get('model_type')!r}, which "
            "transformers does not know; fewbit runs no code of a checkpoint, so load the model with "
            "transformers' from_pretrained(…, trust_remote_code=True) and give the loaded model"
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a library raises for fields of any type: the user can mend the file only
        raise ArchitectureError(f"{file} is not readable by transformers: {first_line(error)}") from None


def check_sizes(config: Mapping[str, Any], file: Path, stored: int | None = None) -> None:
    """CheckpointError for sizes that no model has, before anything of such a size is built."""
    for path, key, value in _values(config, ""):
        if key in _SIZES and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise CheckpointError(f"{file}: {path} is {shown(value, 60)}, not a whole number of at least 1")
        if not isinstance(value, int):
            continue
        most = min((bound for pattern, bound in _COUNTED if pattern.search(key)), default=LARGEST_SIZE)
        if value > max(most, stored or 0) and (key in _SIZES or most < LARGEST_SIZE):
            of = f" (the checkpoint holds {stored} tensors)" if stored is not None else ""
            raise CheckpointError(f"{file}: {path} is {shown(value, 60)}, more than any model has{of}; mend it")


def _values(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of every plain value of a configuration and of those nested in it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | str):
            yield prefix + key, key, value
