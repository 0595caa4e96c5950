"""fewbit verify DIR"""

from pathlib import Path
from typing import Annotated

import typer


def verify(
    directory: Annotated[Path, typer.Argument(help="An export, or a run with exports.")],
    run: Annotated[Path | None, typer.Option(help="The run, if the export was moved away from it.")] = None,
) -> None:
    """Decode every tensor of an export with its engine's own library and compare it with the run, exactly."""
    from fewbit.formats import verify as verify_exports

    for result in verify_exports(directory, run):
        typer.echo(
            f"{result.directory}: {result.quantized} quantized and {result.dense} plain tensors"
            f"{f' and {result.activations} quantized activations' if result.activations else ''} equal the run's "
            f"(decoded by {result.decoder})"
        )
