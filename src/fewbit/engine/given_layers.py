"""What a user's list of layers holds, checked before anything is changed."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fewbit.checkpoint.names import full_name
from fewbit.config.algorithms import ALGORITHMS, AlgorithmConfig
from fewbit.config.matching import matching
from fewbit.config.schemes import scheme_config
from fewbit.config.spec import QuantizationConfig, QuantizationSpec
from fewbit.engine.layer_stack import LayerStack
from fewbit.errors import ArchitectureError, ConfigError, nearest
from fewbit.models.forward_manager import LayerForwardManager
from fewbit.models.untouched import Untouched, sentence, untouched
from fewbit.nn import in_memory

logger = logging.getLogger("fewbit")


def understood(
    spec: Any, config: Any, both: type[Any], methods: type[AlgorithmConfig]
) -> tuple[QuantizationConfig, Any]:
    """How linears are quantized, and the method, by a user's words; None for a method that is not said.

    `both` is the class of objects that hold both, `methods` what a method may be. ConfigError for anything else.
    """
    if isinstance(spec, both):
        if config is not None:
            raise ConfigError(f"{both.__name__} holds the method's options; leave config out")
        return spec.quantization, spec.algorithm
    if config is not None and not isinstance(config, methods):
        known = " or ".join(found.__name__ for found in ALGORITHMS.values() if issubclass(found, methods))
        raise ConfigError(f"config is {known}, not {type(config).__name__}")
    if isinstance(spec, AlgorithmConfig):
        raise ConfigError(
            f"{type(spec).__name__} says nothing of bits; give a spec before it, or a {both.__name__} for both"
        )
    chosen = scheme_config(spec) if isinstance(spec, str) else spec
    if isinstance(spec, QuantizationSpec):
        chosen = QuantizationConfig(weight=spec)
    if not isinstance(chosen, QuantizationConfig) or chosen.weight is None:
        raise ConfigError(
            "spec says how weights are quantized: a QuantizationSpec, a QuantizationConfig with weight, a scheme's "
            f"name or a {both.__name__}, not {type(spec).__name__}"
        )
    return chosen, config


def stack_of(
    layers: Iterable[nn.Module],
    spec: QuantizationSpec,
    exclude: Sequence[str],
    prefix: str,
    forward: LayerForwardManager,
) -> LayerStack:
    """Layers for quantization by `spec`. FewbitError for what cannot be honoured."""
    spec.check_stored("the layers' weights")
    stack = [in_memory.unwrapped(layer) for layer in layers]
    root = f"{prefix}." if prefix else ""
    left = _no_linears(stack, root)
    linears = _linears(stack, root, exclude, left)
    _say_what_stays([one for one in left if not any(_covers(pattern, one) for pattern in exclude)])
    _check_shapes(linears, spec)
    return LayerStack(stack, root, [list(within) for within in linears], forward)


def _linears(
    layers: Sequence[nn.Module], root: str, exclude: Sequence[str], left: Sequence[Untouched]
) -> list[dict[str, nn.Linear]]:
    """Per layer its linears by full name. ConfigError for a pattern that matches none."""
    found = [
        {
            full_name(f"{root}{index}.", name): module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        for index, layer in enumerate(layers)
    ]
    everything = [name for linears in found for name in linears]
    if not everything:
        raise ArchitectureError("there is no linear in the layers, so there is nothing to quantize")
    covered = {pattern: matching(pattern, everything) for pattern in exclude}
    excluded = set().union(*covered.values())
    owners: dict[int, str] = {}
    for name, linear in (item for linears in found for item in linears.items()):
        if name not in excluded:
            in_memory.check_weight(linear, name)
        if (first := owners.setdefault(id(linear.weight), name)) != name:
            raise ConfigError(
                f"{first!r} and {name!r} have one weight, which cannot be quantized for two inputs; give them copies"
            )
    for pattern, names in covered.items():
        if not names and not any(_covers(pattern, one) for one in left):
            raise ConfigError(f"exclude: {pattern!r} matches no linear{nearest(pattern, everything)}")
    return [{name: linear for name, linear in linears.items() if name not in excluded} for linears in found]


def _no_linears(layers: Sequence[nn.Module], root: str) -> list[Untouched]:
    """Matrices of the layers that are no linears, by their full names."""
    stack = nn.ModuleList(layers)
    linears = [name for name, module in stack.named_modules() if isinstance(module, nn.Linear)]
    return [replace(one, name=root + one.name) for one in untouched(stack, linears)]


def _covers(pattern: str, one: Untouched) -> bool:
    """Whether an exclude pattern means this tensor, its module, or one that this is in."""
    parts = one.name.split(".")
    return bool(matching(pattern, [".".join(parts[:end]) for end in range(2, len(parts) + 1)]))


def _say_what_stays(left: Sequence[Untouched]) -> None:
    """ConfigError for stacks of matrices, such as experts in one tensor; a warning for others."""
    stacked = [one for one in left if len(one.shape) == 3 and min(one.shape) > 1 and not one.kind.startswith("Conv")]
    if stacked:
        raise ConfigError(
            f"{sentence(stacked)}; stacks of matrices (experts in one tensor) cannot be quantized here, so say "
            "that they stay: exclude=[…] with their names or wildcards"
        )
    if left:
        logger.warning(sentence(left))


def _check_shapes(linears: Sequence[Mapping[str, nn.Linear]], spec: QuantizationSpec) -> None:
    """ConfigError for the first linear that the spec's groups or blocks do not divide."""
    for name, linear in (item for within in linears for item in within.items()):
        try:
            spec.tiling.scale_shape(tuple(linear.weight.shape))
        except ValueError as error:
            raise ConfigError(f"{name!r} cannot be quantized: {error}; choose another size, or exclude it") from None
