"""The native quantized checkpoint: one safetensors file per block, one for what lies outside the blocks.

    RUN/fewbit.json               format version, resolved recipe, fingerprint, number of blocks
    RUN/journal.jsonl             one line per finished block (written after its file is in place)
    RUN/blocks/00000.safetensors  the block's quantized weights (NAME.codes, NAME.scale, …), the rest, and what is
                                  known of quantized activations (MODULE.input.scale, MODULE.key.scale, …)
    RUN/outside.safetensors       embeddings, final norm, head
    RUN/config.json, tokenizer…   copied from the model

Each file's metadata says which weights are quantized and how, so a file can be read alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.checkpoint.files import write_safetensors
from fewbit.checkpoint.source import TensorInfo, check_finite, read_header
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError
from fewbit.tensor import QuantizedActivation, QuantTensor

MANIFEST = "fewbit.json"
OUTSIDE = "outside.safetensors"
FORMAT_VERSION = 2


def block_file(directory: Path, index: int) -> Path:
    return directory / "blocks" / f"{index:05d}.safetensors"


@dataclass(frozen=True)
class Smoothing:
    """What scales were folded into dense tensors, so that a resumed run can compute as the interrupted one did."""

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """[in] by module: what its columns were multiplied by and its input would be divided by."""
    folded: tuple[str, ...] = ()
    """Tensors that changed for it; the model's own go with dividing the input."""


