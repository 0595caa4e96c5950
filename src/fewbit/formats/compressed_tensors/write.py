"""Writes a finished run as a compressed-tensors checkpoint: a shard per block, one block in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.checkpoint.native import NativeCheckpoint, NativePart
from fewbit.checkpoint.side_files import copy_side_files
from fewbit.contents import Contents
from fewbit.errors import ConfigError
from fewbit.formats.compressed_tensors.activations import encode_activation
from fewbit.formats.compressed_tensors.config import NAME, layout_of, quantization_config
from fewbit.formats.compressed_tensors.layouts import Tensors
from fewbit.formats.compressed_tensors.sharing import unshared
from fewbit.formats.shards import write_shards


def write(checkpoint: NativeCheckpoint, directory: Path) -> None:
    """Write the export into an existing empty directory. ConfigError for a run that the format cannot hold."""
    contents = checkpoint.contents
    changes = config_changes(contents)
    if fault := unshared(checkpoint):
        raise ConfigError(f"{NAME}: {fault}")
    write_shards(directory, (part_tensors(part, contents) for part in checkpoint.parts), len(checkpoint.parts))
    copy_side_files(checkpoint.directory, directory, changes)


def config_changes(contents: Contents) -> dict[str, Any]:
    """What an export's config.json says otherwise than the run's."""
    return {"quantization_config": quantization_config(contents)}


def part_tensors(part: NativePart, contents: Contents) -> Tensors:
    """Everything that the export holds of one part of a run."""
    tensors = {name: part.read(name) for name in part.dense}
    for linear in contents.weights:
        if linear.weight_name in part.quantized:
            encoded = layout_of(linear).encode(part.read_quantized(linear.weight_name))
            tensors |= {f"{linear.name}.{key}": tensor for key, tensor in encoded.items()}
    for name, activation in part.activations().items():
        tensors |= encode_activation(name, activation)
    return tensors
