"""Linears that engines fuse into one matrix must have one scale, where the scale is one number for a tensor.

vLLM takes the largest of the fused weights' global scales (NVFP4) for all of them and leaves the groups' scales
as they are. FP8 codes with a scale per tensor it rounds anew to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator

from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.config.spec import QuantizationSpec
from fewbit.contents import LinearEntry


def unshared(checkpoint: NativeCheckpoint) -> str | None:
    """What is wrong with the scales of a run's fused weights and inputs, in a sentence; None if nothing is."""
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
