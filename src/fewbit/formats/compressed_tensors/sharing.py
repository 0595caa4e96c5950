"""Linears that engines fuse into one matrix must have one scale, where the scale is one number for a tensor.

vLLM takes the largest of the fused weights' second-level scales (NVFP4) for all of them and leaves the groups' scales
as they are. FP8 codes with a scale per tensor it rounds anew to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fewbit.checkpoint.native import NativeCheckpoint, NativePart
from fewbit.config.spec import QuantizationSpec
from fewbit.formats.compressed_tensors.targets import fused_with


def unshared(checkpoint: NativeCheckpoint) -> str | None:
    """What is wrong with the scales of a run's fused weights and inputs, in a sentence; None if nothing is."""
    for part in checkpoint.parts:
        for what, kind, found in _single_numbers(part):
            for name, number in found.items():
                for other in fused_with(name):
                    if found.get(other, number) != number:
                        return f"engines fuse {name!r} and {other!r}, so their {what} need the same {kind}"
    return None


def _single_numbers(part: NativePart) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of weights and inputs: the one number of those that have one, by module."""
    weights = {name.removesuffix(".weight"): (name, spec) for name, (spec, _) in part.quantized.items()}
    inputs = {
        name.removesuffix(".input"): activation
        for name, activation in part.activations().items()
        if name.endswith(".input")
    }
    yield (
        "weights",
        "global scale",
        {module: part.global_scale(name) for module, (name, spec) in weights.items() if spec.scale_type == "e4m3"},
    )
    yield (
        "inputs",
        "global scale",
        {module: found.global_scale for module, found in inputs.items() if found.spec.scale_type == "e4m3"},
    )
    yield (
        "weights",
        "scale",
        {
            module: part.read_quantized(name).scale.item()
            for module, (name, spec) in weights.items()
            if _per_tensor(spec)
        },
    )
    yield (
        "inputs",
        "scale",
        {
            module: found.scale.item()
            for module, found in inputs.items()
            if found.scale is not None and _per_tensor(found.spec)
        },
    )


def _per_tensor(spec: QuantizationSpec) -> bool:
    """FP8 with one scale. (Engines give rows of INT8 their own tensor's scale.)"""
    return spec.qscheme == "per_tensor" and not spec.format.is_integer and not spec.format.is_cast
