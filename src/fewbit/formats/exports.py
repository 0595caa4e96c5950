"""Exports of a run: written, found again, verified."""

from pathlib import Path

from fewbit import process
from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.checkpoint.side_files import is_weight
from fewbit.errors import CheckpointError, ConfigError, RunError
from fewbit.files import replacing_directory
from fewbit.formats.table import EXPORTERS, exporter
from fewbit.formats.verification import ORIGIN, Verification, read_origin, write_origin
from fewbit.scratch import is_scratch


@process.neutral()
def export(run: str | Path, format: str, output: str | Path) -> Path:
    """Write the finished run `run` in a format of EXPORTERS to the directory `output`, all of it or nothing."""
    target = exporter(format)
    checkpoint = NativeCheckpoint(run)
    contents = checkpoint.contents
    target.check(contents)
    checkpoint.check_files()
    with replacing_directory(Path(output), last=ORIGIN) as beside:
        target.write(checkpoint, beside)
        write_origin(beside, Path(output), Path(run), format, target.notes(contents), checkpoint.fingerprint())
    return Path(output)


def already_there(run: str | Path, format: str, finished: bool = True) -> bool:
    """Whether the run, `finished` or still to be, has an export of this format where exports are put.

    RunError if there is something else: an export that is not complete, or one of what the run was before.
    """
    directory = export_directory(run, format)
    if not directory.is_dir() or not any(not is_scratch(path.name) for path in directory.iterdir()):
        return False
    advice = "move it away or remove it, and run the command again"
    try:
        origin = read_origin(directory)
    except CheckpointError:
        origin = None
    if origin is None or not origin.is_complete(directory):
        raise RunError(f"{directory} is no complete export of this run; {advice}")
    if finished and origin.fingerprint != NativeCheckpoint(run).fingerprint():
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
        if exports := _exports(directory / "exports"):
            return [_verify_export(export, directory) for export in exports]
        raise CheckpointError(f"{directory} has no exports yet; make one with: fewbit export {directory} --format …")
    return [_verify_export(directory, Path(run) if run is not None else None)]


def _exports(folder: Path) -> list[Path]:
    """Exports in a folder, however deep; what has weights and has lost its origin is one, too."""
    inside = sorted(folder.glob("[!.]*"))
    if any(path.name == ORIGIN or is_weight(path.name) for path in inside):
        return [folder]
    return [found for path in inside if path.is_dir() for found in _exports(path)]


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
