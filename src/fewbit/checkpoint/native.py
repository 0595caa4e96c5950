"""The native quantized checkpoint: one safetensors file per block, one for what lies outside the blocks.

    RUN/fewbit.json               format version, resolved recipe, fingerprint, number of blocks, and what the blocks'
                                  files do not say of the model (see fewbit.contents)
    RUN/journal.jsonl             digests of all finished files (see checkpoint.journal)
    RUN/blocks/00000.safetensors  the block's quantized weights (NAME.codes, NAME.scale, …), the rest, and what is
                                  known of quantized activations (MODULE.input.scale, MODULE.key.scale, …)
    RUN/outside.safetensors       embeddings, final norm, head
    RUN/config.json, tokenizer…   copied from the model

Each file's metadata says which weights are quantized and how, so a file can be read alone. Whoever reads a run checks
each file against its digest before the first tensor is taken from it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.checkpoint.journal import Journal, fields_digest
from fewbit.checkpoint.source import TensorInfo, check_finite, read_header
from fewbit.config.spec import QuantizationSpec
from fewbit.contents import Contents
from fewbit.errors import CheckpointError, FewbitError, shown
from fewbit.files import read_json_object, write_json
from fewbit.safetensors_file import has_digest, write_safetensors
from fewbit.tensor import QuantizedActivation, QuantTensor

MANIFEST = "fewbit.json"
OUTSIDE = "outside.safetensors"
FORMAT_VERSION = 4


def block_file(directory: Path, index: int) -> Path:
    return directory / "blocks" / f"{index:05d}.safetensors"


@dataclass(frozen=True)
class StoredStep:
    """One step of a linear's input (nn/steps.py), as it is stored."""

    kind: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """By their names below the linear's."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What else its class needs, as JSON has it."""


