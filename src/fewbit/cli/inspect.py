"""fewbit inspect MODEL"""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or a model id of the hub.")],
    scheme: Annotated[str | None, typer.Option(help="Show what this scheme would make of the model.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Group size for --scheme.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Show what this recipe would make of the model.")] = None,
) -> None:
    """Show architecture, groups of linears and sizes, before any work."""
    from collections import Counter

    from fewbit.config.recipe import Config, merge_recipe
    from fewbit.errors import ConfigError
    from fewbit.models.untouched import sentence
    from fewbit.runs.inspection import inspect as look
    from fewbit.runs.report import attention_row

    if scheme is None and recipe is None and group_size is not None:
        raise ConfigError("--group-size works only together with --scheme or --recipe")
    base = Config.read_yaml(recipe) if recipe is not None else None
    asked = scheme is not None or recipe is not None
    found = look(model, merge_recipe(base, scheme=scheme, group_size=group_size) if asked else None)
    typer.echo(f"architecture   {found.architecture.name}{' (detected)' if found.architecture.detected else ''}")
    typer.echo(f"blocks         {found.blocks} in {found.architecture.blocks}")
    for number, group in enumerate(found.groups, start=1):
        members = ", ".join(f"{n} [{o} × {i}]" for n, (o, i) in group.items())
        typer.echo(f"  stage {number}      {members}")
    share = found.parameters_in_linears / found.parameters
    typer.echo(f"parameters     {found.parameters:,} ({share:.0%} in the linears above)")
    typer.echo(
        f"stored         {_size(found.bytes_stored)}; largest block {_size(found.bytes_largest_block)} as float32"
    )
    if found.untouched:
        typer.echo(f"left alone     {sentence(found.untouched)}")
    if found.plan is None or found.bytes_quantized is None:
        return
    counts = Counter(
        (linear.status, linear.weight.dtype if linear.weight else linear.reason)
        for linear in found.plan.contents.linears.values()
    )
    for (status, what), count in sorted(counts.items()):
        typer.echo(f"{status:14} {count} linears: {what}")
    if (row := attention_row(found.plan.contents)) is not None:
        inside = ", ".join(f"{slot} {words}" for slot, words in row.items() if slot != "modules")
        typer.echo(f"{'attention':14} {row['modules']} modules: {inside}")
    ratio = found.bytes_stored / found.bytes_quantized
    typer.echo(f"would store    {_size(found.bytes_quantized)} ({ratio:.2f}× smaller)")
    said = sentence(found.untouched) if found.untouched else None
    for warning in found.plan.warnings:
        if warning != said:
            typer.echo(f"warning        {warning}")


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
