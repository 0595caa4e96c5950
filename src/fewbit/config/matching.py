"""Which configuration applies to which module: exclude > exact name > pattern in order > type > global.

A pattern is a module's name, a shell-style wildcard ("*.v_proj") or a regular expression after "re:" (matched against
the whole name). Matching is strict: what matches nothing is an error, because it is a typing mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fewbit.config.recipe import Config
from fewbit.config.spec import QuantizationConfig
from fewbit.errors import ConfigError, nearest


@dataclass(frozen=True)
class Match:
    """The configuration of one module and the rule that gave it; `config` None means it stays as it is."""

    config: QuantizationConfig | None
    rule: str


def matches(pattern: str, name: str) -> bool:
    """Whether a name, wildcard or "re:" pattern covers the module name."""
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return fnmatchcase(name, pattern)


def resolve(config: Config, modules: Mapping[str, str]) -> dict[str, Match]:
    """The configuration of every module, given {module name: class name}.

    Raises ConfigError for a pattern or type that matches no module.
    """
    _check_patterns(config.exclude, modules, "exclude")
    _check_patterns(config.layer_quant_config, modules, "layer_quant_config")
    types = set(modules.values())
    for layer_type in config.layer_type_quant_config:
        if layer_type not in types:
            raise ConfigError(
                f"layer_type_quant_config names {layer_type!r}, which no module is{nearest(layer_type, types)}"
            )
    return {name: _resolve_one(config, name, layer_type) for name, layer_type in modules.items()}


def _resolve_one(config: Config, name: str, layer_type: str) -> Match:
    for pattern in config.exclude:
        if matches(pattern, name):
            return Match(None, f"exclude {pattern!r}")
    if name in config.layer_quant_config:
        return Match(config.layer_quant_config[name], "exact name")
    for pattern, quant in config.layer_quant_config.items():
        if matches(pattern, name):
            return Match(quant, f"pattern {pattern!r}")
    if layer_type in config.layer_type_quant_config:
        return Match(config.layer_type_quant_config[layer_type], f"type {layer_type}")
    return Match(config.global_quant_config, "global")


def _check_patterns(patterns: Iterable[str], modules: Mapping[str, str], field: str) -> None:
    for pattern in patterns:
        if not any(matches(pattern, name) for name in modules):
            raise ConfigError(f"{field}: {pattern!r} matches no module{nearest(pattern, modules)[:300]}")
