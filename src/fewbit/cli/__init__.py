"""The command line: one file per verb. Thin: parse, call the library, print."""

from __future__ import annotations

import importlib
import sys

import typer

from fewbit.errors import FewbitError, is_disk_full
from fewbit.version import __version__

VERBS = ("quantize", "export", "verify", "evaluate", "inspect", "schemes", "demo_model")


def build_app() -> typer.Typer:
    """The typer application with every verb of VERBS."""
    app = typer.Typer(
        name="fewbit",
        help="Quantize large language models after training, measure what it cost, export and verify.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for verb in VERBS:
        module = importlib.import_module(f"fewbit.cli.{verb}")
        app.command(verb.replace("_", "-"))(getattr(module, verb))
    return app


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", callback=lambda v: _version(v), is_eager=True
    ),
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: what a user can mend is one sentence on stderr and exit code 2."""
    try:
        build_app()()
    except FewbitError as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        if not is_disk_full(error):
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}")
        _fail(f"the disk is full: {error.filename or 'a file'} could not be written; free some space and try again")
    except KeyboardInterrupt:
        typer.echo("fewbit: interrupted; the same command with --resume continues the run", err=True)
        sys.exit(130)


def _fail(sentence: str) -> None:
    typer.echo(f"fewbit: {sentence}", err=True)
    sys.exit(2)
