"""Progress on the terminal: blocks done, stage, error so far, time left, peak memory."""

import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from fewbit.errors import RunError, disk_errors_as_sentences
from fewbit.files import kind
from fewbit.runs.report import peak_memory

logger = logging.getLogger("fewbit")


class ProgressView:
    """Receives the events of a run; shows nothing and logs warnings, which are printed if no log is set up."""

    def start(self, blocks: int, done: int) -> None: ...
    def stage(self, block: int, name: str) -> None: ...
    def block_done(self, block: int, loss: float | None) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...
    def warn(self, text: str) -> None:
        logger.warning(text)


class ShownProgress(ProgressView):
    """Shows warnings; logs them only if a log is set up."""

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")
        if logger.hasHandlers():
            logger.warning(text)


class TerminalProgress(ShownProgress):
    """A live bar."""

    def __init__(self, console: Console) -> None:
        count = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[detail]}")
        self._bar = Progress(*count, TimeElapsedColumn(), "left", TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("blocks", detail="", total=None)
        self._loss = ""

    def start(self, blocks: int, done: int) -> None:
        self._bar.reset(self._task, total=blocks, completed=0)
        self._bar.start()

    def stage(self, block: int, name: str) -> None:
        self._bar.update(self._task, detail=f"{name}{self._loss}{_memory()}")

    def block_done(self, block: int, loss: float | None) -> None:
        if loss is not None:
            self._loss = f" · error {loss:.2e}"
        self._bar.update(self._task, completed=block + 1)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._bar.stop()


class PlainProgress(ShownProgress):
    """One line per block, for logs and pipes."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def start(self, blocks: int, done: int) -> None:
        self._blocks, self._kept, self._started = blocks, 0, time.monotonic()

    def block_done(self, block: int, loss: float | None) -> None:
        if loss is None:  # a kept block goes by quickly: the time left is estimated from the others
            self._kept, self._started = block + 1, time.monotonic()
            self.note(f"block {block + 1}/{self._blocks} · kept from before")
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / (block + 1 - self._kept) * (self._blocks - block - 1)
        self.note(
            f"block {block + 1}/{self._blocks} · error {loss:.3e} · {elapsed:.0f} s, {left:.0f} s left{_memory()}"
        )

    def note(self, text: str) -> None:
        if (stream := self._stream) is not None:
            encoding = stream.encoding or "utf-8"
            with suppress(OSError, ValueError):  # a closed pipe must not end the run
                stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
                stream.flush()


def progress_view(show: bool) -> ProgressView:
    """A live bar on a terminal, plain lines elsewhere, nothing if not `show`. Everything goes to stderr."""
    if not show:
        return ProgressView()
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else PlainProgress(sys.stderr)


def setup_logging(path: str | Path, level: int = logging.INFO) -> None:
    """Log to a file, every layer's quantization error included; its directory is made if needed.

    RunError if the file cannot be written.
    """
    if (path := Path(path)).exists() and not path.is_file():  # a pipe would be waited for
        raise RunError(f"the log cannot be written: {path} is {kind(path)}, not a file; choose another place")
    with disk_errors_as_sentences(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for other in list(logger.handlers):  # a notebook's cell that runs again
        if isinstance(other, logging.FileHandler) and other.baseFilename == handler.baseFilename:
            logger.removeHandler(other)
            other.close()
    logger.addHandler(handler)
    logger.setLevel(level)


def _memory() -> str:
    return f" · peak {peak_memory() / 2**30:.2f} GiB"
