"""The errors that a user can act on. The CLI prints them as one sentence and exits with code 2."""

import errno
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class FewbitError(Exception):
    """One sentence: what was found, what was expected, what to do."""


class ConfigError(FewbitError):
    """A recipe, scheme or option that is not valid or not supported."""


class CheckpointError(FewbitError):
    """A model's files are missing, damaged or not what they claim to be."""


class CalibrationError(FewbitError):
    """Calibration data is too little or not usable."""


class ArchitectureError(FewbitError):
    """The model's structure is not known and could not be detected."""


class RunError(FewbitError):
    """The output directory cannot be used: it is in use, full, or of another recipe."""


class VerificationError(FewbitError):
    """An export does not decode to the tensors it was made from."""


def nearest(name: object, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest known name, else the list of known names, cut off."""
    names = sorted(known)
    close = get_close_matches(str(name)[:200], names, n=1, cutoff=0.5)
    text = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
    return text if len(text) <= 400 else text[:399] + "…"


def printable(text: object) -> str:
    """A path or a name as it can be written and printed: bytes of it that are no UTF-8 become \\udcXX."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """The first line of another library's message, without its last full stop, cut to what a sentence can hold."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or the text that safetensors' Rust side makes of one, says that the disk is full."""
    return getattr(error, "errno", None) in _DISK_FULL or any(f"os error {code})" in str(error) for code in _DISK_FULL)


@contextmanager
def disk_errors_as_sentences(path: object) -> Iterator[None]:
    """Turn what the system says against writing `path`, raised anywhere below, into a RunError that names the file."""
    try:
        yield
    except FewbitError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise RunError(
                f"the disk is full: {path} could not be written; free some space and run the command again "
                "(a quantization that had started continues with --resume)"
            ) from error
        if isinstance(error, OSError) and error.errno is not None:
            other = str(error.filename or path)
            where = "" if other.startswith(str(path)) or other.endswith(".partial") else f" ({other})"
            raise RunError(f"{path} cannot be written: {error.strerror}{where}") from error
        raise


def shown(value: object, length: int = 200) -> str:
    """`value` for a sentence: its repr, cut off. What nests deeply or repeats itself is not written out."""
    text = _REPR.repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"


_REPR = reprlib.Repr()
_REPR.maxlevel = 4
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
