"""Linears that engines fuse into one matrix must have one second-level scale.

vLLM takes the largest of the fused weights' global scales for all of them and leaves the groups' scales as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from fewbit.checkpoint.native import NativeCheckpoint

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))


def fused_with(name: str) -> Iterator[str]:
    """Modules, whether there or not, that are fused with the module `name`."""
    owner, dot, last = name.rpartition(".")
    for group in FUSED:
        if last in group:
            yield from (f"{owner}{dot}{member}" for member in group if member != last)


def unshared(checkpoint: NativeCheckpoint) -> str | None:
    """What is wrong with the second-level scales of a run's weights and inputs, in a sentence; None if nothing is."""
    for part in checkpoint.parts:
        units = {name.removesuffix(".weight"): part.global_scale(name)
                 for name, (spec, _) in part.quantized.items() if spec.scale_type == "e4m3"}  # fmt: skip
        inputs = {
            name.removesuffix(".input"): activation.global_scale
            for name, activation in part.activations().items()
            if activation.spec.scale_type == "e4m3"
        }
        for what, found in (("weights", units), ("inputs", inputs)):
            for name, unit in found.items():
                for other in fused_with(name):
                    if found.get(other, unit) != unit:
                        return f"engines fuse {name!r} and {other!r}, so their {what} need the same global scale"
    return None