def write_part(
    file: Path,
    quantized: Mapping[str, QuantTensor],
    dense: Mapping[str, Tensor],
    activations: Mapping[str, QuantizedActivation] | None = None,
    steps: Mapping[str, Sequence[StoredStep]] | None = None,
    folded: Iterable[str] = (),
) -> str:
    """Write quantized weights and plain tensors, by their names in the model, to one file atomically; returns its
    digest. `activations` are named by module and slot (MODULE.input, MODULE.key, …), `steps` by linear. `folded`:
    tensors of `dense` into which channel scales were folded; a resumed run takes the model's and divides inputs."""
    tensors, specs, flows, taken = dict(dense), {}, {}, {}
    for name, activation in (activations or {}).items():
        stored = activation.to_tensors()
        flows[name] = {"spec": asdict(activation.spec), "stored": sorted(stored)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    for name, weight in quantized.items():
        specs[name] = {"spec": asdict(weight.spec), "shape": list(weight.shape)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in weight.to_tensors().items()}
    for name, of_input in (steps or {}).items():
        taken[name] = [{"kind": s.kind, "data": dict(s.data), "stored": sorted(s.tensors)} for s in of_input]
        tensors |= {f"{name}.{part}": tensor.cpu().clone() for s in of_input for part, tensor in s.tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    described = {"weights": specs, "activations": flows, "steps": taken, "folded": sorted(folded)}
    return write_safetensors(file, tensors, {"fewbit": json.dumps(described, sort_keys=True)})


class NativePart:
    """One file of a native checkpoint; complete by itself, so a resumed run can read the blocks it already has."""

    def __init__(self, file: Path, digest: str | None = None) -> None:
        """`digest`, from the journal, is compared before a tensor is read. CheckpointError for a damaged file."""
        header = read_header(file)
        with safe_open(file, framework="pt", device="cpu") as opened:
            described = (opened.metadata() or {}).get("fewbit", "{}")
        self.file, self._digest = file, digest
        try:
            self._describe(json.loads(described), header)
        except FewbitError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise CheckpointError(f"{file} is damaged: its description of the weights cannot be read") from None

    def _describe(self, described: dict[str, Any], header: dict[str, TensorInfo]) -> None:
        self.quantized: dict[str, tuple[QuantizationSpec, tuple[int, int]]] = {
            name: (QuantizationSpec(**entry["spec"]), (int(entry["shape"][0]), int(entry["shape"][1])))
            for name, entry in described.get("weights", {}).items()
        }
        self.flows: dict[str, tuple[QuantizationSpec, list[str]]] = {
            name: (QuantizationSpec(**entry["spec"]), list(entry["stored"]))
            for name, entry in described.get("activations", {}).items()
        }
        self.step_parts: dict[str, list[tuple[str, dict[str, Any], list[str]]]] = {
            name: [(str(step["kind"]), dict(step["data"]), list(step["stored"])) for step in steps]
            for name, steps in described.get("steps", {}).items()
        }
        self.folded: list[str] = list(described.get("folded", ()))
        stored = (
            {f"{name}.{part}" for name, steps in self.step_parts.items() for _, _, parts in steps for part in parts}
            | {f"{n}.{part}" for n, (spec, _) in self.quantized.items() for part in QuantTensor.stored_names(spec)}
            | {f"{name}.{part}" for name, (_, parts) in self.flows.items() for part in parts}
        )
        if lost := sorted(stored - set(header)):
            raise CheckpointError(f"it holds no {lost[0]!r}")
        self.dense = {name: info for name, info in header.items() if name not in stored}

    def info(self) -> dict[str, TensorInfo]:
        return self.dense | {name: TensorInfo(shape, torch.float32) for name, (_, shape) in self.quantized.items()}

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor; a quantized one is dequantized (to float32 unless `dtype` says otherwise)."""
        if name in self.quantized:
            return self.read_quantized(name).dequantize(dtype or torch.float32)
        tensor = self._parts("", [name])[name].to(dtype)
        check_finite(name, tensor)
        return tensor

    def read_quantized(self, name: str) -> QuantTensor:
        """The QuantTensor of one weight."""
        spec, shape = self.quantized[name]
        return QuantTensor.from_tensors(self._parts(name, QuantTensor.stored_names(spec)), spec, shape)

    def global_scale(self, name: str) -> float:
        """Global scale of one weight, read without its codes; 1.0 if it has none."""
        spec, _ = self.quantized[name]
        kept = ["global_scale"] if spec.stored_as.has_global_scale else []
        return float(self._parts(name, kept).get("global_scale", 1.0))

    def activations(self) -> dict[str, QuantizedActivation]:
        """Quantized activations by module and slot."""
        return {name: self.activation(name) for name in self.flows}

    def activation(self, name: str) -> QuantizedActivation:
        """The quantized activation MODULE.SLOT."""
        spec, parts = self.flows[name]
        return QuantizedActivation.from_tensors(self._parts(name, parts), spec)

    def steps(self) -> dict[str, list[StoredStep]]:
        """Steps of each linear's input, in order."""
        return {
            name: [StoredStep(kind, self._parts(name, parts) if parts else {}, data) for kind, data, parts in steps]
            for name, steps in self.step_parts.items()
        }

    def check(self) -> None:
        """CheckpointError if the file is not the one that the run wrote."""
        if self._digest is not None and not has_digest(self.file, self._digest):
            raise _damaged(self.file)
        self._digest = None

    def _parts(self, name: str, parts: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that `name` is stored as, by their names below its own; of "" by their whole names."""
        self.check()
        with safe_open(self.file, framework="pt", device="cpu") as opened:
            return {part: opened.get_tensor(f"{name}.{part}" if name else part).clone() for part in parts}


def _damaged(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged: it is not what the run wrote; remove it and run the same command with --resume, which "
        "makes it anew"
    )


class NativeCheckpoint:
    """A finished run, readable as a TensorSource (dequantized) or part by part (for exporters)."""

    files: frozenset[Path] = frozenset()

    def __init__(self, directory: str | Path) -> None:
        self.directory: Path = Path(directory)
        self.manifest: dict[str, Any] = read_manifest(self.directory)
        journal = Journal(self.directory)
        digests = {number: block.digest for number, block in journal.blocks().items()}
        self._files = journal.files()
        blocks = range(self.manifest["num_blocks"])  # stops at the first that is missing, whatever the number
        self.parts = [self._open(block_file(self.directory, index), digests.get(index)) for index in blocks]
        self.parts.append(self._open(self.directory / OUTSIDE, self._files.get(OUTSIDE)))
        self._part_of = {name: part for part in self.parts for name in part.info()}

    @cached_property
    def contents(self) -> Contents:
        """What is in the run. CheckpointError if the manifest and the blocks' files do not fit together."""
        specs = {n: spec for part in self.parts for n, (spec, _) in (*part.quantized.items(), *part.flows.items())}
        steps = {  # while the model runs: but for quantization and what is folded into other weights
            name: tuple(kind for kind, data, _ in steps if kind != "quantize" and not data.get("folded"))
            for part in self.parts
            for name, steps in part.step_parts.items()
        }
        try:
            return Contents.restored(self.manifest.get("contents"), specs, steps)
        except ValueError:
            raise CheckpointError(
                f"{self.directory / MANIFEST} is damaged: it does not say what the blocks' files leave open"
            ) from None

    @property
    def quantized(self) -> dict[str, tuple[QuantizationSpec, tuple[int, int]]]:
        """Spec and shape of every quantized weight."""
        return {name: entry for part in self.parts for name, entry in part.quantized.items()}

    def info(self) -> dict[str, TensorInfo]:
        return {name: info for part in self.parts for name, info in part.info().items()}

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {name: self.part(name).read(name, dtype) for name in names}

    def read_quantized(self, name: str) -> QuantTensor:
        return self.part(name).read_quantized(name)

    def activations(self) -> dict[str, QuantizedActivation]:
        """Quantized activations of all parts, by module and slot."""
        return {name: activation for part in self.parts for name, activation in part.activations().items()}

    def steps(self) -> dict[str, list[StoredStep]]:
        """Steps of each linear's input, in order."""
        return {name: steps for part in self.parts for name, steps in part.steps().items()}

    def fingerprint(self) -> str:
        """Changes with the recipe, the model, the calibration data and what was made of them."""
        blocks = {str(number): block.digest for number, block in Journal(self.directory).blocks().items()}
        return fields_digest({"manifest": self.manifest, "blocks": blocks, "files": self._files})

    def check_files(self) -> None:
        """CheckpointError if configuration or tokenizer of the run are not what it wrote."""
        for name, digest in self._files.items():
            file = self.directory / name
            if name != OUTSIDE and not has_digest(file, digest):
                raise _damaged(file)

    def _open(self, file: Path, digest: str | None) -> NativePart:
        if digest is None or not file.exists():
            raise CheckpointError(
                f"{self.directory} is not finished ({file.name} is missing); run the same command with --resume"
            )
        try:
            return NativePart(file, digest)
        except CheckpointError:
            raise _damaged(file) from None

    def part(self, name: str) -> NativePart:
        """The part that holds a tensor."""
        if name not in self._part_of:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        return self._part_of[name]


def write_manifest(directory: Path, fields: Mapping[str, Any]) -> None:
    """fewbit.json of a run, with a digest of its fields."""
    manifest = {"format_version": FORMAT_VERSION} | dict(fields)
    write_json(directory / MANIFEST, manifest | {"check": fields_digest(manifest)})


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `write_manifest` wrote. CheckpointError if there is none, or if it was changed since."""
    file = directory / MANIFEST
    if not file.exists():
        raise CheckpointError(f"{directory} is not a fewbit run: it has no {MANIFEST}")
    manifest = read_json_object(file)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = shown(manifest.get("format_version"))
        raise CheckpointError(
            f"{directory} was written in format {found}; this fewbit reads {FORMAT_VERSION}: quantize again, or use "
            "the fewbit that wrote it (its exports still work)"
        )
    if manifest.pop("check", None) != fields_digest(manifest):
        raise CheckpointError(f"{file} is damaged: its fields are not those that the run wrote")
    number = manifest.get("num_blocks")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CheckpointError(f"{file} is damaged: it does not say how many blocks there are")
    return manifest
