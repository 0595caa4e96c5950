"""Matrices that stay in full precision because they are neither known linears nor embeddings.

Experts in one tensor, transposed convolutions, recurrent cells, torch's own attention, bare parameters: the user is
warned of them, with their share of the parameters.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Untouched:
    """A tensor that stays as it is."""

    name: str
    module: str
    """Name of the module that holds it."""
    kind: str
    """Class of that module."""
    shape: tuple[int, ...]
    weights: int
    """Number of its elements."""
    share: float
    """Of all the model's parameters."""

    @property
    def row(self) -> dict[str, Any]:
        """The report's line."""
        return {name: value for name, value in vars(self).items() if name != "module"}


def untouched(model: nn.Module, handled: Collection[str]) -> list[Untouched]:
    """Tensors of two or more dimensions that stay as they are, in a model with or without weights.

    Args:
        handled: names of modules that are quantized or excluded, with all below them.

    Embeddings are looked up, not multiplied by, and do not count; nor do vectors, whatever their shape.
    """
    total = sum(parameter.numel() for parameter in model.parameters()) or 1
    known = set(handled)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    seen = {id(tensor) for module in embeddings for _, tensor in _own(module)}  # a tied head is one of them
    found = []
    for name, module in model.named_modules():
        if _handled(name, known):
            continue
        for leaf, tensor in _own(module):
            shape = tuple(tensor.shape)
            if id(tensor) in seen or tensor.numel() == max(shape, default=0):
                continue
            seen.add(id(tensor))
            full = f"{name}.{leaf}" if name else leaf
            found.append(Untouched(full, name, type(module).__name__, shape, tensor.numel(), tensor.numel() / total))
    return found


def sentence(found: Collection[Untouched]) -> str:
    """All of it in one line: like tensors of several layers together, the largest first."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Untouched]] = {}
    for one in found:
        alike.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", one.name), one.kind, one.shape), []).append(one)
    largest = sorted(alike.items(), key=lambda item: -sum(one.share for one in item[1]))
    kinds = []
    for (pattern, kind, shape), members in largest:
        name, count = (members[0].name, "") if len(members) == 1 else (pattern, f"{len(members)} of ")
        share = sum(one.share for one in members)
        kinds.append(f"{name} ({kind}, {count}{' × '.join(map(str, shape))}, {share:.1%})")
    more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
    one_only = "1 tensor that is no linear stays as it is"
    what = one_only if len(found) == 1 else f"{len(found)} tensors that are no linears stay as they are"
    return f"{what}, {sum(one.share for one in found):.1%} of the parameters: {', '.join(kinds[:8])}{more}"


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own floats that are stored and have two or more dimensions."""
    passing = module._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in module._buffers.items() if name not in passing}
    for name, tensor in (module._parameters | buffers).items():
        if tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.ndim > 1 and tensor.is_floating_point():
            yield name, tensor


def _handled(name: str, known: Collection[str]) -> bool:
    """Whether a module or one of its parents is known."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in known for end in range(1, len(parts) + 1))
