"""fewbit evaluate MODEL|RUN|DIR --text FILE"""

import json
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.options import options_of

_OPTIONS = options_of("fewbit.config.run_options", "ComputeOptions", "EvaluationOptions")


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint, model id, run, or compressed-tensors export.")],
    text: Annotated[
        Path,
        typer.Option(help="Text file, or rows (.jsonl, .json, .csv, .parquet); not the one used for calibration."),
    ],
    sequence_length: Annotated[int | None, _OPTIONS["sequence_length"]] = None,
    max_windows: Annotated[int | None, _OPTIONS["max_windows"]] = None,
    against: Annotated[
        str | None, typer.Option(help="Reference model: adds KL divergence and top-1 agreement.")
    ] = None,
    device: Annotated[str | None, _OPTIONS["device"]] = None,
    activation_memory: Annotated[str | None, _OPTIONS["activation_memory"]] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, and the distance to a reference model, block by block for models larger than memory."""
    from fewbit.evaluation import evaluate as run_evaluation

    given = {name: value for name, value in context.params.items() if value is not None and name != "as_json"}
    result = run_evaluation(**given)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    windows = f"{result.windows} windows of {result.sequence_length} tokens"
    typer.echo(f"perplexity         {result.perplexity:.4f}   ({windows})")
    if result.reference_perplexity is not None:
        typer.echo(f"reference          {result.reference_perplexity:.4f}")
        kl = f"{result.kl_mean:.5f} mean, {result.kl_p99:.5f} 99th percentile"
        typer.echo(f"KL divergence      {kl} (nats per token)")
        typer.echo(f"top-1 agreement    {result.top1_agreement:.2%}")
