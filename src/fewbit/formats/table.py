"""The formats that fewbit knows. A new one is a row."""

from __future__ import annotations

from pathlib import Path

from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.contents import Contents
from fewbit.errors import ConfigError, nearest
from fewbit.formats import compressed_tensors
from fewbit.formats.format import ExportFormat, Format, Opened


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
