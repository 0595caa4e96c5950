"""Where tensors come from: a Hugging Face checkpoint's safetensors files, or a module in memory.

Files are opened for one read and closed again, so that their mapped pages do not stay in the process.
"""

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewbit.checkpoint.configuration import CONFIG_FILE, read_config
from fewbit.errors import CheckpointError, printable
from fewbit.files import check_name, check_regular, read_json_object
from fewbit.numerics.finite import is_finite
from fewbit.safetensors_file import DTYPES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {word: dtype for dtype, word in DTYPES.items()}
NAMED_WEIGHTS = "transformers_weights"
"""Field of config.json that names the file of the weights, or its index."""
_LONGEST_NAME = 200  # characters; file systems allow 255 bytes a step
_PIECE = 2**22  # elements of an 8-bit tensor that are looked at at a time
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """What the walk, the evaluation and the exporters need of a model's weights."""

    @property
    def directory(self) -> Path | None:
        """Holds config.json and the tokenizer; None for a module in memory."""

    @property
    def files(self) -> frozenset[Path]:
        """Those of a checkpoint directory that hold the weights and nothing else."""

    def info(self) -> dict[str, TensorInfo]:
        """Every tensor's shape and dtype by name."""

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The named tensors, freshly allocated; quantized ones dequantized. `dtype` None keeps the stored dtype.

        Raises CheckpointError for a missing tensor and for one that holds NaN or infinity.
        """

    def fingerprint(self) -> str:
        """Changes when the weights change."""


class SafetensorsSource:
    """The safetensors files of a Hugging Face checkpoint directory, sharded or not."""

    def __init__(self, directory: str | Path) -> None:
        self.directory: Path = Path(directory)
        self.files, self._file_of, self._info = _scan(self.directory)

    def info(self) -> dict[str, TensorInfo]:
        return self._info

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            if name not in self._file_of:
                raise CheckpointError(f"{self.directory} holds no tensor {name!r}; the checkpoint is incomplete")
            by_file[self._file_of[name]].append(name)
        tensors = {}
        for file, members in by_file.items():
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in members:
                    # the copy leaves the mapped file: its pages go with the handle, and the new memory is aligned
                    tensors[name] = opened.get_tensor(name).to(dtype=dtype, copy=True)
                    check_finite(name, tensors[name])
        return tensors

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(set(self._file_of.values())):
            digest.update(file.name.encode() + _sampled_digest(file))
        return digest.hexdigest()


class ModuleSource:
    """The weights of a module in memory; reading copies, the module itself is never changed.

    `without`: names of tensors that are the same as others (a tied head). `prefix` is put before all names.
    """

    directory: Path | None = None
    files: frozenset[Path] = frozenset()

    def __init__(self, module: nn.Module, without: Container[str] = (), prefix: str = "") -> None:
        tensors = module.state_dict()
        self._tensors = {prefix + name: tensor.detach() for name, tensor in tensors.items() if name not in without}

    def info(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = {}
        for name in names:
            if name not in self._tensors:
                raise CheckpointError(f"the module has no tensor {name!r}")
            tensors[name] = self._tensors[name].to("cpu", dtype=dtype, copy=True)
            check_finite(name, tensors[name])
        return tensors

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            flat = self._tensors[name].flatten()
            sample = flat[:: max(1, flat.numel() // 4096)].cpu()
            digest.update(f"{name}{tuple(self._tensors[name].shape)}{flat.dtype}".encode())
            digest.update(sample.double().numpy().tobytes())
        return digest.hexdigest()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a float tensor holds NaN or infinity: quantizing it would hide the damage."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or (tensor.dtype in FLOAT_DTYPES and is_finite(tensor)):
        return
    bad = sum(int((~torch.isfinite(part.float())).sum()) for part in tensor.flatten().split(_PIECE))
    if bad:
        raise CheckpointError(f"tensor {name!r} holds {bad} NaN or infinite values; the checkpoint is damaged")


def _scan(directory: Path) -> tuple[frozenset[Path], dict[str, Path], dict[str, TensorInfo]]:
    """The files of the weights, every tensor's file, and its info, from the headers alone. As in transformers, the
    whole of every shard that an index names counts, and the last shard by name for a tensor that is in several."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give a checkpoint's directory or a model id of the hub")
    first = _first_file(directory)
    weight_map = _weight_map(first) if first.name.endswith(".index.json") else {first.name: first.name}
    files = [_inside(directory, name, first.name) for name in sorted(set(weight_map.values()))]
    file_of, infos = {}, {}
    for file in files:
        for name, info in read_header(file).items():
            file_of[name], infos[name] = file, info
    if first not in files and (lost := sorted(set(weight_map) - set(file_of))):
        raise CheckpointError(f"{first.name} names {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it")
    return frozenset([first, *files]), file_of, infos


def _first_file(directory: Path) -> Path:
    """The file that transformers begins with: the one that config.json names, the single one, or the index."""
    named = read_config(directory).get(NAMED_WEIGHTS) if (directory / CONFIG_FILE).exists() else None
    if named is not None:
        return _inside(directory, named, CONFIG_FILE)
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    names = [path.name for path in sorted(directory.iterdir()) if path.is_file()]
    if others := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(
            f"{directory} holds {printable(others[0])}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which "
            f"transformers reads; if it is a variant of the whole model, rename it to {SINGLE_FILE}"
        )
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]:
        raise CheckpointError(
            f"{directory} holds pickled weights ({printable(pickles[0])}) and no safetensors; pickles can run code "
            "when read, so convert them with transformers' save_pretrained first"
        )
    raise CheckpointError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; is it a Hugging Face checkpoint?"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor that an index names."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: it should have a weight_map from tensors to files")
    return weight_map


def _inside(directory: Path, name: Any, owner: str) -> Path:
    """The file of a name that `owner` gives. CheckpointError for one that is missing or outside of the directory.
    It may be a link (in the hub's cache all are), its folder none that leads out."""
    if not isinstance(name, str) or "\0" in name or len(name) > _LONGEST_NAME:
        raise CheckpointError(f"{directory / owner} is damaged: {printable(name)[:60]!r} is no file name")
    file, pure = directory / name, PurePath(name)
    leads_out = not pure.parts or ".." in pure.parts or pure.is_absolute()
    if leads_out or file.parent.resolve() != directory.resolve() / pure.parent:
        raise CheckpointError(f"{owner} names the file {printable(name)}, which is not in {directory}; put it there")
    if not file.is_file():
        raise CheckpointError(f"{owner} names the shard {printable(name)}, which is missing from {directory}")
    return file


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file; CheckpointError if it is truncated or something else."""
    check_regular(file)  # a pipe would be waited for
    check_name(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            infos = {}
            for name in opened.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                part = opened.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(f"{file}: tensor {name!r} has the unsupported dtype {part.get_dtype()}")
                infos[name] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            return infos
    except (SafetensorError, OSError, MemoryError) as error:  # a file of terabytes cannot even be mapped
        with file.open("rb") as raw:
            start = raw.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(
                f"{file} is a pickle, not safetensors; pickles can run code when read, so convert it with "
                "safetensors.torch.save_file first"
            ) from None
        raise CheckpointError(f"{file} is truncated or damaged ({str(error)[:200]}); download it again") from None


def _sampled_digest(file: Path, samples: int = 256, length: int = 4096) -> bytes:
    """Size and evenly spaced pieces of a file: a hash in milliseconds that another training run would change."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as raw:
        for position in range(0, size, max(length, size // samples)):
            raw.seek(position)
            digest.update(raw.read(length))
    return digest.digest()
