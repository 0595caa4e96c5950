"""Writes a finished run as a compressed-tensors checkpoint: a shard per block, one block in memory at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fewbit.checkpoint.native import NativeCheckpoint, NativePart
from fewbit.checkpoint.side_files import copy_side_files
from fewbit.checkpoint.source import INDEX_FILE
from fewbit.errors import ConfigError
from fewbit.files import write_json
from fewbit.formats.compressed_tensors.activations import encode_activation
from fewbit.formats.compressed_tensors.config import NAME, kv_cache, layout_of, quantization_config
from fewbit.formats.compressed_tensors.layouts import Tensors
from fewbit.formats.compressed_tensors.sharing import unshared
from fewbit.safetensors_file import write_safetensors

KV_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")
"""By these compressed-tensors knows an attention module that has a cache."""
METADATA = {"format": "pt"}
"""Of a shard; transformers opens no other."""


def write(checkpoint: NativeCheckpoint, directory: Path) -> None:
    """Write the export into an existing empty directory. ConfigError for a run that the format cannot hold."""
    changes = config_changes(checkpoint)
    if fault := unshared(checkpoint):
        raise ConfigError(f"{NAME}: {fault}")
    weight_map: dict[str, str] = {}
    total = 0
    for shard, part in zip(shard_names(checkpoint), checkpoint.parts, strict=True):
        tensors = part_tensors(part)
        write_safetensors(directory / shard, tensors, METADATA)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    copy_side_files(checkpoint.directory, directory, changes)


def shard_names(checkpoint: NativeCheckpoint) -> list[str]:
    """Files of the weights, one for each part of the run."""
    count = len(checkpoint.parts)
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def config_changes(checkpoint: NativeCheckpoint) -> dict[str, Any]:
    """What an export's config.json says otherwise than the run's."""
    weights = {name: spec for name, (spec, _) in checkpoint.quantized.items()}
    activations = {name: found.spec for name, found in checkpoint.activations().items()}
    _check_whole_cache(checkpoint, kv_cache(activations)[1])
    classes = checkpoint.manifest.get("attention_classes", {})
    return {"quantization_config": quantization_config(weights, activations, left_alone(checkpoint), classes)}


def left_alone(checkpoint: NativeCheckpoint) -> list[str]:
    """Modules that readers must not take for quantized, by name or pattern.

    Those are linears that stay as they are, and what engines have linears for although transformers has none: routers,
    and experts in one tensor, which they look for by the names of single experts.
    """
    names = list(checkpoint.manifest["unquantized_linears"])
    for part in checkpoint.parts[:-1]:  # the last has embeddings, which no target reaches
        for name, info in part.dense.items():
            module, _, last = name.rpartition(".")
            if len(info.shape) >= 2 and last == "weight":
                names.append(module)
            elif len(info.shape) == 3:
                names += [module, f"re:{re.escape(module)}\\..*"]
    return list(dict.fromkeys(names))


def part_tensors(part: NativePart) -> Tensors:
    """Everything that the export holds of one part of a run."""
    activations = part.activations()
    specs = {name: found.spec for name, found in activations.items()}
    tensors = {name: part.read(name) for name in part.dense}
    for name, (spec, _) in part.quantized.items():
        module = name.removesuffix(".weight")
        encoded = layout_of(name, spec, specs).encode(part.read_quantized(name))
        tensors |= {f"{module}.{key}": tensor for key, tensor in encoded.items()}
    for name, activation in activations.items():
        tensors |= encode_activation(name, activation)
    return tensors


def _check_whole_cache(checkpoint: NativeCheckpoint, quantized: list[str]) -> None:
    """One entry says how the cache of all layers is quantized, so all of them must be."""
    if not quantized:
        return
    for name in checkpoint.info():
        owner, _, projection = name.removesuffix(".weight").rpartition(".")
        if projection in KV_PROJECTIONS and owner not in quantized:
            raise ConfigError(
                f"{NAME}: the KV cache of {owner!r} is not quantized; the format has all layers' or none"
            )
