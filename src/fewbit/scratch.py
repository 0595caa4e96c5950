"""Locks, and scratch that a killed process leaves behind.

Everything temporary that fewbit writes is named `.STEM.fewbit-RANDOM.partial` and locked (flock) by the process that
uses it. The kernel releases the lock when the process dies, however it dies. So before scratch is made in a directory,
scratch without a living owner is removed there, and nothing else: no file with another name, no scratch of a running
process, no target of a link.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fewbit.errors import RunError

_PATTERN = re.compile(r"\..*\.fewbit-[0-9a-f]{16}\.partial", re.DOTALL)


Lock = ExitStack
"""An exclusive lock on a file or a directory until `close`, or until the process ends."""


def lock_file(path: Path, busy: str) -> Lock:
    """Lock the file `path`, made if there is none. RunError: `busy` if it is locked, another if it is no file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    no_file = RunError(f"{path} is no file; remove it, for fewbit locks a file of this name")
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RunError(f"{path} is a link; remove it, for locks are never taken through links") from None
        raise no_file if error.errno in (errno.EISDIR, errno.ENXIO) else error from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise no_file
    return _locked(descriptor, path, busy)


def lock_directory(path: Path, busy: str) -> Lock:
    """Lock an existing directory; errors as of `lock_file`."""
    return _locked(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path, busy)


def _locked(descriptor: int, path: Path, busy: str) -> Lock:
    with ExitStack() as held:
        held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return held.pop_all()
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunError(f"{path} cannot be locked ({error.strerror}); use a file system with locks") from None
        raise RunError(busy) from None  # or the one who had it took it away meanwhile


class Scratch:
    """A private directory inside `parent` until `close`, the end of a `with`, of the object or of the process.

    `keep_mode` gives it the permissions that the user's new directories have; otherwise only the user may look inside.
    """

    def __init__(self, parent: Path, stem: str, *, keep_mode: bool = False) -> None:

        def make(path: Path) -> int | None:
            path.mkdir(mode=0o777 if keep_mode else 0o700)
            with suppress(FileNotFoundError):  # someone swept it away before it was opened
                return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            return None

        self.path, descriptor = _new(parent, stem, make)
        self._end = weakref.finalize(self, _remove, self.path, descriptor, os.getpid())

    def close(self) -> None:
        """Remove it."""
        self._end()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def temporary_directory(stem: str) -> Scratch:
    """Scratch in the system's directory for temporary files (TMPDIR). RunError if there is none."""
    try:
        return Scratch(Path(tempfile.gettempdir()), stem)
    except OSError as error:
        raise RunError(f"no directory for temporary files can be used: {error.strerror or error}") from None


@contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, with a new file's permissions; removed at the end if it still has its name."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    beside, descriptor = _new(path.parent, path.name, lambda new: os.open(new, flags, 0o666))
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(parent: Path, stem: str | None = None) -> None:
    """Remove the scratch of killed processes in `parent`, of one stem or of all."""
    try:
        names = os.listdir(parent)
    except OSError:
        return
    for name in names:
        if is_scratch(name) and (stem is None or name.startswith(f".{_short(stem)}.fewbit-")):
            _remove_dead(parent / name)


def is_scratch(name: str) -> bool:
    """Whether a file of this name is scratch of fewbit's."""
    return _PATTERN.fullmatch(name) is not None


def _remove_dead(path: Path) -> None:
    with suppress(OSError):  # of another user, or gone already
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mode = os.fstat(descriptor).st_mode
            if not _is_at(descriptor, path):
                return
            if stat.S_ISDIR(mode):
                shutil.rmtree(path, ignore_errors=True)
            elif stat.S_ISREG(mode):
                path.unlink()
        finally:
            os.close(descriptor)


def _new(parent: Path, stem: str, make: Callable[[Path], int | None]) -> tuple[Path, int]:
    """A new file or directory, locked, and its descriptor, which `make` opens; None: it was swept away meanwhile."""
    sweep(parent, stem)
    while True:
        path = parent / f".{_short(stem)}.fewbit-{secrets.token_hex(8)}.partial"
        if (descriptor := make(path)) is None:
            continue
        with suppress(OSError):  # on file systems without locks, nothing is swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # someone swept it away before it was locked


def _short(stem: str) -> str:
    """File systems take names of 255 bytes."""
    return os.fsdecode(os.fsencode(stem)[:180])


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or directory is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # a forked child ends, too
        shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)
