"""Anything that can be evaluated, opened as a BlockwiseModel: checkpoint, run, export, or a model in memory."""

from __future__ import annotations

import os

from torch import nn
from transformers import PreTrainedModel

from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.hub import resolve_directory
from fewbit.errors import CheckpointError
from fewbit.formats.table import FORMATS
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attach import attach, refuse_quantized


def open_any(model: str | os.PathLike[str] | PreTrainedModel) -> BlockwiseModel:
    """A directory in one of the FORMATS, a hub id, or a model in memory. Activations are quantized as it says."""
    if isinstance(model, nn.Module):
        refuse_quantized(model)
        return BlockwiseModel.from_module(model)
    directory = resolve_directory(model)
    opened = next((found for form in FORMATS if (found := form.open(directory)) is not None), None)
    if opened is None:
        method = (quantization_of(read_config(directory), directory) or {}).get("quant_method")
        raise CheckpointError(f"{directory} is quantized with {method!r}, which fewbit cannot read")
    blockwise = BlockwiseModel.from_directory(directory, opened.source)
    attach(blockwise.skeleton, opened.activations, opened.steps)
    return blockwise
