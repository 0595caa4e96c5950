"""The state of the process on which results could depend: set apart while fewbit works, restored afterwards.

Serving code sets a default dtype, training code runs under autocast, notebooks set a default device. What fewbit
computes for the same input must not depend on any of that, so every entry point runs inside `neutral()`.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

lock = threading.RLock()
"""Held, shortly, by code that no two threads may run at a time, such as building a transformers model from its config
(which sets the default dtype). Written `process.lock`, since a fork makes a new one."""


@dataclass(frozen=True)
class _Setting:
    """Something that all threads share."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    wanted: Callable[[Any], Any]
    """From what was found to what it has to be."""


def _exact(backend: Any) -> _Setting:
    """Products of float32 are products of float32; torch.set_float32_matmul_precision can make bf16 of them."""
    get, set_ = partial(getattr, backend, "fp32_precision"), partial(setattr, backend, "fp32_precision")
    return _Setting(get, set_, lambda found: "ieee" if found in ("bf16", "tf32") else found)


_mkldnn: Any = torch.backends.mkldnn
_SETTINGS = (
    _Setting(torch.get_default_dtype, torch.set_default_dtype, lambda _: torch.float32),
    _exact(_mkldnn.matmul),
    _exact(_mkldnn.conv),
    _exact(torch.backends.cuda.matmul),
)
_users: set[object] = set()
_found: dict[_Setting, Any] = {}
_guard = threading.RLock()  # of the two above


@contextmanager
def neutral(default_device: bool = True) -> Iterator[None]:
    """As a context or a decorator (`@neutral()`): the default dtype is float32, tensors are made on the CPU, float32
    is multiplied as float32, autocast, inference mode and gradients are off. Everything is restored at the end.

    Deterministic algorithms stay as they are: fewbit's results are the same with and without them.

    Args:
        default_device: False leaves it as it is, for what calls a user's own modules: their forward may count on it.

    torch has one default dtype for all threads. Where it is another than float32, other threads see float32 meanwhile.
    """
    with ExitStack() as stack:
        stack.enter_context(_shared())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", _accelerator()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if default_device and torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _shared() -> Iterator[None]:
    """What all threads share is set by the first that comes in and restored by the last that leaves."""
    me = object()
    try:
        with _guard:
            _users.add(me)
            for setting in _SETTINGS:
                found = setting.get()
                if found != setting.wanted(found):
                    _found.setdefault(setting, found)
                    setting.set(setting.wanted(found))
        yield
    finally:
        with _guard:
            _users.discard(me)
            if not _users:
                while _found:
                    setting, found = _found.popitem()
                    setting.set(found)


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def _after_fork() -> None:
    """A lock that another thread held when the process forked would be held in the child for ever."""
    global lock, _guard
    lock, _guard = threading.RLock(), threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
