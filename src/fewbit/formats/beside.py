"""Proof that what lies beside an export's weights is the run's: configuration, tokenizer, templates, code.

The same place that wrote it (`checkpoint/side_files.py`) writes it once more, and the two are compared: JSON by its
values, so that a sentence can name the field, all else by its bytes. No other file may lie there that an engine could
read.
"""

import filecmp
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from fewbit.checkpoint.configuration import CONFIG_FILE
from fewbit.checkpoint.side_files import copy_side_files
from fewbit.errors import VerificationError, printable, shown
from fewbit.files import check_regular, read_json_object
from fewbit.formats.verification import ORIGIN, Origin
from fewbit.scratch import temporary_directory

_ENDS = (".md", ".txt.asc", ".png", ".jpg", ".jpeg", ".svg", ".pdf")
_STARTS = (".", "LICENSE", "NOTICE", "README", "USE_POLICY")
"""Of names of what people put beside a model for other people."""


def check_beside(
    directory: Path, origin: Origin, run: Path, changes: Mapping[str, Any], weights: Collection[str]
) -> None:
    """VerificationError, which names the file (and field), unless all that `directory` holds besides `weights` is what
    an export of `run` has. `changes`: fields of config.json that are the export's own."""
    expected = {*origin.files, *weights, ORIGIN}
    for name in _files(directory):
        last = name.rpartition("/")[2]
        if name not in expected and not last.startswith(_STARTS) and not last.lower().endswith(_ENDS):
            raise VerificationError(f"{directory} holds {printable(name)}, which the export did not write; remove it")
    for name in sorted(expected):
        check_regular(directory / name, VerificationError)
    if CONFIG_FILE not in origin.files:
        raise VerificationError(f"{directory / ORIGIN} names no {CONFIG_FILE}; export the run again")
    with temporary_directory("beside") as scratch:
        again = Path(scratch)
        copy_side_files(run, again, changes)
        for name in sorted(origin.files):
            if not (again / name).is_file():
                raise VerificationError(f"{directory / name} comes from no file of the run; export the run again")
            _compare(directory / name, again / name)


def _compare(found: Path, expected: Path) -> None:
    if filecmp.cmp(found, expected, shallow=False):  # the length first, so that none without end is read
        return
    if found.suffix != ".json":
        raise VerificationError(f"{printable(found)} differs from the run's")
    if fault := difference(read_json_object(found), read_json_object(expected)):
        raise VerificationError(f"{printable(found)}: {fault}")


def difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Where JSON differs from what it should be, in a few words; None if all values are the same."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            inner = f"{path}.{key}" if path else key
            if key not in found:
                return f"{inner} is missing"
            if key not in expected:
                return f"{inner} is there, in the run it is not"
            if fault := difference(found[key], expected[key], inner):
                return fault
        return None
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return next(filter(None, map(difference, found, expected, (f"{path}[{n}]" for n in range(len(found))))), None)
    if type(found) is type(expected) and repr(found) == repr(expected):  # 1, 1.0 and True are equal, 0.0 and -0.0 too
        return None
    return f"{path or 'the content'} is {printable(shown(found, 80))}, in the run {printable(shown(expected, 80))}"


def _files(directory: Path) -> Iterator[str]:
    """Names of everything in a directory that is no folder; hidden folders (.git, .cache) are passed over."""
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in linked)
        for name in sorted([*files, *linked]):
            yield (here / name).relative_to(directory).as_posix()
