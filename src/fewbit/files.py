"""Files of a user, read without trust and written without harm.

Reading: only regular files, only up to a size, and damage is a sentence. A FIFO, a device or a huge file in place of a
configuration must not hang the process or fill its memory.

Writing: a reader, or a run that was killed, never sees half of a file. What is written lies beside its place under a
name of its own, locked as long as its writer lives (`fewbit.scratch`), and takes its place when it is complete.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbit.errors import CheckpointError, FewbitError, disk_errors_as_sentences
from fewbit.scratch import scratch_file

TEXT_LIMIT = 32 * 2**20
"""Bytes of a configuration: the index of 200,000 tensors has some 25 MB, and what JSON makes of much more does not fit
into a gigabyte."""


def read_bytes(path: Path, limit: int = TEXT_LIMIT, error: type[FewbitError] = CheckpointError) -> bytearray:
    """A regular file of at most `limit` bytes; `error`, a sentence, if it is missing, larger or something else."""
    with open_regular(path, error) as descriptor:
        data = bytearray()
        while len(data) <= limit and (piece := os.read(descriptor, 2**20)):
            data += piece
    if len(data) > limit:
        raise error(f"{path} is larger than {limit // 2**20} MiB, which no such file is; is it another file?")
    return data


def read_text(path: Path, limit: int = TEXT_LIMIT, error: type[FewbitError] = CheckpointError) -> str:
    """A regular file of UTF-8 text; errors as of `read_bytes`."""
    try:
        return read_bytes(path, limit, error).decode("utf-8")
    except UnicodeDecodeError:
        raise error(f"{path} is damaged or no text: it is not UTF-8") from None


def read_json(path: Path, limit: int = TEXT_LIMIT, error: type[FewbitError] = CheckpointError) -> Any:
    """What a JSON file holds; errors as of `read_bytes`, and one for what is no JSON."""
    text = read_text(path, limit, error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:  # a number of 10,000 digits is a ValueError, too
        raise error(f"{path} is damaged: it is not JSON ({' '.join(str(problem).split())[:100]})") from None


def read_json_object(
    path: Path, limit: int = TEXT_LIMIT, error: type[FewbitError] = CheckpointError
) -> dict[str, Any]:
    """A JSON file that must hold a table of fields."""
    data = read_json(path, limit, error)
    if not isinstance(data, dict):
        raise error(f"{path} is damaged: it should hold a table of fields, not a {type(data).__name__}")
    return data


@contextmanager
def open_regular(path: Path, error: type[FewbitError] = CheckpointError) -> Iterator[int]:
    """A descriptor of a regular file, for reading. FIFOs and devices are refused: opening one would wait, or worse."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        raise error(_unreadable(path, problem)) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise error(f"{path} is {kind(path)}, not a regular file; give a file")
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
    """What lies at `path`, with its article."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "a link to nowhere" if os.path.islink(path) else "nothing"
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISREG, "a file"),
    )
    return next((words for test, words in kinds if test(mode)), "a device")


def _unreadable(path: Path, problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError):
        return f"{path} does not exist" if not path.is_symlink() else f"{path} is a link to nowhere"
    return f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write beside `path`; it is flushed to disk and takes its place only if the body succeeds.

    A link at `path` is replaced, not followed. RunError, with a sentence, if the disk is full or refuses.
    """
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


def sync_directory(directory: Path) -> None:
    """A rename is durable only once its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
