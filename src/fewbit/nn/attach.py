"""Puts activation quantizers and input steps on a model, from a recipe or from what a checkpoint says. Linears have
the slots input and output, attention modules those of nn/attention.py: MODULE.input, MODULE.key …
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.native import StoredStep
from fewbit.config.spec import AttentionConfig, QuantizationSpec
from fewbit.contents import ATTENTION_SLOTS, LINEAR_SLOTS
from fewbit.errors import CheckpointError, ConfigError
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.exchange import Exchange
from fewbit.nn.saving import quantized_in
from fewbit.nn.stepped import Stepped
from fewbit.tensor import QuantizedActivation


def attach(
    model: nn.Module,
    activations: Mapping[str, QuantizationSpec | QuantizedActivation],
    steps: Mapping[str, Sequence[StoredStep]] | None = None,
    *,
    groups: Iterable[Iterable[str]] = (),
    dtype: torch.dtype = torch.float32,
    linears: Mapping[str, Stepped] | None = None,
    changes: Exchange | None = None,
) -> None:
    """Quantize what flows through a model, and let the inputs of its linears take steps.

    Args:
        activations: by module and slot, specs that are to be calibrated, or what calibration found.
        steps: of each linear's input, as a run has stored them; those that are folded are left out.
        groups: full names of linears that share their input; those with the same spec share quantizer and scale.
        dtype: what static scales are stored in where the spec leaves it to the checkpoint.
        linears: by name, those that take others' places when `changes` are committed; what they quantize with is part
            of the state dict. Without them the model's own, and all happens now.

    CheckpointError for a linear that the model does not have; ArchitectureError or ConfigError, before anything has
    changed, if its attention cannot be reached.
    """
    persistent = linears is not None
    if linears is None:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Stepped)}
    attached = Exchange()
    if (inside := attention_config(activations)) is not None:
        states = {name: known for name, known in activations.items() if isinstance(known, QuantizedActivation)}
        attention.attach(model, inside, states, dtype, persistent=persistent, changes=attached)
    shared: dict[tuple[int, QuantizationSpec], ActivationQuantizer] = {}
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    for name, known in activations.items():
        module, _, slot = name.rpartition(".")
        if slot not in LINEAR_SLOTS:
            continue
        spec, state = (known, None) if isinstance(known, QuantizationSpec) else (known.spec, known)
        quantizer = ActivationQuantizer(spec, state, dtype, persistent)
        if slot == "input" and module in group_of:
            quantizer = shared.setdefault((group_of[module], spec), quantizer)
        setattr(_linear(linears, module), f"{slot}_quantizer", quantizer)
    for name, stored in (steps or {}).items():
        if stored:
            _linear(linears, name).restore_steps(stored)
    attached.commit() if changes is None else changes.include(attached)


def _linear(linears: Mapping[str, Stepped], name: str) -> Stepped:
    if name not in linears:
        raise CheckpointError(f"the input or output of {name!r} is quantized, but the model has no such linear")
    return linears[name]


def attention_config(activations: Mapping[str, QuantizationSpec | QuantizedActivation]) -> AttentionConfig | None:
    """What is quantized inside attention, which is the same in every layer; None if nothing is."""
    slots = {name.rpartition(".")[2]: known for name, known in activations.items()}
    inside = {slot: slots[slot] for slot in ATTENTION_SLOTS if slot in slots}
    specs = {slot: known if isinstance(known, QuantizationSpec) else known.spec for slot, known in inside.items()}
    return AttentionConfig(**specs) if specs else None


def quantizers(model: nn.Module, prefix: str = "") -> dict[str, ActivationQuantizer]:
    """The activation quantizers of a model, or of those of its modules whose names begin with `prefix`, by slot."""
    found: dict[str, ActivationQuantizer] = {}
    for name, module in model.named_modules():
        if name.startswith(prefix):
            slots: dict[str, Any] = dict(getattr(module, attention.ATTRIBUTE, {}))
            if isinstance(module, Stepped):
                slots = {slot: getattr(module, f"{slot}_quantizer") for slot in LINEAR_SLOTS}
            found |= {f"{name}.{slot}": quantizer for slot, quantizer in slots.items() if quantizer is not None}
    return found


def refuse_quantized(model: nn.Module) -> None:
    """ConfigError for a model in memory that is quantized already: its float weights would be taken for the model."""
    if what := quantized_in(model):
        raise ConfigError(f"the model is quantized in memory already ({what}); give the run or the original model")


def detach(block: nn.Module) -> None:
    """Nothing below `block` quantizes activations any more. Steps that lose nothing stay."""
    attention.detach(block)
    for module in block.modules():
        if isinstance(module, Stepped):
            module.input_quantizer = module.output_quantizer = None
