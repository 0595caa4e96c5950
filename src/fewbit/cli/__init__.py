"""The command line: one file per verb. Thin: parse, call the library, print."""

import importlib
import io
import os
import shlex
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from fewbit.errors import FewbitError, is_disk_full
from fewbit.version import __version__

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal."""
LONGEST = 2000
"""Characters of an error message, which may quote very long names."""
WRITING = ("export", "demo_model")
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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


_VERSION = typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)


def _options(version: Annotated[bool, _VERSION] = False) -> None:
    pass


def main() -> None:
    """Entry point. An error that the user can fix is one sentence on stderr, with exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a question mark for what its encoding lacks, instead of failing
    try:
        try:
            os.getcwd()
        except OSError:
            _fail("the working directory does not exist any more; change into another one")
        build_app()()
    except FewbitError as error:
        _fail(str(error))
    except OSError as error:
        if is_disk_full(error):
            where = error.filename or "a file"
            _fail(f"the disk is full: {where} could not be written; free some space and try again")
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)):
            raise
        _fail("out of memory; close other programs, or use a machine with more memory")
    except (SystemExit, KeyboardInterrupt) as left:
        if isinstance(left, SystemExit) and left.code != INTERRUPTED:
            raise
        _say(_interrupted(sys.argv[1:]))
        sys.exit(INTERRUPTED)


def _interrupted(arguments: list[str]) -> str:
    """What Ctrl-C left, and the command that goes on."""
    verb = arguments[0].replace("-", "_") if arguments else ""
    if verb in VERBS and verb != "quantize":
        kept = "its output is complete or absent" if verb in WRITING else "nothing was lost"
        return f"interrupted; {kept}; start again with: {shlex.join(['fewbit', *arguments])}"
    from fewbit.cli.quantize import interrupted

    return interrupted(arguments)


def _fail(sentence: str) -> NoReturn:
    _say(sentence)
    sys.exit(2)


def _say(sentence: str) -> None:
    words = " ".join(sentence.split())
    with suppress(OSError, ValueError):  # stderr is closed
        typer.echo(f"fewbit: {words if len(words) <= LONGEST else words[: LONGEST - 1] + '…'}", err=True)
