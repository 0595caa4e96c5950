"""`load` and `dump` for files of tensors and plain data. The suffix decides the format.

| suffix             | holds                                      | reading it can run code |
|--------------------|--------------------------------------------|-------------------------|
| .safetensors       | {name: tensor}                             | no                      |
| .json              | plain data                                 | no                      |
| .pt .pth .bin      | tensors and plain data, nested             | no (`weights_only`)     |
| .pkl .pickle       | anything                                   | yes: `allow_pickle`     |

A .pt, .pth or .bin file with other objects is a pickle and needs `allow_pickle` as well.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewbit.errors import CheckpointError, ConfigError, FewbitError
from fewbit.files import check_regular, read_json, replacing
from fewbit.safetensors_file import write_tensors

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
PICKLE_SUFFIXES = (".pkl", ".pickle")
SUFFIXES = (".safetensors", ".json", *TORCH_SUFFIXES, *PICKLE_SUFFIXES)


def load(path: str | Path, *, allow_pickle: bool = False) -> Any:
    """What `dump` wrote, tensors on the CPU.

    `allow_pickle` reads pickles, which run whatever code is in them: only for files whose origin you trust.
    Raises CheckpointError for a file that is missing, damaged or a pickle, ConfigError for an unknown suffix.
    """
    path = _of_known_suffix(path)
    check_regular(path)
    try:
        return _read(path, allow_pickle)
    except FewbitError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # decoders raise almost anything on damaged bytes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{path} is damaged or not a {path.suffix} file ({reason})") from None


def dump(obj: Any, path: str | Path, *, allow_pickle: bool = False) -> None:
    """Write `obj` atomically, in the format of the suffix of `path`.

    Raises ConfigError for an unknown suffix, an object that the format cannot hold, a pickle without `allow_pickle`.
    """
    path = _of_known_suffix(path)
    if path.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise ConfigError(f"{path}: pickles can run code; store .safetensors, .json or .pt, or pass allow_pickle=True")
    with replacing(path) as beside:
        try:
            _write(obj, beside, path.suffix)
        except (pickle.PicklingError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{path}: {path.suffix} cannot hold this ({error}); .json holds plain data, .safetensors a dict of "
                "tensors by name, .pt both"
            ) from None
        foreign = path.suffix in TORCH_SUFFIXES and torch.serialization.get_unsafe_globals_in_checkpoint(str(beside))
        if foreign and not allow_pickle:
            raise ConfigError(
                f"{path}: {foreign[0]} is neither a tensor nor plain data, so the file could not be read without "
                "running code; store tensors and plain data, or pass allow_pickle=True"
            )


def _read(path: Path, allow_pickle: bool) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return read_json(path, limit=2**40)
    if path.suffix in TORCH_SUFFIXES:
        try:
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        except pickle.UnpicklingError:
            if allow_pickle:
                raise
            raise CheckpointError(
                f"{path} holds more than tensors and plain data (or it is damaged), and reading that can run code; "
                "pass allow_pickle=True if you trust where the file comes from"
            ) from None
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, and reading one can run code; pass allow_pickle=True if you trust where it comes "
            "from, or store .safetensors or .json"
        )
    with path.open("rb") as file:
        return pickle.load(file)


def _write(obj: Any, beside: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        if not isinstance(obj, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in obj.items()):
            raise TypeError("no dict of tensors by name")
        write_tensors(beside, obj)
    elif suffix == ".json":
        beside.write_text(json.dumps(obj, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    elif suffix in TORCH_SUFFIXES:
        torch.save(obj, beside)
    else:
        with beside.open("wb") as file:
            pickle.dump(obj, file)


def _of_known_suffix(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the suffix {path.suffix!r} is no known format; use one of {', '.join(SUFFIXES)}")
    return path
