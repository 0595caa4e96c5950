"""Modules whose parameters have no memory, while buffers (rotary frequencies …) are computed for real.

accelerate's init_empty_weights replaces a method of nn.Module for that, and so takes the weights of modules that other
threads make meanwhile. Here torch's own hook is told which thread wants it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_thread = threading.local()


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters of modules that this thread makes inside are on the meta device."""
    before = getattr(_thread, "wanted", False)
    _thread.wanted = True
    try:
        yield
    finally:
        _thread.wanted = before


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta or not getattr(_thread, "wanted", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


# Never removed: removing a hook while another thread iterates over the hooks would raise there.
register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]
