"""Untrusted YAML, read in bounded time and memory.

With nested anchors, a few hundred bytes can expand to billions of values; YAML can also nest deeper than Python
recurses, or name Python objects. So the text is first parsed as a stream of events, in linear time, and built only if
what it expands to is small. A field given twice is an error.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fewbit.errors import ConfigError, shown
from fewbit.files import read_text

LARGEST = 2**20
"""Bytes; ten times a recipe with a rule for each linear of 100 blocks."""
MOST_NODES = 50_000
"""Values with anchors expanded."""
DEEPEST = 50
LONGEST_VALUE = 5000


def read_yaml(path: Path) -> Any:
    """The data of a YAML file; ConfigError if it is damaged or too large in any way."""
    try:
        text = read_text(path, LARGEST, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"recipe {error}") from None
    return parse_yaml(text, f"recipe {path}")


def parse_yaml(text: str, what: str) -> Any:
    """The data of a YAML text, which errors call `what`."""
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
    """ConfigError if the text, with anchors expanded, is large or nests deeply."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"the anchor {event.anchor!r} is used before it is complete")
            _add(open_nodes, sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST_VALUE:
                raise ConfigError(f"it holds a value of more than {LONGEST_VALUE} characters, which no recipe needs")
            _add(open_nodes, 1)
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > DEEPEST:
                raise ConfigError(f"it nests more than {DEEPEST} levels deep, which no recipe needs")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size
            _add(open_nodes, size)


def _add(open_nodes: list[tuple[str | None, int]], size: int) -> None:
    anchor, before = open_nodes[-1]
    if before + size > MOST_NODES:
        raise ConfigError(f"it expands to more than {MOST_NODES} values, which no recipe needs")
    open_nodes[-1] = anchor, before + size


class _Loader(yaml.SafeLoader):
    """Plain data; duplicate fields are errors."""

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
