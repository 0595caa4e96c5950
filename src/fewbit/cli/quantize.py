"""fewbit quantize MODEL --output RUN"""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli.options import options_of

_RECIPE = options_of("fewbit.config.recipe", "ShortForms", "CalibrationConfig", "Config")
_RUN = options_of("fewbit.config.run_options", "ComputeOptions", "RunOptions")


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or a model id of the hub.")],
    output: Annotated[
        Path, typer.Option(help="Directory of the run: quantized checkpoint, journal, report, exports.")
    ],
    recipe: Annotated[Path | None, typer.Option(help="YAML recipe; options given here override its fields.")] = None,
    scheme: Annotated[str | None, _RECIPE["scheme"]] = None,
    group_size: Annotated[int | None, _RECIPE["group_size"]] = None,
    algorithm: Annotated[str | None, _RECIPE["algorithm"]] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, rows with text or messages (.jsonl, .json, .csv, .parquet), or hub:DATASET; 'none' for "
            "rtn without data. Default: a text that ships with fewbit."
        ),
    ] = None,
    num_samples: Annotated[int | None, _RECIPE["num_samples"]] = None,
    sequence_length: Annotated[int | None, _RECIPE["sequence_length"]] = None,
    seed: Annotated[int | None, _RECIPE["seed"]] = None,
    device: Annotated[str | None, _RUN["device"]] = None,
    activation_memory: Annotated[str | None, _RUN["activation_memory"]] = None,
    resume: Annotated[bool | None, _RUN["resume"]] = None,
    export: Annotated[list[str] | None, _RUN["export"]] = None,
    log: Annotated[Path | None, typer.Option(help="File for a log with every layer's error.")] = None,
) -> None:
    """Quantize a model out of core: calibrate, quantize block by block, report, export."""
    from fewbit.api import quantize as run_quantization
    from fewbit.config.recipe import Config
    from fewbit.errors import ConfigError
    from fewbit.formats import export_directory
    from fewbit.formats.verification import read_origin
    from fewbit.runs.progress import setup_logging

    if recipe is None and scheme is None:
        raise ConfigError("give --scheme W4A16 (or another: 'fewbit schemes' lists them), or --recipe FILE")
    if log is not None:
        setup_logging(log)
    given = {name: value for name, value in context.params.items() if value is not None}
    given["config"] = Config.read_yaml(recipe) if recipe is not None else None
    run = run_quantization(**{name: value for name, value in given.items() if name not in ("recipe", "log")})
    _print_summary(run.report)
    for name in export or []:
        target = export_directory(output, name)
        typer.echo(f"export     {target}")
        for note in read_origin(target).notes:
            typer.echo(f"note       {note}")
    typer.echo(f"report     {output / 'report.json'}")


def interrupted(arguments: list[str]) -> str:
    """What an interrupted run kept, and the command that resumes it."""
    from fewbit.checkpoint.journal import Journal
    from fewbit.errors import FewbitError

    again = ["fewbit", *arguments]
    given = [value for value in again if value.startswith("--output=")]
    after = [again[at + 1] for at, value in enumerate(again[:-1]) if value == "--output"]
    output = Path(after[-1] if after else given[-1].removeprefix("--output=") if given else ".")
    begun, resumed, blocks = (output / "fewbit.json").exists(), "--resume" in again, 0
    with suppress(FewbitError, OSError):
        blocks = len(Journal(output).blocks()) if begun else 0
    command = shlex.join(again if resumed or not begun else [*again, "--resume"])
    if blocks == 0 and not resumed:
        return f"interrupted before a block was finished; start again with: {command}"
    kept = "1 finished block is" if blocks == 1 else f"{blocks} finished blocks are"
    return f"interrupted; {kept} kept in {output}; go on with: {command}"


def _print_summary(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fewbit.runs.report import bits_per_weight

    totals = report["totals"]
    algorithms = " + ".join(config["name"] for config in report["recipe"]["algo_config"])
    table = Table(title=escape(f"{report['run']['model']} · {algorithms}"), title_justify="left")
    for column in ("linear", "count", "loss mean", "loss worst", "worst in block", "bits/weight", "seconds"):
        table.add_column(column, justify="left" if column == "linear" else "right")
    quantized = [row for row in report["linears"] if row["status"] == "quantized"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in quantized:
        kinds.setdefault(row["name"].rpartition(".")[2], []).append(row)
    for kind, rows in kinds.items():
        worst = max(rows, key=lambda row: row["loss"])
        table.add_row(
            escape(kind),
            str(len(rows)),
            f"{sum(row['loss'] for row in rows) / len(rows):.2e}",
            f"{worst['loss']:.2e}",
            str(worst["block"]),
            f"{bits_per_weight(rows):.3f}",
            f"{sum(row['seconds'] for row in rows):.1f}",
        )
    console = Console(soft_wrap=False, width=None if Console().is_terminal else 110)
    console.print(table)
    if (attention := report["attention"]) is not None:
        inside = ", ".join(f"{slot} {words}" for slot, words in attention.items() if slot != "modules")
        typer.echo(f"attention  {attention['modules']} modules ({inside})")
    others = [row for row in report["linears"] if row["status"] != "quantized"]
    lines = [f"{row['status']:10} {row['name']} ({row['reason']})" for row in others]
    lines += [f"fallback   {row['name']} ({row['fallback']})" for row in quantized if row["fallback"]]
    for line in [*lines, *(f"warning    {warning}" for warning in report["warnings"])]:
        typer.echo(line)
    counts = ", ".join(f"{count} {status}" for status, count in totals["linears"].items())
    seconds, peak = totals["seconds"]["total"], totals["peak_memory_bytes"] / 2**30
    bits = totals["bits_per_weight"]
    weights = f"{bits:.3f} bits per weight · loss {totals['loss']:.2e}" if bits is not None else "weights as they are"
    typer.echo(f"total      {counts or 'no linear'} · {weights} · {seconds:.0f} s · peak {peak:.2f} GiB")
