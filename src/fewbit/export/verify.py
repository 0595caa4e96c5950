"""Proof that an export is right: somebody else's decoder reads it, and every tensor must equal the run's exactly."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import write_json
from fewbit.checkpoint.native import MANIFEST, NativeCheckpoint
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.errors import CheckpointError, FewbitError, VerificationError
from fewbit.export import compressed_tensors
from fewbit.tensor import QuantTensor

ORIGIN = "fewbit-export.json"


@dataclass(frozen=True)
class Verification:
    """What was compared."""

    directory: Path
    format: str
    quantized: int
    dense: int
    decoder: str


def write_origin(directory: Path, final: Path, run: Path, format: str) -> None:
    """Note in an export which run it was made from."""
    write_json(directory / ORIGIN, {"format": format, "run": os.path.relpath(run.resolve(), final.resolve())})


def verify(directory: str | Path, run: str | Path | None = None) -> list[Verification]:
    """Verify one export, or every export of a run. `run` is needed only if the export was moved away from it.

    Raises VerificationError naming the first tensor that differs.
    """
    directory = Path(directory)
    if (directory / MANIFEST).exists():
        exports = sorted(path.parent for path in (directory / "exports").glob(f"*/{ORIGIN}"))
        if not exports:
            raise CheckpointError(
                f"{directory} has no exports yet; make one with: fewbit export {directory} --format …"
            )
        return [_verify_export(export, directory) for export in exports]
    return [_verify_export(directory, Path(run) if run is not None else None)]


def _verify_export(directory: Path, run: Path | None) -> Verification:
    try:
        origin = json.loads((directory / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{directory} is no fewbit export (it has no readable {ORIGIN})") from None
    run = run or directory / origin["run"]
    if not (run / MANIFEST).exists():
        raise CheckpointError(f"the run that {directory} was made from is not at {run}; say where it is with --run")
    if origin["format"] != compressed_tensors.NAME:
        raise CheckpointError(f"{directory} has the unknown format {origin['format']!r}")
    return _verify_compressed_tensors(directory, NativeCheckpoint(run))


def _verify_compressed_tensors(directory: Path, checkpoint: NativeCheckpoint) -> Verification:
    try:
        import compressed_tensors as library
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError:
        raise FewbitError("verifying this export needs its decoder: pip install 'fewbit[verify]'") from None
    stored = SafetensorsSource(directory)
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    schemes = list(QuantizationConfig.model_validate(raw).config_groups.values())
    names = set(stored.info())
    for name in checkpoint.quantized:
        module = name.removesuffix(".weight")
        expected = checkpoint.read_quantized(name)
        tensors = _module_tensors(stored, names, module, affine=not expected.spec.symmetric)
        scheme = _scheme_of(schemes, module)
        bits = scheme.weights.num_bits
        codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(tensors["weight_shape"].tolist()))
        _compare(f"{module} codes", codes.to(torch.int16), _signed(expected, expected.unsigned_codes()))
        _compare(f"{module} scale", tensors["weight_scale"], expected.scale)
        zero = expected.unsigned_zero_point()
        if zero is not None:
            found = unpack_from_int32(tensors["weight_zero_point"], bits, torch.Size(zero.shape), packed_dim=0)
            _compare(f"{module} zero point", found.to(torch.int16), _signed(expected, zero))
        decompressor = BaseCompressor.get_value_from_registry(raw["format"])
        try:
            weight = decompressor.decompress(tensors, scheme)["weight"]
        except Exception as error:  # whatever the library raises, it cannot read this weight by that config
            raise VerificationError(f"{module}: {library.__name__} cannot decode it: {error}") from None
        _compare(f"{module} weight", weight, expected.dequantize(expected.scale.dtype))
    dense = [name for part in checkpoint.parts for name in part.dense]
    for name in dense:
        if name not in names:
            raise VerificationError(f"{directory}: tensor {name!r} is missing")
        _compare(name, stored.read([name])[name], checkpoint.read([name])[name])
    extra = (
        names
        - set(dense)
        - {
            f"{name.removesuffix('.weight')}.{part}"
            for name in checkpoint.quantized
            for part in compressed_tensors.PARTS
        }
    )
    if extra:
        raise VerificationError(f"{directory} holds tensors that the run does not: {sorted(extra)[0]!r}")
    decoder = f"compressed-tensors {library.__version__}"
    return Verification(directory, compressed_tensors.NAME, len(checkpoint.quantized), len(dense), decoder)


def _module_tensors(stored: SafetensorsSource, names: set[str], module: str, affine: bool) -> dict[str, Tensor]:
    parts = [part for part in compressed_tensors.PARTS if f"{module}.{part}" in names]
    needed = [part for part in compressed_tensors.PARTS if affine or part != "weight_zero_point"]
    if parts != needed:
        lost, extra = sorted(set(needed) - set(parts)), sorted(set(parts) - set(needed))
        what = f"{lost[0]} is missing" if lost else f"{extra[0]} should not be there"
        raise VerificationError(f"{stored.directory}: {module}.{what}")
    tensors = stored.read([f"{module}.{part}" for part in parts])
    return {part: tensors[f"{module}.{part}"] for part in parts}


def _scheme_of(schemes: list[Any], module: str) -> Any:
    """The scheme a reader picks: an exact name wins, then the group that targets all linears."""
    for scheme in schemes:
        if module in scheme.targets:
            return scheme
    return next(scheme for scheme in schemes if "Linear" in scheme.targets)


def _signed(weight: QuantTensor, unsigned: Tensor) -> Tensor:
    """The library's codes are signed for every spec."""
    offset: int = 2 ** (weight.spec.bits - 1)
    return unsigned.to(torch.int16) - offset


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise VerificationError(
            f"{what}: found {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    if not torch.equal(found, expected):
        different = int((found != expected).sum())
        raise VerificationError(f"{what}: {different} of {expected.numel()} values differ from the run")
