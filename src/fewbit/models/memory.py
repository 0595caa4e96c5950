"""Give freed memory back to the system."""

from __future__ import annotations

import ctypes
import os
from functools import cache

WORTH_TRIMMING = 2**25  # bytes that the process has grown by; what is used again after a trim faults anew
_resident_after_trim = 0


def trim_heap() -> None:
    """Return the heap's free pages to the system, where the C library can.

    A run frees and allocates tensors of a few MB over and over. glibc keeps and fragments such pieces: a small
    allocation between two of them pins the pages around it.
    """
    global _resident_after_trim
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
        _resident_after_trim = _resident_bytes()


def trim_grown_heap() -> None:
    """The same, but only if the process has grown since it was last done: often enough that memory does not grow with
    the number of blocks, and for nothing where blocks are small."""
    if _resident_bytes() - _resident_after_trim > WORTH_TRIMMING:
        trim_heap()


def _resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None
