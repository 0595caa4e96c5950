"""fewbit evaluate MODEL|RUN|DIR --text FILE"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint, model id, run, or compressed-tensors export.")],
    text: Annotated[
        Path,
        typer.Option(help="Text file, or rows (.jsonl, .json, .csv, .parquet); not the one used for calibration."),
    ],
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Use only the first windows of the text.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Reference model: adds KL divergence and top-1 agreement.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    activation_memory: Annotated[str, typer.Option(help="Memory for hidden states; the rest goes to disk.")] = "4GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity, and the distance to a reference model, block by block for models larger than memory."""
    from fewbit.evaluation import evaluate as run_evaluation

    result = run_evaluation(
        model,
        text,
        sequence_length=sequence_length,
        max_windows=max_windows,
        against=against,
        device=device,
        activation_memory=activation_memory,
    )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    typer.echo(
        f"perplexity         {result.perplexity:.4f}   ({result.windows} windows of {result.sequence_length} tokens)"
    )
    if result.reference_perplexity is not None:
        typer.echo(f"reference          {result.reference_perplexity:.4f}")
        typer.echo(
            f"KL divergence      {result.kl_mean:.5f} mean, {result.kl_p99:.5f} 99th percentile (nats per token)"
        )
        typer.echo(f"top-1 agreement    {result.top1_agreement:.2%}")
