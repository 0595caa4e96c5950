"""fewbit: quantize large language models after training.

The names that `__init__.pyi` lists are imported when they are first used: `fewbit --help` need not wait for torch.
"""

import ast
from importlib import import_module
from importlib.resources import files
from typing import Any

from fewbit.version import __version__ as __version__

_HOME = {
    name.name: statement.module
    for statement in ast.parse(files("fewbit").joinpath("__init__.pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom) and statement.module is not None
    for name in statement.names
}
"""Where each name is: fewbit's modules are in `fewbit` itself."""

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    home = _HOME[name]
    return import_module(f"fewbit.{name}") if home == "fewbit" else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
