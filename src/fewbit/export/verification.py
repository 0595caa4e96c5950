"""What every proof of an export has in common: where it came from, what was compared, how two tensors compare."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbit.checkpoint.files import write_json
from fewbit.errors import CheckpointError, VerificationError

ORIGIN = "fewbit-export.json"


@dataclass(frozen=True)
class Verification:
    """What was compared."""

    directory: Path
    format: str
    quantized: int
    dense: int
    decoder: str
    activations: int = 0


@dataclass(frozen=True)
class Origin:
    """Format of an export, where the run it was made from was then, and what to know when loading it."""

    format: str
    run: Path
    notes: tuple[str, ...] = ()


def write_origin(directory: Path, final: Path, run: Path, format: str, notes: Sequence[str] = ()) -> None:
    """Note in an export, now in `directory` and soon in `final`, which run it was made from."""
    where = os.path.relpath(run.resolve(), final.resolve())
    write_json(directory / ORIGIN, {"format": format, "run": where, "notes": list(notes)})


def read_origin(directory: Path) -> Origin:
    """What `write_origin` noted."""
    try:
        noted = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
        return Origin(str(noted["format"]), directory / noted["run"], tuple(noted.get("notes", ())))
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{directory} is no fewbit export (it has no readable {ORIGIN})") from None


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    """VerificationError unless two tensors are equal in shape, dtype and every value."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise VerificationError(
            f"{what}: found {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    if found.dtype.itemsize == 1:  # floats of a byte know few operations
        found, expected = found.view(torch.uint8), expected.contiguous().view(torch.uint8)
    if not torch.equal(found, expected):
        different = int((found != expected).sum())
        raise VerificationError(f"{what}: {different} of {expected.numel()} values differ from the run")
