"""Tensors in nested structures, such as the arguments of modules."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(value: Any, device: torch.device) -> Any:
    """The structure with every tensor on a device."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def map_tensors(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """The structure with `change` applied to every tensor (or object of another `kind`)."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change, kind) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, change, kind) for item in value)
    return value


def of_kind(value: Any, kind: type) -> Iterator[Any]:
    """Everything of a kind in the structure."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from of_kind(item, kind)
