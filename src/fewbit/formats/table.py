"""The formats that fewbit knows, and the opening of whatever is in one of them. A new one is a row."""

import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.hub import resolve_directory
from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.contents import Contents
from fewbit.errors import CheckpointError, ConfigError, nearest
from fewbit.formats import compressed_tensors
from fewbit.formats.format import ExportFormat, Format, Opened
from fewbit.models.blockwise import BlockwiseModel
from fewbit.nn.attach import attach, refuse_quantized


def _open_run(directory: Path) -> Opened | None:
    if not (directory / MANIFEST).exists():
        return None
    run = NativeCheckpoint(directory)
    run.check_files()
    return Opened(run, run.activations(), run.steps())


def _open_plain(directory: Path) -> Opened | None:
    return Opened() if quantization_of(read_config(directory), directory) is None else None


FORMATS: tuple[Format, ...] = (
    Format("fewbit", _open_run),
    Format("safetensors", _open_plain),
    compressed_tensors.FORMAT,
)
"""In the order in which a directory is tried."""
EXPORTERS: dict[str, ExportFormat] = {form.name: form for form in FORMATS if isinstance(form, ExportFormat)}


def exporter(name: str) -> ExportFormat:
    """The format of that name that can be written; ConfigError names the nearest one."""
    if name not in EXPORTERS:
        raise ConfigError(f"unknown export format {name!r}{nearest(name, EXPORTERS)}")
    return EXPORTERS[name]


def holding(contents: Contents) -> list[ExportFormat]:
    """The formats that a run of such contents can be exported to."""
    return [form for form in EXPORTERS.values() if form.holds(contents)]


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
