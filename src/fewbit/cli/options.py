"""Options whose help is the docstring under a field of a configuration class.

The docstrings are read from the source, because importing these classes imports torch.
"""

import ast
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer


def options_of(module: str, *classes: str) -> dict[str, Any]:
    """A typer.Option for every field with a docstring of some classes of a module; the help says a plain default."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    found = {}
    for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ClassDef) and statement.name in classes:
            for field, below in pairwise(statement.body):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    name, help = ast.unparse(field.target), " ".join(ast.literal_eval(below.value).split())
                    default = field.value.value if isinstance(field.value, ast.Constant) else None
                    if isinstance(default, str | int) and not isinstance(default, bool):
                        help = f"{help.removesuffix('.')} (default {default})."
                    found[name] = typer.Option("--" + name.replace("_", "-"), help=help)
    return found
