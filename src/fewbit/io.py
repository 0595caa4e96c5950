"""`load` and `dump` for files of tensors and plain data. The suffix decides the format.

| suffix             | holds                                      | reading it can run code |
|--------------------|--------------------------------------------|-------------------------|
| .safetensors       | {name: tensor}                             | no                      |
| .json              | plain data                                 | no                      |
| .pt .pth .bin      | tensors and plain data, nested             | no (`weights_only`)     |
| .pkl .pickle       | anything                                   | yes: `allow_pickle`     |

A .pt, .pth or .bin file with other objects is a pickle and needs `allow_pickle` as well.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewbit.errors import CheckpointError, ConfigError, FewbitError
from fewbit.files import check_regular, read_json, replacing
from fewbit.safetensors_file import write_tensors

T = TypeVar("T")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
PICKLE_SUFFIXES = (".pkl", ".pickle")


def load(path: str | Path, *, allow_pickle: bool = False) -> Any:
    """What `dump` wrote, tensors on the CPU.

    `allow_pickle` reads pickles, which run whatever code is in them: only for files whose origin you trust.
    Raises CheckpointError for a file that is missing, damaged or a pickle, ConfigError for an unknown suffix.
    """
    path = Path(path)
    read = _format(path, _READERS)
    check_regular(path)
    try:
        return read(path, allow_pickle)
    except FewbitError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is damaged or not a {path.suffix} file ({type(error).__name__}: {reason})"
        ) from None


def dump(obj: Any, path: str | Path, *, allow_pickle: bool = False) -> None:
    """Write `obj` atomically, in the format of the suffix of `path`.

    Raises ConfigError for an unknown suffix and for an object that the format cannot hold, and for a pickle unless
    `allow_pickle` is given.
    """
    path = Path(path)
    write = _format(path, _WRITERS)
    with replacing(path) as beside:
        write(obj, beside, path, allow_pickle)


def _load_safetensors(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    return dict(load_file(path))


def _load_json(path: Path, allow_pickle: bool) -> Any:
    return read_json(path, limit=2**40)


def _load_torch(path: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError:
        if allow_pickle:
            raise
        raise CheckpointError(
            f"{path} holds more than tensors and plain data (or it is damaged), and reading that can run code; pass "
            "allow_pickle=True if you trust where the file comes from"
        ) from None


def _load_pickle(path: Path, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, and reading one can run code; pass allow_pickle=True if you trust where it comes "
            "from, or store .safetensors or .json"
        )
    with path.open("rb") as file:
        return pickle.load(file)


def _dump_safetensors(obj: Any, beside: Path, path: Path, allow_pickle: bool) -> None:
    if not isinstance(obj, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in obj.items()):
        raise ConfigError(f"{path}: safetensors holds a dict of tensors by name; store other data as .json or .pt")
    try:
        write_tensors(beside, obj)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from None


def _dump_json(obj: Any, beside: Path, path: Path, allow_pickle: bool) -> None:
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: JSON cannot hold this ({error}); store tensors as .safetensors or .pt") from None
    beside.write_text(text + "\n", encoding="utf-8")


def _dump_torch(obj: Any, beside: Path, path: Path, allow_pickle: bool) -> None:
    try:
        torch.save(obj, beside)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: this cannot be stored ({error})") from None
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(beside))
    if foreign and not allow_pickle:
        raise ConfigError(
            f"{path}: {foreign[0]} is neither a tensor nor plain data, so the file could not be read without running "
            "code; store tensors and plain data, or pass allow_pickle=True"
        )


def _dump_pickle(obj: Any, beside: Path, path: Path, allow_pickle: bool) -> None:
    if not allow_pickle:
        raise ConfigError(
            f"{path}: reading a pickle can run code; store .safetensors, .json or .pt, or pass allow_pickle=True"
        )
    try:
        with beside.open("wb") as file:
            pickle.dump(obj, file)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: this cannot be stored ({error})") from None


Reader = Callable[[Path, bool], Any]
Writer = Callable[[Any, Path, Path, bool], None]
_READERS: dict[str, Reader] = {
    ".safetensors": _load_safetensors,
    ".json": _load_json,
    **dict.fromkeys(TORCH_SUFFIXES, _load_torch),
    **dict.fromkeys(PICKLE_SUFFIXES, _load_pickle),
}
_WRITERS: dict[str, Writer] = {
    ".safetensors": _dump_safetensors,
    ".json": _dump_json,
    **dict.fromkeys(TORCH_SUFFIXES, _dump_torch),
    **dict.fromkeys(PICKLE_SUFFIXES, _dump_pickle),
}
SUFFIXES = tuple(_READERS)


def _format(path: Path, table: dict[str, T]) -> T:
    if path.suffix not in table:
        raise ConfigError(f"{path}: the suffix {path.suffix!r} is not a known format; use one of {', '.join(table)}")
    return table[path.suffix]
