"""The quantization_config of config.json, and what is refused before anything is written.

The commonest group of linears is said by class, the others name their modules. Exact names win over classes. A query
is a group of its own that targets attention modules and implies key and value; the KV cache is said once for all
layers, and its scales lie beside the attention module.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fewbit.config.spec import QuantizationSpec
from fewbit.errors import ConfigError
from fewbit.export.compressed_tensors.layouts import Layout
from fewbit.export.compressed_tensors.scheme import Args, activation_args, attention_args, layout_for, weight_args

NAME = "compressed-tensors"
MIXED = "mixed-precision"
DENSE = "dense"
LINEAR = "Linear"
ATTENTION_SLOTS = {"key": "k", "value": "v", "query": "q"}
"""Slots of an attention module and the prefixes of their tensors."""
Specs = Mapping[str, QuantizationSpec]


def check(weights: Specs, activations: Specs | None = None) -> None:
    """ConfigError for what the format cannot hold.

    `weights` by their names, `activations` by module and slot (MODULE.input, ATTENTION_MODULE.key, …).
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


def quantization_config(weights: Specs, activations: Specs, ignore: Iterable[str]) -> dict[str, Any]:
    """What config.json says, with as few keys as readers need. `ignore`: linears that stay as they are."""
    by_size = sorted(groups(weights, activations).items(), key=lambda item: len(item[1]))
    entries = [{"targets": names} | json.loads(entry) for entry, names in by_size]
    formats = {entry["format"] for entry in entries}
    if entries:
        entries[-1]["targets"] = [LINEAR]
    cache, _, queries = kv_cache(activations)
    if queries:
        entries.append({"targets": queries, "input_activations": cache, "format": DENSE})
    config = {
        "quant_method": NAME,
        "format": MIXED if len(formats) > 1 else next(iter(formats), DENSE),
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)},
        "ignore": list(ignore),
    }
    return config if cache is None else config | {"kv_cache_scheme": cache}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors raised inside say whose they are."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{NAME}: {name!r} has {error}") from None
