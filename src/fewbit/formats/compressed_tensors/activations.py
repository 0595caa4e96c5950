"""What calibration found for activations, as tensors beside their module.

    input_scale         [1], the model's dtype        static inputs (per tensor)
    input_zero_point    int8 [1]                      affine ones; code − zero is code − zero_point
    input_global_scale  float32 [1]                   NVFP4: what dynamic scales are divided by
    k_scale, v_scale, q_scale                         [1], or [heads, 1, 1]; affine ones have k_zero_point …

Dynamic activations have no tensors.
"""

import torch
from torch import Tensor

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.formats.compressed_tensors.config import ATTENTION_SLOTS
from fewbit.formats.compressed_tensors.layouts import codes_from_signed, divisor, signed_codes
from fewbit.tensor import QuantizedActivation

PARTS = ("scale", "zero_point", "global_scale")
PREFIXES = {"input": "input"} | ATTENTION_SLOTS


def encode_activation(name: str, activation: QuantizedActivation) -> dict[str, Tensor]:
    """Tensors of the activation `name` (MODULE.SLOT) by their full names. ConfigError if calibration found nothing."""
    module, _, slot = name.rpartition(".")
    spec, tensors = activation.spec, {}
    if spec.stored_as.has_global_scale:
        tensors["global_scale"] = divisor(activation.global_scale)
    elif not spec.is_dynamic:
        if activation.scale is None:
            raise ConfigError(f"{name!r} has a static scale, but none was calibrated")
        tensors["scale"] = _stored_shape(activation.scale, spec)
        if activation.zero_point is not None:
            tensors["zero_point"] = _stored_shape(signed_codes(activation.zero_point, spec), spec)
    return {f"{module}.{PREFIXES[slot]}_{part}": tensor for part, tensor in tensors.items()}


def decode_activation(tensors: dict[str, Tensor], spec: QuantizationSpec, slot: str) -> QuantizedActivation:
    """Inverse of `encode_activation`; `tensors` by their names beside the module."""

    def stored(part: str) -> Tensor:
        if (name := f"{PREFIXES[slot]}_{part}") not in tensors:
            raise CheckpointError(f"{name} is missing, which a static {slot} needs")
        return tensors[name]

    if spec.stored_as.has_global_scale:
        return QuantizedActivation(spec, global_scale=1.0 / float(stored("global_scale")))
    if spec.is_dynamic:
        return QuantizedActivation(spec)
    zero = None if spec.symmetric else codes_from_signed(stored("zero_point"), spec).reshape(1, -1)
    return QuantizedActivation(spec, stored("scale").reshape(1, -1), zero)


def _stored_shape(tensor: Tensor, spec: QuantizationSpec) -> Tensor:
    """[1, 1] → [1]; a number for each head [1, heads] → [heads, 1, 1]."""
    return tensor.reshape(1) if spec.qscheme == "per_tensor" else torch.reshape(tensor, (-1, 1, 1)).contiguous()
