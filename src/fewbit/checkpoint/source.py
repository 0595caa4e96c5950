"""Where tensors come from: a Hugging Face checkpoint's safetensors files, or a module in memory.

Files are opened for one read and closed again, so that their mapped pages do not stay in the process.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewbit.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
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
        self._file_of, self._info = _scan(self.directory)

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
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        return tensors

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(set(self._file_of.values())):
            digest.update(file.name.encode())
            digest.update(_sampled_digest(file))
        return digest.hexdigest()


class ModuleSource:
    """The weights of a module in memory; reading copies, the module itself is never changed."""

    directory: Path | None = None

    def __init__(self, module: nn.Module) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}

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
    if tensor.dtype not in FLOAT_DTYPES or tensor.numel() == 0:
        return
    low, high = tensor.aminmax()  # both are NaN if any element is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"tensor {name!r} holds {bad} NaN or infinite values; the checkpoint is damaged")


def _scan(directory: Path) -> tuple[dict[str, Path], dict[str, TensorInfo]]:
    """Every tensor's file and info, from the headers alone; each file's length is checked against its header."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give a checkpoint's directory or a model id of the hub")
    index = directory / INDEX_FILE
    if index.exists():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            if not all(isinstance(name, str) for name in weight_map.values()):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{index} is damaged: it should be JSON with a weight_map") from None
        files = sorted({directory / name for name in weight_map.values()})
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{index.name} names the shard {file.name}, which is missing from {directory}")
    else:
        files = [directory / SINGLE_FILE]
        weight_map = None
        if not files[0].exists():
            raise CheckpointError(_no_weights(directory))
    file_of, infos = {}, {}
    for file in files:
        for name, info in read_header(file).items():
            if weight_map is None or weight_map.get(name) == file.name:
                file_of[name], infos[name] = file, info
    if weight_map is not None and (lost := sorted(set(weight_map) - set(file_of))):
        raise CheckpointError(f"{index.name} names {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it")
    return file_of, infos


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file; CheckpointError if it is truncated or something else."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            infos = {}
            for name in opened.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                part = opened.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(f"{file}: tensor {name!r} has the unsupported dtype {part.get_dtype()}")
                infos[name] = TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            return infos
    except (SafetensorError, OSError) as error:
        with file.open("rb") as raw:
            start = raw.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(
                f"{file} is a pickle, not safetensors; pickles can run code when read, so convert it with "
                "safetensors.torch.save_file first"
            ) from None
        raise CheckpointError(f"{file} is truncated or damaged ({error}); download it again") from None


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in directory.glob(suffix))
    if pickles:
        return (
            f"{directory} holds pickled weights ({pickles[0]}) and no safetensors; pickles can run code when read, so "
            "convert them with transformers' save_pretrained first"
        )
    return f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; is it a Hugging Face checkpoint?"


def _sampled_digest(file: Path, samples: int = 256, length: int = 4096) -> bytes:
    """Size and evenly spaced pieces of a file: a hash in milliseconds that another training run would change."""
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as raw:
        for position in range(0, size, max(length, size // samples)):
            raw.seek(position)
            digest.update(raw.read(length))
    return digest.digest()
