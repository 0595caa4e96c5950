"""The quantization_config of config.json, and what is refused before anything is written.

One kind of linears is said by class. Several are said by patterns that match their modules alone, because readers
disagree whether a class or the parts of a fused linear go first (see targets.py). A query is a group of its own that
targets one class of attention modules, as vLLM looks for it, and implies key and value; the KV cache is said once for
all layers, and its scales lie beside the attention module.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.formats.compressed_tensors import targets
from fewbit.formats.compressed_tensors.layouts import Layout
from fewbit.formats.compressed_tensors.scheme import Args, activation_args, attention_args, layout_for, weight_args

NAME = "compressed-tensors"
MIXED = "mixed-precision"
DENSE = "dense"
LINEAR = "Linear"
ATTENTION_SLOTS = {"key": "k", "value": "v", "query": "q"}
"""Slots of an attention module and the prefixes of their tensors."""
Specs = Mapping[str, QuantizationSpec]


def check(
    weights: Specs, activations: Specs | None = None, shapes: Mapping[str, tuple[int, int]] | None = None
) -> None:
    """ConfigError for what the format cannot hold.

    `weights` and their `shapes` by their names, `activations` by module and slot (MODULE.input, ATTENTION_MODULE.key).
    """
    activations = activations or {}
    groups(weights, activations)
    for name, spec in activations.items():
        module, _, slot = name.rpartition(".")
        if slot == "input" and f"{module}.weight" not in weights:
            raise ConfigError(f"{NAME}: {name!r} is quantized but the module's weight is not; the format needs both")
        if slot not in ("input", *ATTENTION_SLOTS):
            raise ConfigError(f"{NAME}: {name!r} ({spec.dtype}) cannot be exported; inputs, keys, values, queries can")
    kv_cache(activations)
    _check_blocks(weights, shapes or {})


def _check_blocks(weights: Specs, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Readers put the scales of fused linears one below the other, so the first ones' rows must be whole blocks."""
    for name, (rows, _) in shapes.items():
        size = weights[name].block_size
        if size is None or rows % size[0] == 0:
            continue
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        for parts in targets.FUSED.values():
            there = [part for part in parts if f"{owner}.{part}.weight" in weights]
            if last in there and (last != there[-1] or ".experts." in name) and len(there) > 1:
                raise ConfigError(
                    f"{NAME}: blocks of {size[0]} rows do not divide the {rows} of {name!r}, which engines fuse with "
                    f"{(there[-1] if last != there[-1] else there[0])!r}; use FP8_DYNAMIC (a scale per channel) there"
                )


def groups(weights: Specs, activations: Specs) -> dict[str, list[str]]:
    """Names of the modules of each kind: {canonical JSON of its entry without targets: module names}."""
    modules = defaultdict(list)
    for name, spec in weights.items():
        module = name.removesuffix(".weight")
        if module == name:
            raise ConfigError(f"{NAME}: {name!r} is quantized; the format holds quantized weights of linears only")
        with _naming(name):
            entry = module_entry(spec, activations.get(f"{module}.input"))
        modules[json.dumps(entry, sort_keys=True)].append(module)
    return modules


def module_entry(weight: QuantizationSpec, activation: QuantizationSpec | None) -> Args:
    """The config group of a module, without its targets."""
    layout = layout_for(weight, activation)
    entry: Args = {"weights": weight_args(weight), "format": layout.name}
    if activation is not None:
        entry["input_activations"] = activation_args(activation)
    return entry


def layout_of(name: str, weight: QuantizationSpec, activations: Specs) -> Layout:
    """Layout of the weight `name`."""
    return layout_for(weight, activations.get(f"{name.removesuffix('.weight')}.input"))


def kv_cache(activations: Specs) -> tuple[Args | None, list[str], list[str]]:
    """The entry of the KV cache (None if it is not quantized), the attention modules that have one, and those whose
    query is quantized, too. The format has one entry for all."""
    slots: dict[str, dict[str, Args]] = defaultdict(dict)
    for name, spec in activations.items():
        module, _, slot = name.rpartition(".")
        if slot in ATTENTION_SLOTS:
            with _naming(name):
                slots[module][slot] = attention_args(spec)
    entry: Args | None = None
    for module, found in slots.items():
        if "key" not in found or "value" not in found:
            lost = "key" if "key" not in found else "value"
            raise ConfigError(f"{NAME}: {module!r} has no quantized {lost}; the format quantizes key and value alike")
        for slot, args in found.items():
            if args != (entry := entry or args):
                raise ConfigError(
                    f"{NAME}: '{module}.{slot}' differs from other keys, values or queries; give all one spec"
                )
    return entry, list(slots), [module for module, found in slots.items() if "query" in found]


def quantization_config(
    weights: Specs, activations: Specs, ignore: Iterable[str], classes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What config.json says, with as few keys as readers need.

    `ignore`: modules that stay as they are, by name or pattern. `classes`: those of the attention modules, by name.
    """
    ignore = list(ignore)
    kinds = sorted(groups(weights, activations).items(), key=lambda item: len(item[1]))
    entries = [{"targets": targets.patterns(names)} | json.loads(entry) for entry, names in kinds]
    if len(entries) == 1:
        entries[0]["targets"] = [LINEAR]
    formats = {entry["format"] for entry in entries}
    cache, _, queries = kv_cache(activations)
    for name in _query_classes(queries, classes or {}):
        entries.append({"targets": [name], "input_activations": cache, "format": DENSE})
    config = {
        "quant_method": NAME,
        "format": MIXED if len(formats) > 1 else next(iter(formats), DENSE),
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)},
        "ignore": ignore,
    }
    return config if cache is None else config | {"kv_cache_scheme": cache}


def _query_classes(queries: list[str], classes: Mapping[str, str]) -> list[str]:
    """Classes of the attention modules with quantized queries; all modules of a class must have them."""
    for name in queries:
        if name not in classes:
            raise ConfigError(
                f"{NAME}: the run does not say the class of {name!r}, by which readers look for quantized queries; "
                "quantize the model again"
            )
    found = sorted({classes[name] for name in queries})
    for name, kind in classes.items():
        if kind in found and name not in queries:
            raise ConfigError(
                f"{NAME}: the query of {name!r} is not quantized, those of other {kind} modules are; readers know the "
                "class only, so quantize all or none"
            )
    return found


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors raised inside say whose they are."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{NAME}: {name!r} has {error}") from None
