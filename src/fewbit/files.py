"""Untrusted files are read safely, and files and directories are written atomically.

Reading: only regular files, up to a size limit; damage is one sentence. A FIFO, a device or a huge file in place of a
configuration must not hang the process or fill its memory.

Writing: a reader never sees half of a file or directory, even if the writer was killed. Output is written beside its
destination under a temporary name, locked while its writer lives (`fewbit.scratch`), and renamed when it is complete.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fewbit.errors import CheckpointError, FewbitError, RunError, disk_errors_as_sentences, printable
from fewbit.scratch import Scratch, is_scratch, lock_directory, scratch_file, sweep

TEXT_LIMIT = 32 * 2**20
"""Bytes of a configuration: the index of 200,000 tensors has some 25 MB; much more, parsed, exceeds a gigabyte."""


def read_bytes(path: Path, limit: int = TEXT_LIMIT, error: type[FewbitError] = CheckpointError) -> bytearray:
    """A regular file of at most `limit` bytes; `error`, a sentence, if it is missing, larger or something else."""
    with open_regular(path, error) as descriptor:
        data, size = bytearray(), os.fstat(descriptor).st_size
        while max(size, len(data)) <= limit and (piece := os.read(descriptor, 2**20)):
            data += piece
    if max(size, len(data)) > limit:  # files of the system do not say how large they are
        raise error(f"{path} is larger than {limit // 2**20} MiB, which no such file is; is it another file?")
    return data


def read_text(path: Path, limit: int = TEXT_LIMIT, error: type[FewbitError] = CheckpointError) -> str:
    """A regular file of UTF-8 text; errors as of `read_bytes`."""
    try:
        return read_bytes(path, limit, error).decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{path} is damaged or no text: it is not UTF-8") from None


def read_json(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """The data of a JSON file. CheckpointError as of `read_bytes`, and for what is not JSON."""
    text = read_text(path, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:  # a number of 10,000 digits is a ValueError, too
        raise CheckpointError(f"{path} is damaged: it is not JSON ({' '.join(str(problem).split())[:100]})") from None


def read_json_object(path: Path, limit: int = TEXT_LIMIT) -> dict[str, Any]:
    """A JSON file that must hold a table of fields."""
    data = read_json(path, limit)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: it should hold a table of fields, not a {type(data).__name__}")
    return data


@contextmanager
def open_regular(path: Path, error: type[FewbitError] = CheckpointError) -> Iterator[int]:
    """A descriptor of a regular file, for reading. FIFOs and devices are refused: opening one may block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        raise error(_unreadable(path, problem)) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise error(f"{printable(path)} is {kind(path)}, not a regular file; give a file")
        yield descriptor
    except OSError as problem:
        raise error(_unreadable(path, problem)) from None
    finally:
        os.close(descriptor)


def check_regular(path: Path, error: type[FewbitError] = CheckpointError) -> None:
    """`error` unless `path` is a regular file that can be read; for files that another library opens."""
    with open_regular(path, error):
        pass


def kind(path: Path) -> str:
    """The kind of file at `path`, with its article."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "a link to nowhere" if os.path.islink(path) else "nothing"
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _unreadable(path: Path, problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError):
        return f"{printable(path)} {'is a link to nowhere' if path.is_symlink() else 'does not exist'}"
    return f"{printable(path)} cannot be read: {getattr(problem, 'strerror', None) or problem}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write beside `path`; it is flushed to disk and takes its place only if the body succeeds. A link at
    `path` is replaced, not followed. RunError if the disk is full or refuses."""
    with disk_errors_as_sentences(path), scratch_file(path) as beside:
        yield beside
        with beside.open("rb+") as written:
            os.fsync(written.fileno())
        beside.replace(path)
        sync_directory(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as beside:
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        beside.write_bytes(text.encode("utf-8", "backslashreplace"))  # names that are no UTF-8: as JSON escapes them


def destination(path: Path, what: str) -> Path:
    """The directory `path`, existing or not, with links resolved. RunError if it is something else or cannot be."""
    try:
        resolved = path.resolve()
        there = resolved.exists()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that is too long, a null byte
        raise RunError(f"{path} cannot be used as {what}: {getattr(error, 'strerror', None) or error}") from None
    if there and not resolved.is_dir():
        raise RunError(f"{path} is {kind(resolved)}, not a directory; choose another place for {what}")
    check_name(resolved, RunError)
    return resolved


def check_name(path: Path, error: type[FewbitError] = CheckpointError) -> None:
    """`error` if `path` is not UTF-8: safetensors cannot open such a file."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise error(f"{printable(path)} is no UTF-8, and safetensors opens no such file; use another name") from None


@contextmanager
def replacing_directory(directory: Path, last: str | None = None) -> Iterator[Path]:
    """A directory to fill, whose files are in `directory` only if the body succeeds. RunError if that is not empty.

    The target is locked: of two writers the second is refused. A new target appears at once, by renaming. An existing
    empty one (a mount point, a link, a directory with its own permissions) is kept and filled at the end, `last`
    after all other files, so that its presence means that the directory is complete.
    """
    target = destination(directory, "an output")
    with disk_errors_as_sentences(directory):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.mkdir()
            created = True
        except FileExistsError:
            created = False
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
                    for path in sorted(beside.iterdir(), key=lambda path: (path.name == last, path.name)):
                        path.rename(target / path.name)
                    sync_directory(target)
                created = False
        finally:
            if created:
                with suppress(OSError):
                    target.rmdir()
            lock.close()


def sync_directory(directory: Path) -> None:
    """A rename is durable only once its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
