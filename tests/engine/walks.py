"""Short walks over tiny models, and finished runs as transformers models put together without the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import fewbit
from fewbit.nn import attention
from fewbit.nn.activation import ActivationQuantizer
from fewbit.nn.attach import attention_config
from fewbit.tensor import QuantizedActivation

Batch = dict[str, Tensor]
TOKEN = {"qscheme": "per_token", "observer": "minmax", "is_dynamic": True}
TENSOR = {"qscheme": "per_tensor", "observer": "minmax"}
WEIGHT = {"dtype": "int4", "group_size": 32}


def batches(padding: int = 7) -> list[Batch]:
    """Three batches of unlike shapes; `padding` is the token that fills the padded places of the second."""
    ids = torch.randint(1, 300, (3, 2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :5] = 0
    mask[1, 20:] = 0
    padded = torch.where(mask.bool(), ids[1], padding)
    return [{"input_ids": ids[0]}, {"input_ids": padded, "attention_mask": mask}, {"input_ids": ids[2][:, :11]}]


TOKENS = 48 + 48 - 9 + 22


def walk(model: Any, output: Path, recipe: Mapping[str, Any], **arguments: Any) -> Path:
    """Directory of a run by a recipe, calibrated on `batches`; rtn unless the recipe says otherwise."""
    given = {"calibration": batches(), "device": "cpu", "progress": False} | arguments
    default = {} if "algo_config" in recipe else {"algorithm": "rtn"}
    return fewbit.quantize(model, output=output, config=default | dict(recipe), **given).directory


def emulate(model: PreTrainedModel, activations: Mapping[str, QuantizedActivation]) -> PreTrainedModel:
    """Quantize what flows through a transformers model, by hooks."""
    for name, known in activations.items():
        module, _, slot = name.rpartition(".")
        quantizer = ActivationQuantizer(known.spec, known)
        if slot == "input":
            model.get_submodule(module).register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
        elif slot == "output":
            model.get_submodule(module).register_forward_hook(lambda _, args, out, q=quantizer: q(out))
    if (config := attention_config(activations)) is not None:
        attention.attach(model, config, activations)
    return model


def watch(model: nn.Module) -> dict[str, list[Tensor]]:
    """Fills, by name, with what each linear is given from now on; hooks that are set later come after it."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    return seen


def run_through(model: nn.Module, data: Iterable[Batch]) -> None:
    with torch.no_grad():
        for batch in data:
            model(**batch, use_cache=False)


def counted(tensors: Iterable[Tensor], data: Iterable[Batch]) -> list[Tensor]:
    """What is no padding of tensors [batch, tokens, channels]: [tokens, channels] each."""
    return [
        x.flatten(0, 1) if (mask := batch.get("attention_mask")) is None else x[mask.bool()]
        for x, batch in zip(tensors, data, strict=True)
    ]
