"""Anything that can be evaluated, opened as a BlockwiseModel: checkpoint, run, or export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from fewbit.checkpoint.arguments import resolve_directory
from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.errors import CheckpointError
from fewbit.formats import compressed_tensors
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attach import attach_known, refuse_quantized
from fewbit.tensor import QuantizedActivation


def open_any(model: str | Path | PreTrainedModel) -> BlockwiseModel:
    """A Hugging Face checkpoint or id, a fewbit run, a compressed-tensors export, or a model in memory."""
    if isinstance(model, nn.Module):
        refuse_quantized(model)
        return BlockwiseModel.from_module(model)
    directory = resolve_directory(model)
    if (directory / MANIFEST).exists():
        run = NativeCheckpoint(directory)
        run.check_files()
        return _with_activations(BlockwiseModel.from_directory(directory, run), run.activations())
    quantization = quantization_of(read_config(directory), directory)
    if quantization is None:
        return BlockwiseModel.from_directory(directory)
    method = quantization.get("quant_method")
    if method != compressed_tensors.NAME:
        raise CheckpointError(f"{directory} is quantized with {method!r}, which fewbit cannot read")
    export = compressed_tensors.CompressedTensorsSource(directory)
    return _with_activations(BlockwiseModel.from_directory(directory, export), export.activations())


def _with_activations(model: BlockwiseModel, activations: Mapping[str, QuantizedActivation]) -> BlockwiseModel:
    """The model with its activations quantized as the checkpoint says."""
    attach_known(model.skeleton, activations)
    return model
