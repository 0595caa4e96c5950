"""Which configuration applies to which module: exclude > exact name > pattern in order > type > global.

A pattern is a module's name, a shell-style wildcard ("*.v_proj") or a regular expression after "re:" (matched against
the whole name). Matching is strict: what matches nothing is an error, because it is a typing mistake.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import regex

from fewbit.config.recipe import Config
from fewbit.config.spec import QuantizationConfig
from fewbit.errors import ConfigError, nearest, shown

LONGEST_PATTERN = 2000
MOST_REPEATS = 10_000
SECONDS = 2.0
"""CPU time of one pattern on all names; ordinary ones take milliseconds."""


@dataclass(frozen=True)
class Match:
    """The configuration of one module and the rule that gave it; `config` None means it stays as it is."""

    config: QuantizationConfig | None
    rule: str


def matching(pattern: str, names: Iterable[str], whole: bool = True) -> set[str]:
    """Module names that a name, wildcard or "re:" pattern matches. Expressions match the `whole` name or its start.

    ConfigError for an invalid pattern and for catastrophic backtracking: Python's `re` has no timeout, so `regex` (a
    dependency of transformers, too) does the matching, in the syntax of `re`.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ConfigError(f"the pattern {shown(pattern, 60)} is longer than {LONGEST_PATTERN} characters; split it")
    if not pattern.startswith("re:"):
        return {name for name in names if fnmatchcase(name, pattern)}
    compiled, found, left = _compiled(pattern), set(), SECONDS
    match = compiled.fullmatch if whole else compiled.match
    for name in names:
        started = time.process_time()
        try:
            if match(name, timeout=left) is not None:
                found.add(name)
        except TimeoutError:
            left = 0.0
        left -= time.process_time() - started
        if left <= 0:
            raise ConfigError(
                f"the pattern {shown(pattern)} takes too long on {name!r}; avoid nested repetitions such as (a*)*"
            )
    return found


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    expression = pattern.removeprefix("re:")
    repeats = math.prod(max(1, int(most)) for most in re.findall(r"\{(?:\d*,)?(\d+)\}", expression))
    if repeats > MOST_REPEATS:  # they are written out when compiled, those inside others multiplied
        raise ConfigError(f"the pattern {shown(pattern)} counts up to {repeats:.0e} repetitions; make it simpler")
    try:
        re.compile(expression)  # whose syntax is promised
        return regex.compile(re.sub(r"(?<!\\)\{(?![\d,]+\})", r"\\{", expression))  # regex means more by braces
    except (re.error, regex.error) as error:
        raise ConfigError(f"pattern {shown(pattern)} is not a regular expression: {error}") from None
    except (RecursionError, OverflowError, MemoryError, ValueError):
        raise ConfigError(f"the pattern {shown(pattern)} is too large or nests too deeply; make it simpler") from None


def resolve(config: Config, modules: Mapping[str, str]) -> dict[str, Match]:
    """The configuration of every module, given {module name: class name}.

    Raises ConfigError for a pattern or type that matches no module.
    """
    excluded = _covered(config.exclude, modules, "exclude")
    named = _covered(config.layer_quant_config, modules, "layer_quant_config")
    types = set(modules.values())
    for layer_type in config.layer_type_quant_config:
        if layer_type not in types:
            raise ConfigError(
                f"layer_type_quant_config: no module is of class {layer_type!r}{nearest(layer_type, types)}"
            )
    return {name: _resolve_one(config, name, kind, excluded, named) for name, kind in modules.items()}


def _resolve_one(
    config: Config, name: str, layer_type: str, excluded: Mapping[str, set[str]], named: Mapping[str, set[str]]
) -> Match:
    for pattern, names in excluded.items():
        if name in names:
            return Match(None, f"exclude {pattern!r}")
    if name in config.layer_quant_config:
        return Match(config.layer_quant_config[name], "exact name")
    for pattern, names in named.items():
        if name in names:
            return Match(config.layer_quant_config[pattern], f"pattern {pattern!r}")
    if layer_type in config.layer_type_quant_config:
        return Match(config.layer_type_quant_config[layer_type], f"type {layer_type}")
    return Match(config.global_quant_config, "global")


def _covered(patterns: Iterable[str], modules: Mapping[str, str], field: str) -> dict[str, set[str]]:
    """The modules that each pattern covers, in the patterns' order; ConfigError for one that covers none."""
    covered = {}
    for pattern in patterns:
        covered[pattern] = matching(pattern, modules)
        if not covered[pattern]:
            raise ConfigError(f"{field}: {shown(pattern)} matches no module{nearest(pattern, modules)}")
    return covered
