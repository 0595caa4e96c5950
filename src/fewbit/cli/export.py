"""fewbit export RUN --format F --output DIR"""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    format: Annotated[str, typer.Option(help="Target format, e.g. compressed-tensors.")],
    output: Annotated[Path | None, typer.Option(help="Directory to write (default RUN/exports/FORMAT).")] = None,
) -> None:
    """Write a finished run in the format of an engine."""
    from fewbit.formats import export as write_export
    from fewbit.formats import export_directory
    from fewbit.formats.verification import read_origin

    target = write_export(run, format, output or export_directory(run, format))
    typer.echo(target)
    for note in read_origin(target).notes:
        typer.echo(f"note: {note}", err=True)
