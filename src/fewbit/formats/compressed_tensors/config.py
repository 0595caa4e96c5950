"""The quantization_config of config.json, and what is refused before anything is written.

One kind of linears is said by class. Several are said by patterns that match their modules alone, because engines
disagree whether a class or the parts of a fused linear go first (see targets.py). A query is a group of its own that
targets one class of attention modules, as vLLM looks for it, and implies key and value; the KV cache is said once for
all layers, and its scales lie beside the attention module.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fewbit.contents import Contents, LinearEntry
from fewbit.errors import CheckpointError, ConfigError, FewbitError
from fewbit.formats.compressed_tensors import targets
from fewbit.formats.compressed_tensors.layouts import Layout
from fewbit.formats.compressed_tensors.scheme import Args, activation_args, attention_args, layout_for, weight_args

NAME = "compressed-tensors"
MIXED = "mixed-precision"
DENSE = "dense"
LINEAR = "Linear"
ATTENTION_SLOTS = {"key": "k", "value": "v", "query": "q"}
"""Slots of an attention module and the prefixes of their tensors."""


def check(contents: Contents) -> None:
    """ConfigError for what the format cannot hold."""
    groups(contents)
    for linear in contents.linears.values():
        if linear.steps:
            raise ConfigError(
                f"{NAME}: the input of {linear.name!r} takes the step {linear.steps[0]!r} while the model runs, which "
                "the format cannot say"
            )
        if linear.input is not None and linear.weight is None:
            raise ConfigError(
                f"{NAME}: '{linear.name}.input' is quantized but the module's weight is not; the format needs both"
            )
    for name, spec in contents.activations.items():
        if name.rpartition(".")[2] not in ("input", *ATTENTION_SLOTS):
            raise ConfigError(f"{NAME}: {name!r} ({spec.dtype}) cannot be exported; inputs, keys, values, queries can")
    kv_cache(contents)
    query_classes(contents)
    if (cut := contents.cut_block()) is not None:  # engines put the scales of fused linears one below the other
        linear, other = cut
        raise ConfigError(
            f"{NAME}: blocks of {linear.block_rows} rows do not divide the {linear.shape[0]} of "
            f"{linear.weight_name!r}, which engines fuse with {other.role or other.name!r}; use FP8_DYNAMIC (a scale "
            "per channel) there"
        )


def groups(contents: Contents) -> dict[str, list[str]]:
    """Names of the linears of each kind: {canonical JSON of its entry without targets: names}. Block by block."""
    found = defaultdict(list)
    for linear in sorted(contents.weights, key=lambda linear: (linear.block or 0, linear.name)):
        with naming(f"{NAME}: {linear.weight_name!r} has "):
            found[json.dumps(group_entry(linear), sort_keys=True)].append(linear.name)
    return found


def group_entry(linear: LinearEntry) -> Args:
    """The config group of a linear, without its targets."""
    assert linear.weight is not None
    entry: Args = {"format": layout_of(linear).name, "weights": weight_args(linear.weight)}
    return entry if linear.input is None else entry | {"input_activations": activation_args(linear.input)}


def layout_of(linear: LinearEntry) -> Layout:
    """How the weight of a linear lies. ConfigError if the format has no way."""
    assert linear.weight is not None
    return layout_for(linear.weight, linear.input)


def kv_cache(contents: Contents) -> Args | None:
    """The entry of the KV cache, None if it is not quantized. The format has one for all layers, and quantized queries
    are like keys and values. ConfigError for what it cannot say."""
    entry: Args | None = None
    for module in contents.attention.values():
        found = {}
        for slot in (slot for slot in ATTENTION_SLOTS if slot in module.specs):
            with naming(f"{NAME}: '{module.name}.{slot}' has "):
                found[slot] = attention_args(module.specs[slot])
        if found and (lost := [slot for slot in ("key", "value") if slot not in found]):
            raise ConfigError(
                f"{NAME}: {module.name!r} has no quantized {lost[0]}; the format quantizes key and value alike"
            )
        for slot, args in found.items():
            if args != (entry := entry or args):
                raise ConfigError(
                    f"{NAME}: '{module.name}.{slot}' differs from other keys, values or queries; give all one spec"
                )
    if entry is not None and (bare := [name for name, module in contents.attention.items() if not module.specs]):
        raise ConfigError(f"{NAME}: the KV cache of {bare[0]!r} is not quantized; the format has all layers' or none")
    return entry


def quantization_config(contents: Contents) -> dict[str, Any]:
    """What config.json says, with as few keys as engines need."""
    kinds = sorted(groups(contents).items(), key=lambda item: len(item[1]))
    entries = [{"targets": targets.patterns(names)} | json.loads(entry) for entry, names in kinds]
    if len(entries) == 1:
        entries[0]["targets"] = [LINEAR]
    formats = {entry["format"] for entry in entries}
    cache = kv_cache(contents)
    for kind in query_classes(contents):
        entries.append({"targets": [kind], "input_activations": cache, "format": DENSE})
    config = {
        "quant_method": NAME,
        "format": MIXED if len(formats) > 1 else next(iter(formats), DENSE),
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)},
        "ignore": left_alone(contents),
    }
    return config if cache is None else config | {"kv_cache_scheme": cache}


def left_alone(contents: Contents) -> list[str]:
    """Modules that engines must not take for quantized, by name or pattern.

    Those are linears that stay as they are, and what engines have linears for although transformers has none: routers,
    and experts in one tensor, which they look for by the names of single experts.
    """
    names = list(contents.unquantized)
    for name, shape in contents.others.items():
        module, _, last = name.rpartition(".")
        if last == "weight":
            names.append(module)
        elif len(shape) == 3:
            names += [module, f"re:{re.escape(module)}\\..*"]
    return list(dict.fromkeys(names))


def query_classes(contents: Contents) -> list[str]:
    """Classes of the attention modules with quantized queries; all modules of a class must have them."""
    found = sorted({module.kind for module in contents.attention.values() if "query" in module.specs})
    for module in contents.attention.values():
        if module.kind in found and "query" not in module.specs:
            raise ConfigError(
                f"{NAME}: the query of {module.name!r} is not quantized, those of other {module.kind} modules are; "
                "engines know the class only, so quantize all or none"
            )
    return found


@contextmanager
def naming(whose: str, kind: type[FewbitError] = ConfigError) -> Iterator[None]:
    """Errors raised inside begin with `whose` they are."""
    try:
        yield
    except (CheckpointError, ConfigError, ValueError) as error:
        raise kind(f"{whose}{error}") from None
