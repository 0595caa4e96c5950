"""A run's directory: locked while in use, described by a manifest; on a resume its journal decides what is done."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoint.journal import JOURNAL, FinishedBlock, Journal
from fewbit.checkpoint.native import MANIFEST, block_file, read_manifest, write_manifest
from fewbit.errors import CheckpointError, RunError, disk_errors_as_sentences
from fewbit.files import destination
from fewbit.runs.report import REPORT
from fewbit.safetensors_file import file_digest, has_digest
from fewbit.scratch import Lock, Scratch, is_scratch, lock_file, sweep

LOCK = ".lock"
BLOCKS = "blocks"
EXPORTS = "exports"


@dataclass(frozen=True)
class Identity:
    """What a run's bytes depend on. A resumed run must have the same."""

    recipe: dict[str, Any]
    model: str
    calibration: str
    version: str
    libraries: dict[str, str]
    """Versions of the libraries that compute: others may round differently."""
    num_blocks: int
    contents: dict[str, Any]
    """`facts` of the plan's contents."""

    def differences(self, manifest: dict[str, Any]) -> list[str]:
        """The differences from the run that wrote `manifest`, in words."""
        found = []
        if manifest.get("model") != self.model:
            found.append("another model (or its weights changed)")
        if manifest.get("calibration") != self.calibration:
            found.append("other calibration data or another seed")
        then = {"fewbit": manifest.get("version")} | (manifest.get("libraries") or {})
        for name, before, now in _changes(then, {"fewbit": self.version} | self.libraries):
            found.append(f"{name} {before} before, {now} now")
        for key, before, now in _changes(manifest.get("recipe") or {}, self.recipe):
            found.append(f"recipe field {key!r}: {_short(before)} before, {_short(now)} now")
        if manifest.get("num_blocks") != self.num_blocks:
            found.append(f"{manifest.get('num_blocks')} blocks before, {self.num_blocks} now")
        if manifest.get("contents") != self.contents and not found:
            found.append("other linears that stay as they are, or that engines fuse")
        return found


class RunDirectory:
    """Open for one run at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._place = destination(self.path, "the output")
        self._lock: Lock | None = None
        self._created = False
        self._journal = Journal(self._place)
        self._before: dict[int, FinishedBlock] = {}
        self.damaged: list[str] = []
        """Blocks that were damaged and are quantized again, for the progress view and the report."""

    def refuse(self, resume: bool) -> None:
        """RunError if the directory cannot be used: asked before the work, so that `open` does not fail after it."""
        if (self._place / MANIFEST).exists():
            if not resume:
                raise RunError(
                    f"{self.path} already holds a run; use --resume to continue it or choose another directory"
                )
        elif self._place.exists() and any(self._foreign_files()):
            raise RunError(f"{self.path} is not empty and holds no fewbit run; choose another output directory")
        nearest = next(path for path in (self._place, *self._place.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise RunError(
                f"{self.path} cannot be written: {nearest} is not writable; choose another output directory"
            )

    def open(self, identity: Identity, resume: bool) -> None:
        """Create the directory, or continue in it. RunError if it is in use, not empty, or of another run."""
        self.refuse(resume)
        with disk_errors_as_sentences(self.path):
            self._created = not self._place.exists()
            self._place.mkdir(parents=True, exist_ok=True)
            busy = f"{self.path} is in use by another run; wait for it or choose another output directory"
            self._lock = lock_file(self._place / LOCK, busy)
        for place in (self._place, self._place / BLOCKS):
            sweep(place)
        if (self._place / MANIFEST).exists():
            self.refuse(resume)  # another run may have begun while this one waited for the lock
            try:
                manifest = read_manifest(self._place)
            except CheckpointError as error:
                raise RunError(str(error)) from None
            if differences := identity.differences(manifest):
                raise RunError(
                    f"{self.path} cannot be resumed: {'; '.join(differences)}; "
                    "use the original settings or a new directory"
                )
            self._refuse_changed()
            return
        write_manifest(self._place, vars(identity))

    def _refuse_changed(self) -> None:
        """RunError if a file of a complete run is not what the run wrote: it may have been changed on purpose, so it
        is not overwritten. In an interrupted run it is made again."""
        if not (self._place / REPORT).exists():
            return
        known = {block_file(self._place, number): block.digest for number, block in self._journal.blocks().items()}
        known |= {self._place / name: digest for name, digest in self._journal.files().items()}
        for file, digest in known.items():
            if file.exists() and not has_digest(file, digest):
                raise RunError(
                    f"{file} is not what the run wrote, though the run was complete: it was damaged or changed; "
                    "remove it, and the same command with --resume makes it again"
                )

    def finished_blocks(self) -> dict[int, list[dict[str, Any]]]:
        """Report rows by block number, of blocks whose files match the journal; the others are in `damaged`."""
        self._before = self._journal.blocks()
        finished = {}
        for number, block in self._before.items():
            file = block_file(self._place, number)
            if not file.is_file():
                self.damaged.append(f"{file.name} is missing and was made again")
            elif not has_digest(file, block.digest):
                self.damaged.append(f"{file.name} is damaged (it is not what the run wrote) and was made again")
            else:
                finished[number] = block.linears
        return finished

    def record(self, number: int, linears: list[dict[str, Any]], digest: str) -> bool:
        """Journal a block whose file is in place. True for one that was made again and differs from before, which
        invalidates the blocks after it."""
        self._journal.add_block(number, digest, linears)
        return number in self._before and self._before[number].digest != digest

    def record_files(self, known: Mapping[str, str]) -> None:
        """Journal every file but the blocks and those that describe the run; some digests are `known`."""
        own = (MANIFEST, JOURNAL, LOCK, REPORT, BLOCKS, EXPORTS)
        for top in sorted(self._place.iterdir()):
            if top.name in own or is_scratch(top.name):
                continue
            for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
                if file.is_file():
                    name = str(file.relative_to(self._place))
                    self._journal.add_file(name, known.get(name) or file_digest(file))

    def scratch(self) -> Scratch:
        """Scratch space for hidden states, removed when the run ends or by the next run."""
        with disk_errors_as_sentences(self.path):
            return Scratch(self._place, "work")

    def close(self) -> None:
        """Release the directory, and remove it if this run created it and wrote nothing."""
        if self._lock is None:
            return
        if self._created and not self._foreign_files():
            (self._place / LOCK).unlink()
            self._place.rmdir()
        self._lock.close()
        self._lock = None

    def _foreign_files(self) -> list[Path]:
        try:
            return [path for path in self._place.iterdir() if path.name != LOCK and not is_scratch(path.name)]
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}") from None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names of fields that differ, with the values of both."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
