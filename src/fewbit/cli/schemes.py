"""fewbit schemes"""

from __future__ import annotations


def schemes() -> None:
    """List the named schemes: what they are, bits per weight, where they can be exported to."""
    from rich.console import Console
    from rich.table import Table

    from fewbit.config.schemes import SCHEMES

    table = Table(box=None)
    for column in ("scheme", "weight", "group", "symmetric", "bits/weight", "exports", "engines"):
        table.add_column(column)
    for scheme in SCHEMES.values():
        spec = scheme.config.weight
        assert spec is not None
        table.add_row(
            scheme.name,
            spec.dtype,
            str(spec.group_size),
            "yes" if spec.symmetric else "no",
            f"{scheme.bits_per_weight:.3f}",
            ", ".join(scheme.exports),
            scheme.engines,
        )
    Console(width=None if Console().is_terminal else 110).print(table)
