"""Anything that can be evaluated, opened as a BlockwiseModel: checkpoint, run, or export."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedModel

from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.errors import CheckpointError
from fewbit.export import compressed_tensors
from fewbit.models.blockwise import BlockwiseModel
from fewbit.pipeline.quantize import resolve_directory


def open_any(model: str | Path | PreTrainedModel) -> BlockwiseModel:
    """A Hugging Face checkpoint or id, a fewbit run, a compressed-tensors export, or a model in memory."""
    if isinstance(model, PreTrainedModel):
        return BlockwiseModel.from_module(model)
    directory = resolve_directory(model)
    if (directory / MANIFEST).exists():
        return BlockwiseModel.from_directory(directory, NativeCheckpoint(directory))
    config = directory / "config.json"
    try:
        quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    except OSError:
        raise CheckpointError(f"{directory} has no config.json; is it a checkpoint, a run or an export?") from None
    except ValueError:
        raise CheckpointError(f"{config} is damaged: it is not JSON") from None
    if quantization is None:
        return BlockwiseModel.from_directory(directory)
    method = quantization.get("quant_method")
    if method != compressed_tensors.NAME:
        raise CheckpointError(f"{directory} is quantized with {method!r}, which fewbit cannot read")
    return BlockwiseModel.from_directory(directory, compressed_tensors.CompressedTensorsSource(directory))
