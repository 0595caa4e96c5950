"""Which configuration applies to which module: exclude > exact name > pattern in order > type > global.

A pattern is a module's name, a shell-style wildcard ("*.v_proj") or a regular expression after "re:" (matched against
the whole name). Matching is strict: what matches nothing is an error, because it is a typing mistake.
"""

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
    exact = [name for name in config.layer_quant_config if name in modules]
    types = set(modules.values())
    rules = [(names, Match(None, f"exclude {pattern!r}")) for pattern, names in excluded.items()]
    rules += [({name}, Match(config.layer_quant_config[name], "exact name")) for name in exact]
    for pattern, names in named.items():
        rules.append((names, Match(config.layer_quant_config[pattern], f"pattern {pattern!r}")))
    for kind, found in config.layer_type_quant_config.items():
        if kind not in types:
            raise ConfigError(f"layer_type_quant_config: no module is of class {kind!r}{nearest(kind, types)}")
        rules.append(({name for name in modules if modules[name] == kind}, Match(found, f"type {kind}")))
    matches = dict.fromkeys(modules, Match(config.global_quant_config, "global"))
    for names, match in reversed(rules):
        matches |= dict.fromkeys(names, match)
    return matches


def _covered(patterns: Iterable[str], modules: Mapping[str, str], field: str) -> dict[str, set[str]]:
    """The modules that each pattern covers, in the patterns' order; ConfigError for one that covers none."""
    covered = {}
    for pattern in patterns:
        covered[pattern] = matching(pattern, modules)
        if not covered[pattern]:
            raise ConfigError(f"{field}: {shown(pattern)} matches no module{nearest(pattern, modules)}")
    return covered
