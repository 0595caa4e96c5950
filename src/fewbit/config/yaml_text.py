"""YAML that a user, or anyone, wrote: plain data or a sentence, in seconds and in little memory.

A text of a few hundred bytes can name a list ten thousand million long by anchors in anchors, nest deeper than Python
recurses, or name a Python object. So the text is first read as a stream of events, which costs what its length costs,
and only what is small is made into data. A field that is given twice is an error: one of the two is a mistake.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fewbit.errors import ConfigError, shown
from fewbit.files import read_text

LARGEST = 2**20
"""Bytes. A recipe with a rule for each linear of a model with 100 blocks has a tenth of that."""
MOST_NODES = 50_000
"""Values, those that anchors repeat counted as often as they are repeated."""
DEEPEST = 50
LONGEST_VALUE = 5000


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. ConfigError for one that is damaged, or that is too large in any way."""
    try:
        text = read_text(path, LARGEST, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"recipe {error}") from None
    return parse_yaml(text, f"recipe {path}")


def parse_yaml(text: str, what: str) -> Any:
    """What a YAML text holds; errors name it as `what`."""
    try:
        _check_size(text, what)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())[:300]}") from None
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except Exception as error:  # SafeLoader's constructors raise almost anything for dates, numbers and tags
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ConfigError(f"{what} holds a value that cannot be read ({reason})") from None


def _check_size(text: str, what: str) -> None:
    """ConfigError if what the text stands for, anchors written out, is large or nests deeply."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"the anchor {event.anchor!r} is used before it is complete")
            _add(open_nodes, sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST_VALUE:
                raise ConfigError(f"it holds a value of more than {LONGEST_VALUE} characters, which no recipe does")
            _add(open_nodes, 1)
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > DEEPEST:
                raise ConfigError(f"it nests more than {DEEPEST} levels deep, which no recipe does")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size
            _add(open_nodes, size)


def _add(open_nodes: list[tuple[str | None, int]], size: int) -> None:
    anchor, before = open_nodes[-1]
    if before + size > MOST_NODES:
        raise ConfigError(f"it stands for more than {MOST_NODES} values (anchors written out), which no recipe needs")
    open_nodes[-1] = anchor, before + size


class _Loader(yaml.SafeLoader):
    """Plain data; a field that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # the base class says so
            if key in found:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"the field {shown(key)} is given twice (again in line {line}); leave one out")
            found.add(key)
        return super().construct_mapping(node, deep)
