"""Changes of a user's model: collected first, made all at once, and undone as one if what follows fails.

    changes = Exchange()
    changes.replace(model, {linear: quantized, …})
    changes.commit()                   # the model is as it was before this line and as it will be after it
    with changes.undone_on_error(): …

A commit is one call into C: neither Ctrl-C nor another thread comes between its steps, so no module computes in a
model that is half one thing and half another.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.nn.in_memory import DISPATCH

_CARRIED = ("_forward_hooks", "_forward_pre_hooks", "_backward_", "_is_full_backward_hook")
"""How the attributes begin that hold a module's hooks on what it computes. They go along, as the same dictionaries, so
that their handles still work."""
INSTANCES = ("forward", "_old_forward", DISPATCH)
"""What accelerate's hook puts on an instance."""

_set_data = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]


class Exchange:
    """A list of changes. Nothing happens before `commit`."""

    def __init__(self) -> None:
        self._first: list[tuple[Any, str, Any, Any]] = []
        self._steps: list[partial[Any]] = []
        self._back: list[partial[Any]] = []

    def item(self, mapping: dict[Any, Any], key: Any, value: Any) -> None:
        """mapping[key] becomes value. Attributes are items of `vars(module)`, children of `module._modules`."""
        write = partial(operator.setitem, mapping, key)
        self._steps.append(partial(write, value))
        self._back.append(partial(write, mapping[key]) if key in mapping else partial(mapping.pop, key, None))

    def include(self, other: Exchange) -> None:
        """The changes of another one, too."""
        self._first += other._first
        self._steps += other._steps
        self._back += other._back

    def replace(self, model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
        """Modules below `model` are replaced by others wherever they are used."""
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None and child in made:
                    self.item(parent._modules, name, made[child])

    def data(self, tensor: Tensor, values: Tensor) -> None:
        """A parameter or buffer, which stays the same object, holds other values (same shape and device)."""
        if tensor.is_inference() and not values.is_inference():  # made in inference mode, it can hold no others
            with torch.inference_mode():
                values = values.clone()
        self._steps.append(partial(_set_data, tensor, values))
        self._back.append(partial(_set_data, tensor, tensor.data))

    def beforehand(self, owner: Any, name: str, value: Any) -> None:
        """owner.name becomes value before everything else: for what is no plain attribute, and changes nothing that is
        computed as long as the rest is not there."""
        self._first.append((owner, name, value, getattr(owner, name)))

    def commit(self) -> None:
        """Make all changes, or none if something is raised."""
        try:
            for owner, name, value, _ in self._first:
                setattr(owner, name, value)
            _call_all(self._steps)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Everything is again as it was when it was collected."""
        _call_all(self._back[::-1])
        for owner, name, _, before in self._first[::-1]:
            setattr(owner, name, before)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Commit; if anything is raised inside, Ctrl-C included, undo."""
        try:
            try:
                self.commit()
                yield
            except BaseException:
                self.undo()
                raise
        except BaseException:  # Ctrl-C may come while an error is being dealt with, too
            self.undo()
            raise

    @contextmanager
    def for_now(self) -> Iterator[None]:
        """Commit, and undo at the end, whatever happens."""
        with self.undone_on_error():
            yield
            self.undo()


def _call_all(calls: list[partial[Any]]) -> None:
    """One after another without a step of Python in between: `deque`, `map`, `call` and `partial` are C."""
    deque(map(operator.call, calls), maxlen=0)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """A module that takes another's place gets its hooks, training mode, and accelerate's moving between devices."""
    vars(new).update({name: value for name, value in vars(old).items() if name.startswith(_CARRIED)})
    if (dispatch := getattr(old, DISPATCH, None)) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, dispatch)
    new.train(old.training)
