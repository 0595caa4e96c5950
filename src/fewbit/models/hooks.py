"""Hooks on a user's modules, removed whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_at_the_end() -> Iterator[list[RemovableHandle]]:
    """A list for the handles of hooks, all of which are removed at the end."""
    handles: list[RemovableHandle] = []
    try:
        try:
            yield handles
        finally:
            for handle in handles:
                handle.remove()
    except BaseException:  # Ctrl-C may have come between two of them
        for handle in handles:
            handle.remove()
        raise