def write_part(
    file: Path,
    quantized: Mapping[str, QuantTensor],
    dense: Mapping[str, Tensor],
    activations: Mapping[str, QuantizedActivation] | None = None,
    smoothing: Smoothing | None = None,
) -> None:
    """Write quantized weights and plain tensors, by their names in the model, to one file atomically.

    `activations` are named by module and slot: MODULE.input, MODULE.output, and of attention MODULE.key, MODULE.value,
    MODULE.query.
    """
    smoothing = smoothing or Smoothing()
    tensors = dict(dense) | {f"{name}.smoothing": columns.clone() for name, columns in smoothing.columns.items()}
    specs = {}
    flows = {}
    for name, activation in (activations or {}).items():
        stored = activation.to_tensors()
        flows[name] = {"spec": asdict(activation.spec), "stored": sorted(stored)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    for name, weight in quantized.items():
        specs[name] = {"spec": asdict(weight.spec), "shape": list(weight.shape)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in weight.to_tensors().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    smoothed = {"modules": sorted(smoothing.columns), "folded": sorted(smoothing.folded)}
    described = {"weights": specs, "activations": flows, "smoothing": smoothed}
    write_safetensors(file, tensors, {"fewbit": json.dumps(described, sort_keys=True)})


class NativePart:
    """One file of a native checkpoint; complete by itself, so a resumed run can read the blocks it already has."""

    def __init__(self, file: Path) -> None:
        header = read_header(file)
        with safe_open(file, framework="pt", device="cpu") as opened:
            described = json.loads((opened.metadata() or {}).get("fewbit", "{}"))
        specs, flows = described.get("weights", {}), described.get("activations", {})
        self.file = file
        self.quantized: dict[str, tuple[QuantizationSpec, tuple[int, int]]] = {
            name: (QuantizationSpec(**entry["spec"]), (entry["shape"][0], entry["shape"][1]))
            for name, entry in specs.items()
        }
        self._flows: dict[str, Any] = flows
        self._smoothed: dict[str, list[str]] = described.get("smoothing", {"modules": [], "folded": []})
        stored = (
            {f"{name}.smoothing" for name in self._smoothed["modules"]}
            | {part for name, (spec, _) in self.quantized.items() for part in _stored(name, spec)}
            | {f"{name}.{part}" for name, entry in flows.items() for part in entry["stored"]}
        )
        self.dense = {name: info for name, info in header.items() if name not in stored}

    def info(self) -> dict[str, TensorInfo]:
        quantized = {name: TensorInfo(shape, torch.float32) for name, (_, shape) in self.quantized.items()}
        return self.dense | quantized

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor; a quantized one is dequantized (to float32 unless `dtype` says otherwise)."""
        if name in self.quantized:
            return self.read_quantized(name).dequantize(dtype or torch.float32)
        tensor = self._get([name])[name].to(dtype)
        check_finite(name, tensor)
        return tensor

    def read_quantized(self, name: str) -> QuantTensor:
        """The QuantTensor of one weight."""
        spec, shape = self.quantized[name]
        parts = QuantTensor.stored_names(spec)
        stored = self._get([f"{name}.{part}" for part in parts])
        return QuantTensor.from_tensors({part: stored[f"{name}.{part}"] for part in parts}, spec, shape)

    def global_scale(self, name: str) -> float:
        """Second-level scale of one weight, whose codes are not read; 1.0 if it has none."""
        spec, _ = self.quantized[name]
        return float(self._get([part])[part]) if (part := f"{name}.global_scale") in _stored(name, spec) else 1.0

    def activations(self) -> dict[str, QuantizedActivation]:
        """Quantized activations by module and slot."""
        found = {}
        for name, entry in self._flows.items():
            stored = self._get([f"{name}.{part}" for part in entry["stored"]])
            tensors = {part: stored[f"{name}.{part}"] for part in entry["stored"]}
            found[name] = QuantizedActivation.from_tensors(tensors, QuantizationSpec(**entry["spec"]))
        return found

    def smoothing(self) -> Smoothing:
        """What was folded."""
        vectors = self._get([f"{name}.smoothing" for name in self._smoothed["modules"]])
        return Smoothing(
            {name.removesuffix(".smoothing"): vector for name, vector in vectors.items()},
            tuple(self._smoothed["folded"]),
        )

    def _get(self, stored_names: list[str]) -> dict[str, Tensor]:
        with safe_open(self.file, framework="pt", device="cpu") as opened:
            return {stored: opened.get_tensor(stored).clone() for stored in stored_names}


def _stored(name: str, spec: QuantizationSpec) -> list[str]:
    """Names of the tensors that a quantized weight is stored as."""
    return [f"{name}.{part}" for part in QuantTensor.stored_names(spec)]


class NativeCheckpoint:
    """A finished run, readable as a TensorSource (dequantized) or part by part (for exporters)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory: Path = Path(directory)
        self.manifest: dict[str, Any] = read_manifest(self.directory)
        blocks = [block_file(self.directory, index) for index in range(int(self.manifest["num_blocks"]))]
        files = [*blocks, self.directory / OUTSIDE]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{self.directory} is not finished ({missing[0]} is missing); run the same command with --resume"
            )
        self.parts = [NativePart(file) for file in files]
        self._part_of = {name: part for part in self.parts for name in part.info()}

    @property
    def quantized(self) -> dict[str, tuple[QuantizationSpec, tuple[int, int]]]:
        """Spec and shape of every quantized weight."""
        return {name: entry for part in self.parts for name, entry in part.quantized.items()}

    def info(self) -> dict[str, TensorInfo]:
        return {name: info for part in self.parts for name, info in part.info().items()}

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {name: self._part(name).read(name, dtype) for name in names}

    def read_quantized(self, name: str) -> QuantTensor:
        return self._part(name).read_quantized(name)

    def activations(self) -> dict[str, QuantizedActivation]:
        """Quantized activations of all parts, by module and slot."""
        return {name: activation for part in self.parts for name, activation in part.activations().items()}

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def _part(self, name: str) -> NativePart:
        if name not in self._part_of:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        return self._part_of[name]


def read_manifest(directory: Path) -> dict[str, Any]:
    """fewbit.json of a run."""
    file = directory / MANIFEST
    try:
        manifest: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a fewbit run: it has no {MANIFEST}") from None
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file} is damaged: it is no table of fields")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} was written in format {manifest.get('format_version')!r}; this fewbit reads {FORMAT_VERSION}"
        )
    if not isinstance(manifest.get("num_blocks"), int):
        raise CheckpointError(f"{file} is damaged: it does not say how many blocks there are")
    return manifest
