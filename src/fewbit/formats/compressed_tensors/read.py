"""Reads compressed-tensors checkpoints, ours or another tool's: weights as QuantTensors, activations as states."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.source import FLOAT_DTYPES, SafetensorsSource, TensorInfo
from fewbit.config.matching import matching
from fewbit.config.spec import QuantizationSpec
from fewbit.errors import CheckpointError, shown
from fewbit.formats.compressed_tensors.activations import PARTS, PREFIXES, decode_activation
from fewbit.formats.compressed_tensors.config import ATTENTION_SLOTS, MIXED, NAME, naming
from fewbit.formats.compressed_tensors.layouts import LAYOUTS, Layout, Tensors
from fewbit.formats.compressed_tensors.scheme import Args, activation_spec, layout_for, weight_spec
from fewbit.formats.format import Opened
from fewbit.tensor import QuantizedActivation, QuantTensor


def open_export(directory: Path) -> Opened | None:
    """A checkpoint of this format; None if the directory's config.json names no such quantization."""
    if (quantization_of(read_config(directory), directory) or {}).get("quant_method") != NAME:
        return None
    source = CompressedTensorsSource(directory)
    return Opened(source, source.activations())


class CompressedTensorsSource:
    """A compressed-tensors checkpoint of any format, read as a TensorSource (weights dequantized).

    The global scale of another tool's NVFP4 scales is no power of two, so its reciprocal, which a QuantTensor holds,
    is rounded: such weights are exact to the last bit of float32 only.
    """

    files: frozenset[Path] = frozenset()

    def __init__(self, directory: str | Path) -> None:
        self.directory: Path = Path(directory)
        self._files = SafetensorsSource(directory)
        self._stored = self._files.info()
        self._config = _quantization_config(self.directory)
        self._scaled = [name.removesuffix(".weight_scale") for name in self._stored if name.endswith(".weight_scale")]
        self._weights = {module: self._weight(module) for module in self._scaled if self._holds_codes(module)}

    def info(self) -> dict[str, TensorInfo]:
        found, hidden = {}, set(self._activation_tensors())
        for module, (layout, spec, shape) in self._weights.items():
            hidden |= {f"{module}.{part}" for part in layout.needed(spec.symmetric)}
            found[f"{module}.weight"] = TensorInfo(shape, torch.float32)
        return {name: info for name, info in self._stored.items() if name not in hidden} | found

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return {
            name: self.read_quantized(name).dequantize(dtype or torch.float32)
            if name.removesuffix(".weight") in self._weights
            else self._files.read([name], dtype)[name]
            for name in names
        }

    def read_quantized(self, name: str) -> QuantTensor:
        """The QuantTensor of one weight."""
        module = name.removesuffix(".weight")
        layout, spec, _ = self._weights[module]
        return layout.decode(self._tensors(module, layout.needed(spec.symmetric)), spec)

    def activations(self) -> dict[str, QuantizedActivation]:
        """Quantized inputs by MODULE.input, and what is quantized inside attention by ATTENTION_MODULE.key, .value,
        .query. CheckpointError for activations that fewbit cannot quantize as the checkpoint says."""
        found = {}
        for module in self._scaled:
            group = self._group(module)
            if group.get("output_activations"):
                raise CheckpointError(
                    f"{self.directory}: {module!r} has quantized outputs, which this fewbit cannot read"
                )
            if group.get("input_activations"):
                found[f"{module}.input"] = self._activation(module, "input", group["input_activations"])
        return found | self._attention()

    def fingerprint(self) -> str:
        return self._files.fingerprint()

    def _attention(self) -> dict[str, QuantizedActivation]:
        cache: Args | None = self._config.get("kv_cache_scheme")
        found = {}
        for name in self._activation_tensors():
            module, _, part = name.rpartition(".")
            slot = next((slot for slot, prefix in ATTENTION_SLOTS.items() if part == f"{prefix}_scale"), None)
            if slot is not None:
                args = self._group(module, attention=True).get("input_activations") or cache
                if args is None:
                    raise CheckpointError(f"{self.directory} holds {name!r}, but its config has no kv_cache_scheme")
                found[f"{module}.{slot}"] = self._activation(module, slot, args)
        if cache is not None and not found:
            raise CheckpointError(
                f"{self.directory}: the config has a kv_cache_scheme, but there are no k_scale tensors"
            )
        return found

    def _activation(self, module: str, slot: str, args: Args) -> QuantizedActivation:
        names = (f"{PREFIXES[slot]}_{part}" for part in PARTS)
        stored = [name for name in names if f"{module}.{name}" in self._stored]
        with naming(f"{self.directory}: '{module}.{slot}': ", CheckpointError):
            return decode_activation(self._tensors(module, stored), activation_spec(args), slot)

    def _activation_tensors(self) -> Iterator[str]:
        """Stored tensors that belong to activations."""
        parts = {f"{prefix}_{part}" for prefix in PREFIXES.values() for part in PARTS}
        return (name for name in self._stored if name.rpartition(".")[2] in parts)

    def _tensors(self, module: str, parts: Iterable[str]) -> Tensors:
        names = {part: f"{module}.{part}" for part in parts}
        tensors = self._files.read(names.values())
        return {part: tensors[name] for part, name in names.items()}

    def _holds_codes(self, module: str) -> bool:
        """False for a weight that was saved again after it was decompressed: it is floats, its scale is a leftover."""
        return (weight := self._stored.get(f"{module}.weight")) is None or weight.dtype not in FLOAT_DTYPES

    def _group(self, module: str, attention: bool = False) -> Args:
        """The config group that an engine picks for a linear or an attention module: by name, by pattern, then
        by class; of several with one target the last."""
        groups: list[Args] = self._config["config_groups"].values()
        targets = {t: group for group in groups if bool(group.get("weights")) != attention for t in group["targets"]}
        if module in targets:
            return targets[module]
        for pattern in sorted(target for target in targets if target.startswith("re:")):
            if matching(pattern, (module,), whole=False):
                return targets[pattern]
        classes = {target: group for target, group in targets.items() if re.fullmatch("[A-Z][A-Za-z0-9_]*", target)}
        return classes.get("Linear") or next(iter(classes.values()), {})

    def _weight(self, module: str) -> tuple[Layout, QuantizationSpec, tuple[int, int]]:
        """Layout, spec and shape of a quantized weight; the stored tensors must be those that the config promises."""
        group = self._group(module)
        if not group:
            raise CheckpointError(f"{self.directory}: no config group describes the stored weight of {module!r}")
        with naming(f"{self.directory}: {module!r}: ", CheckpointError):
            spec = weight_spec(group["weights"])
            layout = self._layout(group, spec)
            for part in layout.needed(spec.symmetric):
                if f"{module}.{part}" not in self._stored:
                    raise CheckpointError(f"{part} is missing, which {layout.name} needs")
            if f"{module}.weight_g_idx" in self._stored:
                raise CheckpointError("weight_g_idx reorders its inputs, which this fewbit cannot read")
            shape = self._shape(module, layout)
            expected, stored = spec.tiling.scale_shape(shape), self._stored[f"{module}.weight_scale"].shape
            if torch.Size(expected).numel() != torch.Size(stored).numel():
                raise CheckpointError(f"weight_scale is {tuple(stored)}, its config group says {expected}")
        return layout, spec, shape

    def _layout(self, group: Args, spec: QuantizationSpec) -> Layout:
        """By the group's format, that of the whole checkpoint, or what the spec suggests."""
        name = group.get("format") or self._config.get("format")
        if name in (None, MIXED):
            inputs = group.get("input_activations")
            return layout_for(spec, activation_spec(inputs) if inputs else None)
        if name not in LAYOUTS:
            raise CheckpointError(f"format {name!r} cannot be read; this fewbit reads {', '.join(LAYOUTS)}")
        return LAYOUTS[name]

    def _shape(self, module: str, layout: Layout) -> tuple[int, int]:
        if layout.stored_bits is None:
            rows, columns = self._tensors(module, ["weight_shape"])["weight_shape"].tolist()
            return int(rows), int(columns)
        rows, stored = self._stored[f"{module}.{layout.parts[0]}"].shape
        return rows, stored * 8 // layout.stored_bits


def _quantization_config(directory: Path) -> dict[str, Any]:
    """CheckpointError for one that cannot be read, or that rotates activations while the model runs."""
    config = quantization_of(read_config(directory), directory) or {}
    if not isinstance(config.get("config_groups"), dict):
        raise CheckpointError(f"{directory}: quantization_config in config.json has no config_groups")
    for name, group in config["config_groups"].items():
        if not isinstance(group, dict):
            raise CheckpointError(
                f"{directory}: config group {name!r} is a preset's name; this fewbit reads whole groups"
            )
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"{directory}: targets of config group {name!r} are {shown(targets)}, not names")
    try:
        rotations = ((config.get("transform_config") or {}).get("config_groups") or {}).items()
        places = {str(name): {str(apply.get("location")) for apply in by.get("apply", [])} for name, by in rotations}
    except (AttributeError, TypeError):
        raise CheckpointError(f"{directory}: transform_config in config.json is no table of rotations") from None
    for name, found in places.items():
        if found.intersection(("input", "output", "k_cache", "q_attn")):
            raise CheckpointError(
                f"{directory} rotates activations while it runs ({name}), which this fewbit cannot read"
            )
    return config
