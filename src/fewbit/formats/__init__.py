"""Exporters, one package per target format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fewbit import process
from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.config.schemes import CacheSuite, Scheme
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError, RunError, nearest
from fewbit.files import replacing_directory
from fewbit.formats import compressed_tensors
from fewbit.formats.verification import ORIGIN, Verification, is_complete, read_origin, write_origin
from fewbit.scratch import is_scratch

Specs = Mapping[str, QuantizationSpec]
Shapes = Mapping[str, tuple[int, int]]

__all__ = [
    "EXPORTERS",
    "Exporter",
    "Verification",
    "already_there",
    "engines_of_cache",
    "engines_of_scheme",
    "export",
    "export_directory",
    "exporter",
    "verify",
]


class Check(Protocol):
    """Raises ConfigError for specs that a format cannot hold: of weights by their names, of activations by module and
    slot (MODULE.input, ATTENTION_MODULE.key, …); `shapes` [out, in] of the weights, where they are known."""

    def __call__(self, weights: Specs, activations: Specs | None = None, shapes: Shapes | None = None) -> None: ...


@dataclass(frozen=True)
class Exporter:
    """A target format."""

    name: str
    check: Check
    notes: Callable[[Specs, Specs], list[str]]
    """What a user should know about loading an export of such specs, in sentences."""
    write: Callable[[NativeCheckpoint, Path], None]
    verify: Callable[[Path, NativeCheckpoint], Verification]
    """Compares an export with the run by an independent decoder."""


EXPORTERS = {
    exporter.name: exporter
    for exporter in (
        Exporter(
            compressed_tensors.NAME,
            compressed_tensors.check,
            compressed_tensors.notes,
            compressed_tensors.write,
            compressed_tensors.verify,
        ),
    )
}


def exporter(name: str) -> Exporter:
    """The exporter of a format's name; ConfigError names the nearest known one."""
    if name not in EXPORTERS:
        raise ConfigError(f"unknown export format {name!r}{nearest(name, EXPORTERS)}")
    return EXPORTERS[name]


@process.neutral()
def export(run: str | Path, format: str, output: str | Path) -> Path:
    """Write the finished run `run` in a format of EXPORTERS to the directory `output`, all of it or nothing."""
    target = exporter(format)
    checkpoint = NativeCheckpoint(run)
    weights = {name: spec for name, (spec, _) in checkpoint.quantized.items()}
    activations = {name: activation.spec for name, activation in checkpoint.activations().items()}
    target.check(weights, activations, {name: shape for name, (_, shape) in checkpoint.quantized.items()})
    checkpoint.check_files()
    with replacing_directory(Path(output), last=ORIGIN) as beside:
        target.write(checkpoint, beside)
        notes = target.notes(weights, activations)
        write_origin(beside, Path(output), Path(run), format, notes, checkpoint.fingerprint())
    return Path(output)


def engines_of_scheme(scheme: Scheme) -> str:
    """Engines that load an export of a scheme, each with what it needs or does otherwise in brackets."""
    weight, inputs = scheme.config.weight, scheme.config.input_tensors
    if not scheme.exports or weight is None:
        return ""
    return compressed_tensors.engines_for({"m.weight": weight}, {} if inputs is None else {"m.input": inputs})


def engines_of_cache(suite: CacheSuite) -> str:
    """The same of a KV cache."""
    return compressed_tensors.engines_for({}, {"m.key": suite.spec, "m.value": suite.spec}) if suite.exports else ""


def already_there(run: str | Path, format: str, finished: bool = True) -> bool:
    """Whether the run, `finished` or still to be, has an export of this format where exports are put.

    RunError if there is something else: an export that is not complete, or one of what the run was before.
    """
    directory = export_directory(run, format)
    if not directory.is_dir() or not any(not is_scratch(path.name) for path in directory.iterdir()):
        return False
    advice = "move it away or remove it, and run the command again"
    try:
        if not is_complete(directory):
            raise CheckpointError("files are missing")
    except CheckpointError:
        raise RunError(f"{directory} is no complete export of this run; {advice}") from None
    if finished and read_origin(directory).fingerprint != NativeCheckpoint(run).fingerprint():
        raise RunError(f"{directory} was made from what the run was before; {advice}")
    return True


def export_directory(run: str | Path, format: str) -> Path:
    """Where the exports of a run are put unless the user says otherwise."""
    return Path(run) / "exports" / format


@process.neutral()
def verify(directory: str | Path, run: str | Path | None = None) -> list[Verification]:
    """Verify one export, or every export of a run. `run` is needed only if the export was moved away from it.

    Raises VerificationError naming the first tensor that differs.
    """
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        if run is not None and Path(run).resolve() != directory.resolve():
            raise ConfigError(f"{directory} is a run itself, whose exports are verified; leave --run {run} out")
        exports = [path for path in sorted((directory / "exports").glob("[!.]*")) if path.is_dir()]
        if not exports:
            raise CheckpointError(
                f"{directory} has no exports yet; make one with: fewbit export {directory} --format …"
            )
        return [_verify_export(export, directory) for export in exports]
    return [_verify_export(directory, Path(run) if run is not None else None)]


def _verify_export(directory: Path, run: Path | None) -> Verification:
    origin = read_origin(directory)
    run = run or origin.run
    if not (run / MANIFEST).exists():
        raise CheckpointError(f"the run that {directory} was made from is not at {run}; say where it is with --run")
    if origin.format not in EXPORTERS:
        raise CheckpointError(f"{directory} has the unknown format {origin.format!r}")
    checkpoint = NativeCheckpoint(run)
    checkpoint.check_files()
    return EXPORTERS[origin.format].verify(directory, checkpoint)
