"""compressed-tensors, format pack-quantized: weight-only integers of 2 to 8 bits for vLLM and transformers.

Layout of one weight [out, in] of b bits (compressed-tensors 0.19/0.20):
    weight_packed      int32 [out, ceil(in·b/32)]       code + 2^(b−1) in a little-endian bit stream per row
    weight_scale       [out, in/group] or [out, 1]      dtype of the model
    weight_zero_point  int32 [ceil(out·b/32), in/group] affine only: unsigned, packed along `out`
    weight_shape       int64 [2]
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.files import copy_side_files, write_json, write_safetensors
from fewbit.checkpoint.native import NativeCheckpoint
from fewbit.checkpoint.source import INDEX_FILE, SafetensorsSource, TensorInfo
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, ConfigError
from fewbit.numerics.packing import pack, unpack
from fewbit.tensor import QuantTensor, from_unsigned

NAME = "compressed-tensors"
FORMAT = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def write(checkpoint: NativeCheckpoint, directory: Path) -> None:
    """Write the export into an existing empty directory: one shard per block, so one block is in memory at a time."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, part in enumerate(checkpoint.parts, start=1):
        shard = f"model-{number:05d}-of-{len(checkpoint.parts):05d}.safetensors"
        tensors = {name: part.read(name) for name in part.dense}
        for name in part.quantized:
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{key}": value for key, value in encode(part.read_quantized(name)).items()}
        write_safetensors(directory / shard, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    copy_side_files(checkpoint.directory, directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(checkpoint)
    write_json(directory / "config.json", config)


def check(specs: Mapping[str, QuantizationSpec]) -> None:
    """ConfigError for what the format cannot hold, given the spec of every quantized weight by its name."""
    for name, spec in specs.items():
        if not spec.format.is_integer:
            raise ConfigError(f"{NAME}: {name!r} is {spec.dtype}; this exporter writes integer weights of 2 to 8 bits")
        if spec.scale_dtype != "checkpoint":
            raise ConfigError(
                f"{NAME}: {name!r} has scales in {spec.scale_dtype}; readers load scales in the model's dtype, so use "
                "scale_dtype: checkpoint"
            )
        if spec.qscheme == "per_tensor":
            raise ConfigError(
                f"{NAME}: {name!r} has one scale for the whole tensor; {FORMAT} holds scales per channel or per group"
            )


def encode(weight: QuantTensor) -> dict[str, Tensor]:
    """The format's tensors of one weight, by their names beside the module."""
    bits = weight.spec.bits
    tensors = {
        "weight_packed": pack(weight.unsigned_codes(), bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    zero = weight.unsigned_zero_point()
    if zero is not None:
        tensors["weight_zero_point"] = pack(zero.T.contiguous(), bits).T.contiguous()
    return tensors


def decode(tensors: dict[str, Tensor], spec: QuantizationSpec) -> QuantTensor:
    """Inverse of `encode`."""
    rows, columns = (int(n) for n in tensors["weight_shape"])
    codes = from_unsigned(unpack(tensors["weight_packed"], spec.bits, columns), spec)
    zero = None
    if "weight_zero_point" in tensors:
        zero = from_unsigned(unpack(tensors["weight_zero_point"].T.contiguous(), spec.bits, rows).T.contiguous(), spec)
    return QuantTensor(codes, tensors["weight_scale"], zero, spec)


def quantization_config(checkpoint: NativeCheckpoint) -> dict[str, Any]:
    """The quantization_config of config.json, with as few keys as readers need (unknown ones make them fail).

    The commonest spec targets all linears; the others name their modules, and come first because the first match wins.
    """
    modules = defaultdict(list)
    for name, (spec, _) in checkpoint.quantized.items():
        modules[_weights(spec)].append(name.removesuffix(".weight"))
    by_size = sorted(modules.items(), key=lambda item: len(item[1]))
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if names is by_size[-1][1] else names,
            "weights": json.loads(weights),
        }
        for number, (weights, names) in enumerate(by_size)
    }
    return {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": checkpoint.manifest["unquantized_linears"],
    }


def _weights(spec: QuantizationSpec) -> str:
    """The `weights` entry of a spec as canonical JSON, so that equal ones can be counted."""
    args: dict[str, Any] = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "dynamic": False}
    if spec.qscheme == "per_group":
        args |= {"strategy": "group", "group_size": spec.group_size}
    else:
        args |= {"strategy": "channel"}
    return json.dumps(args, sort_keys=True)


class CompressedTensorsSource:
    """A pack-quantized checkpoint, ours or another tool's, read as a TensorSource (weights dequantized)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory: Path = Path(directory)
        self._files = SafetensorsSource(directory)
        self._specs = self._read_specs()

    def info(self) -> dict[str, TensorInfo]:
        stored = self._files.info()
        packed = {f"{module}.{part}" for module in self._specs for part in PARTS}
        dense = {name: info for name, info in stored.items() if name not in packed}
        return dense | {f"{module}.weight": TensorInfo((), torch.float32) for module in self._specs}

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = {}
        for name in names:
            if name.removesuffix(".weight") in self._specs:
                tensors[name] = self.read_quantized(name).dequantize(dtype or torch.float32)
            else:
                tensors |= self._files.read([name], dtype)
        return tensors

    def read_quantized(self, name: str) -> QuantTensor:
        """The QuantTensor of one weight."""
        module = name.removesuffix(".weight")
        stored = [part for part in PARTS if f"{module}.{part}" in self._files.info()]
        tensors = self._files.read([f"{module}.{part}" for part in stored])
        return decode({part: tensors[f"{module}.{part}"] for part in stored}, self._specs[module])

    def fingerprint(self) -> str:
        return self._files.fingerprint()

    def _read_specs(self) -> dict[str, QuantizationSpec]:
        """Spec of every packed module. Bits and group follow from the stored shapes; the config must agree."""
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        if config.get("format") != FORMAT:
            raise CheckpointError(f"{self.directory} has format {config.get('format')!r}; this fewbit reads {FORMAT}")
        info = self._files.info()
        specs = {}
        for name in info:
            if name.endswith(".weight_packed"):
                module = name.removesuffix(".weight_packed")
                specs[module] = self._spec(module, config["config_groups"], info)
        return specs

    def _spec(self, module: str, groups: dict[str, Any], info: dict[str, TensorInfo]) -> QuantizationSpec:
        columns = int(self._files.read([f"{module}.weight_shape"])[f"{module}.weight_shape"][1])
        scales = info[f"{module}.weight_scale"].shape[1]
        symmetric = f"{module}.weight_zero_point" not in info
        words = info[f"{module}.weight_packed"].shape[1]
        for group in groups.values():
            weights = group["weights"]
            bits = int(weights["num_bits"])
            per_group = weights["strategy"] == "group"
            fits = words == -(-columns * bits // 32) and symmetric == bool(weights.get("symmetric", True))
            if fits and scales == (columns // weights["group_size"] if per_group else 1):
                return QuantizationSpec(
                    dtype=f"int{bits}",
                    qscheme="per_group" if per_group else "per_channel",
                    group_size=weights["group_size"] if per_group else None,
                    symmetric=symmetric,
                )
        raise CheckpointError(f"{self.directory}: no config group describes the stored shapes of {module!r}")
