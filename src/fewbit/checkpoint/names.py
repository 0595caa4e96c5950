"""Where a module's tensors lie in a checkpoint: under which names, and in which part of a stored tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbit.checkpoint.source import TensorInfo, TensorSource


def weight_of(module: str) -> str:
    """Name of a module's weight."""
    return f"{module}.weight"


def bias_of(module: str) -> str:
    """Name of a module's bias."""
    return f"{module}.bias"


def full_name(prefix: str, path: str) -> str:
    """Full name of a module by its path inside a block, whose names begin with `prefix` ("" is the block itself)."""
    return prefix + path if path else prefix.removesuffix(".")


def path_in(prefix: str, name: str) -> str:
    """Path inside a block of a module by its full name."""
    return name.removeprefix(prefix) if name.startswith(prefix) else ""


@dataclass(frozen=True)
class Part:
    """A part of a stored tensor."""

    tensor: str
    """Name of the stored tensor."""
    index: tuple[int | slice, ...]
    """(3,) is one expert of [experts, out, in], (slice(0, 64),) are rows of a fused weight."""


class PartsSource:
    """A TensorSource that shows parts of stored tensors as tensors of their own, by the names that modules have.

    `parts` by the name that is shown. A stored tensor that is shown in parts is not shown as a whole.
    """

    def __init__(self, source: TensorSource, parts: Mapping[str, Part]) -> None:
        self._source = source
        self._parts = dict(parts)
        stored = source.info()
        whole = {part.tensor for part in parts.values()}
        self._info = {name: info for name, info in stored.items() if name not in whole}
        for name, part in parts.items():
            shape, dtype = stored[part.tensor].shape, stored[part.tensor].dtype
            self._info[name] = TensorInfo(tuple(torch.empty(shape, device="meta")[part.index].shape), dtype)

    @property
    def directory(self) -> Path | None:
        return self._source.directory

    @property
    def files(self) -> frozenset[Path]:
        return self._source.files

    def info(self) -> dict[str, TensorInfo]:
        return self._info

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        places = {name: self._parts.get(name) for name in names}
        read = self._source.read({part.tensor if part else name for name, part in places.items()}, dtype)
        return {name: read[part.tensor][part.index].clone() if part else read[name] for name, part in places.items()}

    def fingerprint(self) -> str:
        return self._source.fingerprint()
