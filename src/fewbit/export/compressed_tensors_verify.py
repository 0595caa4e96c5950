"""Proof that a compressed-tensors export is right: the format's own library decodes it, and all must equal the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.errors import FewbitError, VerificationError
from fewbit.export import compressed_tensors
from fewbit.export.verification import Verification, compare
from fewbit.tensor import QuantTensor


def verify(directory: Path, checkpoint: NativeCheckpoint) -> Verification:
    """Decode every weight of an export with the library and compare it, and all other tensors, with the run."""
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
        compare(f"{module} codes", codes.to(torch.int16), _signed(expected, expected.unsigned_codes()))
        compare(f"{module} scale", tensors["weight_scale"], expected.scale)
        zero = expected.unsigned_zero_point()
        if zero is not None:
            found = unpack_from_int32(tensors["weight_zero_point"], bits, torch.Size(zero.shape), packed_dim=0)
            compare(f"{module} zero point", found.to(torch.int16), _signed(expected, zero))
        decompressor = BaseCompressor.get_value_from_registry(raw["format"])
        try:
            weight = decompressor.decompress(tensors, scheme)["weight"]
        except Exception as error:  # whatever the library raises, it cannot read this weight by that config
            raise VerificationError(f"{module}: {library.__name__} cannot decode it: {error}") from None
        compare(f"{module} weight", weight, expected.dequantize(expected.scale.dtype))
    dense = [name for part in checkpoint.parts for name in part.dense]
    for name in dense:
        if name not in names:
            raise VerificationError(f"{directory}: tensor {name!r} is missing")
        compare(name, stored.read([name])[name], checkpoint.read([name])[name])
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
