"""What calibration found for activations, as tensors beside their module.

    input_scale         [1], the model's dtype        static inputs (per tensor)
    input_zero_point    int8 [1]                      affine ones; code − zero is code − zero_point
    input_global_scale  float32 [1]                   NVFP4: what dynamic scales are divided by
    k_scale, v_scale, q_scale                         [1], or [heads, 1, 1]; affine ones have k_zero_point …

Dynamic activations have no tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.formats.compressed_tensors.config import ATTENTION_SLOTS
from fewbit.formats.compressed_tensors.layouts import codes_from_signed, divisor, signed_codes
from fewbit.tensor import QuantizedActivation

PARTS = ("scale", "zero_point", "global_scale")
PREFIXES = {"input": "input"} | ATTENTION_SLOTS


def stored_names(spec: QuantizationSpec, slot: str) -> list[str]:
    """Names, beside the module, of the tensors of an activation in `slot`."""
    prefix = PREFIXES[slot]
    if spec.stored_as.has_global_scale:
        return [f"{prefix}_global_scale"]
    if spec.is_dynamic:
        return []
    return [f"{prefix}_scale"] + [f"{prefix}_zero_point"] * (not spec.symmetric)


def encode_activation(name: str, activation: QuantizedActivation) -> dict[str, Tensor]:
    """Tensors of the activation `name` (MODULE.SLOT) by their full names. ConfigError if calibration found nothing."""
    module, _, slot = name.rpartition(".")
    spec, scale, zero = activation.spec, activation.scale, activation.zero_point
    tensors = {}
    for part in stored_names(spec, slot):
        if part.endswith("global_scale"):
            value = divisor(activation.global_scale)
        elif scale is None:
            raise ConfigError(f"{name!r} has a static scale, but none was calibrated")
        elif part.endswith("_scale"):
            value = _stored_shape(scale, spec)
        else:
            assert zero is not None
            value = _stored_shape(signed_codes(zero, spec), spec)
        tensors[f"{module}.{part}"] = value
    return tensors


def decode_activation(tensors: dict[str, Tensor], spec: QuantizationSpec, slot: str) -> QuantizedActivation:
    """Inverse of `encode_activation`; `tensors` by their names beside the module."""
    prefix = PREFIXES[slot]
    for part in stored_names(spec, slot):
        if part not in tensors:
            raise CheckpointError(f"{part} is missing, which a static {slot} needs")
    if spec.stored_as.has_global_scale:
        return QuantizedActivation(spec, global_scale=1.0 / float(tensors[f"{prefix}_global_scale"]))
    if spec.is_dynamic:
        return QuantizedActivation(spec)
    scale, zero = tensors[f"{prefix}_scale"].reshape(1, -1), None
    if not spec.symmetric:
        zero = codes_from_signed(tensors[f"{prefix}_zero_point"], spec).reshape(1, -1)
    return QuantizedActivation(spec, scale, zero)


def _stored_shape(tensor: Tensor, spec: QuantizationSpec) -> Tensor:
    """[1, 1] → [1]; a number for each head [1, heads] → [heads, 1, 1]."""
    return tensor.reshape(1) if spec.qscheme == "per_tensor" else torch.reshape(tensor, (-1, 1, 1)).contiguous()
