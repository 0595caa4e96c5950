"""Puts activation quantizers on a model, from a recipe or from what a checkpoint says, and tells what became of them.

Linears have the slots input and output, attention modules those of nn/attention.py: MODULE.input, MODULE.key …
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fewbit.config.spec import AttentionConfig, QuantizationConfig, QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.linear import Linear
from fewbit.nn.saving import quantized_in
from fewbit.tensor import QuantizedActivation

SLOTS = ("input", "output")


def attach(
    linears: Mapping[str, Linear],
    configs: Mapping[str, QuantizationConfig],
    groups: Iterable[Iterable[str]],
    dtype: torch.dtype,
) -> None:
    """Quantize inputs and outputs of `linears` as `configs` says, both by full names.

    Linears of one group share their input, so those with the same spec share its quantizer and its scale, as engines
    that fuse them need it. `dtype` is what static scales are stored in.
    """
    shared: dict[tuple[int, QuantizationSpec], ActivationQuantizer] = {}
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    for number, (name, config) in enumerate(configs.items()):
        linear = linears[name]
        if config.input_tensors is not None:
            key = (group_of.get(name, -1 - number), config.input_tensors)
            if key not in shared:
                shared[key] = ActivationQuantizer(config.input_tensors, dtype=dtype)
            linear.input_quantizer = shared[key]
        if config.output_tensors is not None:
            linear.output_quantizer = ActivationQuantizer(config.output_tensors, dtype=dtype)


def attach_known(model: nn.Module, activations: Mapping[str, QuantizedActivation]) -> None:
    """Quantize as a checkpoint says: `activations` by module and slot."""
    for name, activation in activations.items():
        module, _, slot = name.rpartition(".")
        if slot in SLOTS:
            setattr(model.get_submodule(module), f"{slot}_quantizer", ActivationQuantizer(activation.spec, activation))
    if (config := attention_config(activations)) is not None:
        attention.attach(model, config, activations)


def attention_config(activations: Mapping[str, QuantizedActivation]) -> AttentionConfig | None:
    """What is quantized inside attention, which is the same in every layer; None if nothing is."""
    slots = {name.rpartition(".")[2]: activation.spec for name, activation in activations.items()}
    specs = {slot: spec for slot, spec in slots.items() if slot in attention.SLOTS}
    return AttentionConfig(**specs) if specs else None


def quantizers(model: nn.Module, prefix: str = "") -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a model, or of those of its modules whose names begin with `prefix`, by slot."""
    found: dict[str, ActivationQuantizer] = {}
    for name, module in model.named_modules():
        if not name.startswith(prefix):
            continue
        if isinstance(module, Linear):
            slots = {slot: getattr(module, f"{slot}_quantizer") for slot in SLOTS}
        elif isinstance(inside := getattr(module, attention.ATTRIBUTE, None), attention.AttentionQuantizers):
            slots = dict(inside.slots())
        else:
            continue
        found |= {f"{name}.{slot}": quantizer for slot, quantizer in slots.items() if quantizer is not None}
    return found


def refuse_quantized(model: nn.Module) -> None:
    """ConfigError for a model in memory that is quantized already: its float weights would be taken for the model."""
    if found := quantized_in(model):
        raise ConfigError(
            f"the model is quantized in memory already ({found}); give the run's directory, or the original model"
        )


def detach(block: nn.Module) -> None:
    """Nothing below `block` quantizes activations any more."""
    attention.detach(block)
    for module in block.modules():
        if isinstance(module, Linear):
            module.smoothing = module.input_quantizer = module.output_quantizer = None
