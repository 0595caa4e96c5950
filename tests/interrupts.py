"""Ctrl-C at every line of fewbit's code that an action runs through, one after another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fewbit

SOURCE = str(Path(fewbit.__file__).parent)


def interrupted(
    make: Callable[[], Any], act: Callable[[Any], object], files: tuple[str, ...], every: int = 1
) -> Iterator[Any]:
    """For each (or every nth) line that `act` runs in those of fewbit's files whose path contains one of `files`: what
    `make` makes, after `act` of it was interrupted there. Ends when `act` runs to its end."""
    point, finished = 0, False
    while not finished:
        model, left = make(), point

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            name = frame.f_code.co_filename
            if not name.startswith(SOURCE) or not any(part in name[len(SOURCE) :] for part in files):
                return None
            if event == "line":
                if left == 0:
                    left = -1
                    sys.settrace(None)
                    raise KeyboardInterrupt
                left -= 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            act(model)
            finished = left >= 0
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if not finished:
            yield model
        point += every


def snapshot(model: Any) -> dict[str, Any]:
    """Which objects a model is made of, what they hold, and in which mode they are."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        attributes = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        found[name] = (id(module), type(module), repr(sorted(attributes)), module.training, *map(len, hooks))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name}()"] = (id(tensor), tensor.dtype, tensor.data_ptr(), tensor.requires_grad)
    found["implementation"] = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return found
