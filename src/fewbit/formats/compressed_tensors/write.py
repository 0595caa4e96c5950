"""Writes a finished run as a compressed-tensors checkpoint: a shard per block, one block in memory at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.checkpoint.native import NativeCheckpoint, NativePart
from fewbit.checkpoint.side_files import copy_side_files
from fewbit.config.spec import QuantizationSpec
from fewbit.contents import Contents, LinearEntry
from fewbit.errors import ConfigError
from fewbit.formats.compressed_tensors.activations import encode_activation
from fewbit.formats.compressed_tensors.config import NAME, layout_of, quantization_config
from fewbit.formats.compressed_tensors.layouts import Tensors
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


def unshared(checkpoint: NativeCheckpoint) -> str | None:
    """What is wrong with the scales of a run's fused weights and inputs, in a sentence; None if nothing is.

    Where the scale is one number for a tensor, fused linears must have the same: vLLM takes the largest global scale
    (NVFP4) and leaves the groups' scales as they are; FP8 codes with a scale per tensor it rounds anew to the largest.
    """
    for members in checkpoint.contents.fused_linears():
        first: dict[str, tuple[str, float]] = {}
        for linear in members:
            for what, number in _single_numbers(checkpoint, linear):
                name, known = first.setdefault(what, (linear.name, number))
                if number != known:
                    which, kind = what.split(" ", 1)
                    return f"engines fuse {name!r} and {linear.name!r}, so their {which} need the same {kind}"
    return None


def _single_numbers(checkpoint: NativeCheckpoint, linear: LinearEntry) -> Iterator[tuple[str, float]]:
    """Scales of a linear that are one number for its weight or its input."""
    assert linear.weight is not None
    part = checkpoint.part(linear.weight_name)
    if linear.weight.stored_as.has_global_scale:
        yield "weights global scale", part.global_scale(linear.weight_name)
    if _per_tensor(linear.weight):
        yield "weights scale", part.read_quantized(linear.weight_name).scale.item()
    if linear.input is None:
        return
    known = part.activation(f"{linear.name}.input")
    if linear.input.stored_as.has_global_scale:
        yield "inputs global scale", known.global_scale
    if known.scale is not None and _per_tensor(linear.input):
        yield "inputs scale", known.scale.item()


def _per_tensor(spec: QuantizationSpec) -> bool:
    """FP8 with one scale. (Engines give rows of INT8 their own tensor's scale.)"""
    return spec.qscheme == "per_tensor" and not spec.format.is_integer and not spec.format.is_cast
