"""What every proof of an export has in common: where it came from, what was compared, how two tensors compare."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.journal import fields_digest
from fewbit.checkpoint.side_files import is_weight
from fewbit.errors import CheckpointError, VerificationError
from fewbit.files import read_json_object, write_json
from fewbit.safetensors_file import file_digest

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
    """What an export was made from."""

    format: str
    notes: tuple[str, ...]
    """What to know when loading it."""
    files: Mapping[str, str]
    """Digests of its files that hold no weights."""
    weights: Mapping[str, int]
    """Sizes of those that do."""
    fingerprint: str
    """Of the run."""
    run: Path = Path()
    """Where the run was then."""

    def is_complete(self, directory: Path) -> bool:
        """Whether every file that the export was written with is in `directory`."""
        sizes = {directory / name: size for name, size in self.weights.items()}
        whole = all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())
        return whole and all((directory / name).is_file() for name in self.files)


def write_origin(directory: Path, final: Path, run: Path, format: str, notes: Sequence[str], fingerprint: str) -> None:
    """Note in an export, now in `directory` and soon in `final`, which run it was made from."""
    written = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files = {name: file_digest(path) for name, path in written.items() if not is_weight(path.name)}
    weights = {name: path.stat().st_size for name, path in written.items() if is_weight(path.name)}
    noted = asdict(Origin(format, tuple(notes), files, weights, fingerprint))
    noted["run"] = os.path.relpath(run.resolve(), final.resolve())
    write_json(directory / ORIGIN, noted | {"digest": _digest(noted)})


def read_origin(directory: Path) -> Origin:
    """What `write_origin` noted. CheckpointError if it is missing, damaged or was changed."""
    file = directory / ORIGIN
    if not directory.is_dir() or not os.path.lexists(file):
        raise CheckpointError(f"{directory} is no fewbit export (it has no {ORIGIN})")
    noted = read_json_object(file)
    run, digest = noted.get("run"), noted.pop("digest", None)
    if not isinstance(run, str) or "\0" in run or digest != _digest(noted):
        raise CheckpointError(f"{file} is not what this version of fewbit wrote; export the run again")
    return Origin(**noted | {"run": directory / run, "notes": tuple(noted["notes"])})


def _digest(noted: Mapping[str, Any]) -> str:
    """Of all but the place of the run, which may have moved."""
    return fields_digest({name: value for name, value in noted.items() if name != "run"})


def compare(what: str, found: Tensor, expected: Tensor, bits: bool = True) -> None:
    """VerificationError unless two tensors are equal in shape, dtype and every bit (0.0 is not −0.0), or with
    `bits=False` in every value."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise VerificationError(
            f"{what}: found {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    if bits and found.dtype != torch.bool:
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
        found, expected = (tensor.contiguous().flatten().view(words) for tensor in (found, expected))
    if not torch.equal(found, expected):
        different = int((found != expected).sum())
        raise VerificationError(f"{what}: {different} of {expected.numel()} values differ from the run")
