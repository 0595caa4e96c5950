"""Writing what belongs together: a directory that is there as a whole or not at all, and files of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from fewbit.errors import RunError, disk_errors_as_sentences
from fewbit.files import kind, sync_directory
from fewbit.files import read_json as read_json
from fewbit.files import read_json_object as read_json_object
from fewbit.files import replacing as replacing
from fewbit.files import write_json as write_json
from fewbit.safetensors_file import write_tensors
from fewbit.scratch import Scratch, is_scratch, lock_directory, sweep


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write tensors atomically; same tensors and metadata, same bytes. Returns the file's digest."""
    with replacing(path) as beside:
        return write_tensors(beside, tensors, metadata)


def destination(path: Path, what: str) -> Path:
    """Where a directory that is asked for as `path` lies or will lie, links resolved. RunError if something else is
    there, or the links lead nowhere."""
    try:
        resolved = path.resolve()
        there = resolved.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that is too long, a null byte
        raise RunError(f"{path} cannot be used as {what}: {getattr(error, 'strerror', None) or error}") from None
    if there and not resolved.is_dir():
        raise RunError(f"{path} is {kind(resolved)}, not a directory; choose another place for {what}")
    return resolved


@contextmanager
def replacing_directory(directory: Path, last: str | None = None) -> Iterator[Path]:
    """A directory to fill, whose files are in `directory` only if the body succeeds. RunError if that is not empty.

    The target is locked: of two writers the second is refused. A new target comes into being at once, by renaming. One
    that was there, empty (a mount point, a link, a directory with permissions of its own), stays the directory that it
    is and is filled at the end, the file `last` after all others, so that its presence says that all are.
    """
    target = destination(directory, "an output")
    with disk_errors_as_sentences(directory):
        created = _make(target)
        lock = lock_directory(target, f"{directory} is being written by another process; wait for it")
        try:
            sweep(target)
            if any(not is_scratch(path.name) for path in target.iterdir()):
                created = False
                raise RunError(f"{directory} exists and is not empty; choose another directory or remove it")
            place, stem = (target.parent, target.name) if created else (target, "files")
            with Scratch(place, stem, keep_mode=True) as beside:
                yield beside
                if created:
                    beside.replace(target)
                    sync_directory(target.parent)
                else:
                    _move_up(beside, target, last)
                created = False
        finally:
            if created:
                with suppress(OSError):
                    target.rmdir()
            lock.release()


def _make(target: Path) -> bool:
    """Make a directory; whether it was not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.mkdir()
    except FileExistsError:
        return False
    return True


def _move_up(beside: Path, target: Path, last: str | None) -> None:
    for path in sorted(beside.iterdir(), key=lambda path: (path.name == last, path.name)):
        path.rename(target / path.name)
    sync_directory(target)
