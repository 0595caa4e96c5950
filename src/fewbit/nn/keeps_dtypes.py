"""Scales have the dtype that they are stored in; `model.half()` must not round them once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn


class KeepsDtypes(nn.Module):
    """A module whose own buffers move between devices but keep their dtype. Its parameters, like its children, follow
    `.to(dtype)` as usual."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self
