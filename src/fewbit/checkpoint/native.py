"""The native quantized checkpoint: one safetensors file per block, one for what lies outside the blocks.

    RUN/fewbit.json               format version, recipe, fingerprint, model, which blocks are complete comes from
    RUN/journal.jsonl             one line per finished block (written after its file is in place)
    RUN/blocks/00000.safetensors  the block's quantized weights (NAME.codes, NAME.scale, NAME.zero_point) and the rest
    RUN/outside.safetensors       embeddings, final norm, head
    RUN/config.json, tokenizer…   copied from the model

Each file's metadata says which weights are quantized and how, so a file can be read alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.checkpoint.files import write_safetensors
from fewbit.checkpoint.source import TensorInfo, check_finite, read_header
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError
from fewbit.tensor import QuantTensor

MANIFEST = "fewbit.json"
OUTSIDE = "outside.safetensors"
FORMAT_VERSION = 1


def block_file(directory: Path, index: int) -> Path:
    return directory / "blocks" / f"{index:05d}.safetensors"


def write_part(file: Path, quantized: Mapping[str, QuantTensor], dense: Mapping[str, Tensor]) -> None:
    """Write quantized weights and plain tensors, by their names in the model, to one file atomically."""
    tensors = dict(dense)
    specs = {}
    for name, weight in quantized.items():
        specs[name] = {"spec": asdict(weight.spec), "shape": list(weight.shape)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in weight.to_tensors().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, tensors, {"format": "pt", "fewbit": json.dumps(specs, sort_keys=True)})


class NativeCheckpoint:
    """A finished run, readable as a TensorSource (dequantized) or as QuantTensors (for exporters)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory: Path = Path(directory)
        self.manifest: dict[str, Any] = read_manifest(self.directory)
        blocks = int(self.manifest["num_blocks"])
        self.block_files = [block_file(self.directory, index) for index in range(blocks)]
        missing = [file for file in self.files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{self.directory} is not finished ({missing[0].name} is missing); run the same command with --resume"
            )
        self._specs: dict[str, tuple[QuantizationSpec, tuple[int, int]]] = {}
        self._file_of: dict[str, Path] = {}
        self._dense: dict[str, TensorInfo] = {}
        for file in self.files:
            self._index(file)

    @property
    def files(self) -> list[Path]:
        return [*self.block_files, self.directory / OUTSIDE]

    @property
    def quantized(self) -> dict[str, tuple[QuantizationSpec, tuple[int, int]]]:
        """Spec and shape of every quantized weight."""
        return self._specs

    def names_in(self, file: Path) -> list[str]:
        """The model's tensor names that one file holds."""
        return [name for name, where in self._file_of.items() if where == file]

    def info(self) -> dict[str, TensorInfo]:
        quantized = {name: TensorInfo(shape, torch.float32) for name, (_, shape) in self._specs.items()}
        return self._dense | quantized

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = {}
        for name in names:
            if name in self._specs:
                tensors[name] = self.read_quantized(name).dequantize(dtype or torch.float32)
            else:
                tensors[name] = self._get(name, [name])[name].to(dtype)
                check_finite(name, tensors[name])
        return tensors

    def read_quantized(self, name: str) -> QuantTensor:
        """The QuantTensor of one weight."""
        spec, shape = self._specs[name]
        parts = ["codes", "scale"] + ([] if spec.symmetric else ["zero_point"])
        stored = self._get(name, [f"{name}.{part}" for part in parts])
        return QuantTensor.from_tensors({part: stored[f"{name}.{part}"] for part in parts}, spec, shape)

    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    def _get(self, name: str, stored_names: list[str]) -> dict[str, Tensor]:
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        with safe_open(self._file_of[name], framework="pt", device="cpu") as opened:
            return {stored: opened.get_tensor(stored).clone() for stored in stored_names}

    def _index(self, file: Path) -> None:
        header = read_header(file)
        with safe_open(file, framework="pt", device="cpu") as opened:
            specs = json.loads((opened.metadata() or {}).get("fewbit", "{}"))
        parts = {f"{name}.{part}" for name in specs for part in ("codes", "scale", "zero_point")}
        for name, entry in specs.items():
            rows, columns = entry["shape"]
            self._specs[name] = (QuantizationSpec(**entry["spec"]), (rows, columns))
            self._file_of[name] = file
        for name, info in header.items():
            if name not in parts:
                self._dense[name], self._file_of[name] = info, file


def read_manifest(directory: Path) -> dict[str, Any]:
    """fewbit.json of a run."""
    file = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a fewbit run: it has no {MANIFEST}") from None
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} was written in format {manifest.get('format_version')!r}; this fewbit reads {FORMAT_VERSION}"
        )
    return manifest
