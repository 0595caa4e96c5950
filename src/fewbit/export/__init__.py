"""Exporters, one file per target format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewbit.checkpoint.files import replacing_directory
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.errors import ConfigError, nearest
from fewbit.export import compressed_tensors
from fewbit.export.verify import Verification, verify, write_origin

__all__ = ["EXPORTERS", "Exporter", "Verification", "export", "export_directory", "exporter", "verify"]


@dataclass(frozen=True)
class Exporter:
    """A target format."""

    name: str
    check: Callable[[NativeCheckpoint], None]
    """Raises ConfigError for a checkpoint that the format cannot hold."""
    write: Callable[[NativeCheckpoint, Path], None]


EXPORTERS = {
    exporter.name: exporter
    for exporter in (Exporter(compressed_tensors.NAME, compressed_tensors.check, compressed_tensors.write),)
}


def exporter(name: str) -> Exporter:
    """The exporter of a format's name; ConfigError names the nearest known one."""
    if name not in EXPORTERS:
        raise ConfigError(f"unknown export format {name!r}{nearest(name, EXPORTERS)}")
    return EXPORTERS[name]


def export(run: str | Path, format: str, output: str | Path) -> Path:
    """Write the finished run `run` in a format of EXPORTERS to the directory `output`, all of it or nothing."""
    target = exporter(format)
    checkpoint = NativeCheckpoint(run)
    target.check(checkpoint)
    with replacing_directory(Path(output)) as beside:
        target.write(checkpoint, beside)
        write_origin(beside, Path(output), Path(run), format)
    return Path(output)


def export_directory(run: str | Path, format: str) -> Path:
    """Where the exports of a run are put unless the user says otherwise."""
    return Path(run) / "exports" / format
