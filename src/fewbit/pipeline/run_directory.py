"""A run's directory: locked while in use, described by a manifest, with a journal that is the truth on a resume."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fewbit.checkpoint.files import write_json
from fewbit.checkpoint.native import FORMAT_VERSION, MANIFEST, block_file, read_manifest
from fewbit.errors import CheckpointError, RunError, disk_errors_as_sentences

JOURNAL = "journal.jsonl"
LOCK = ".lock"
WORK = "work"


@dataclass(frozen=True)
class Identity:
    """What a run depends on. A resumed run must have the same."""

    recipe: dict[str, Any]
    model: str
    calibration: str
    version: str
    libraries: dict[str, str]
    """Versions of those that compute: other ones may round otherwise."""

    def differences(self, manifest: dict[str, Any]) -> list[str]:
        """In words, what differs from the run that wrote `manifest`."""
        found = []
        if manifest.get("model") != self.model:
            found.append("another model (or its weights changed)")
        if manifest.get("calibration") != self.calibration:
            found.append("other calibration data or another seed")
        if manifest.get("version") != self.version:
            found.append(f"fewbit {manifest.get('version')} before, {self.version} now")
        libraries = manifest.get("libraries") or {}
        for name in sorted(set(libraries) | set(self.libraries)):
            if libraries.get(name) != self.libraries.get(name):
                found.append(f"{name} {libraries.get(name)} before, {self.libraries.get(name)} now")
        before = manifest.get("recipe") or {}
        for key in sorted(set(before) | set(self.recipe)):
            if before.get(key) != self.recipe.get(key):
                found.append(
                    f"recipe field {key!r}: {_short(before.get(key))} before, {_short(self.recipe.get(key))} now"
                )
        return found


class RunDirectory:
    """Open for one run at a time; a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._created = False

    def open(
        self,
        identity: Identity,
        num_blocks: int,
        unquantized: list[str],
        resume: bool,
        attention_classes: Mapping[str, str] | None = None,
    ) -> None:
        """Create the directory, or continue in it. RunError if it is in use, not empty, or of another run.

        `attention_classes`: of attention modules in which something is quantized; exports name them.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; --output needs a directory")
        if self.path.exists() and not (self.path / MANIFEST).exists() and any(self._foreign_files()):
            raise RunError(f"{self.path} is not empty and holds no fewbit run; choose another output directory")
        with disk_errors_as_sentences(self.path):
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        if (self.path / MANIFEST).exists():
            if not resume:
                raise RunError(
                    f"{self.path} already holds a run; use --resume to continue it or choose another directory"
                )
            if differences := identity.differences(self._manifest()):
                raise RunError(
                    f"{self.path} cannot be resumed: {'; '.join(differences)}; "
                    "use the original settings or a new directory"
                )
            return
        write_json(
            self.path / MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "version": identity.version,
                "libraries": identity.libraries,
                "num_blocks": num_blocks,
                "model": identity.model,
                "calibration": identity.calibration,
                "recipe": identity.recipe,
                "unquantized_linears": unquantized,
                "attention_classes": dict(attention_classes or {}),
            },
        )

    def finished_blocks(self) -> dict[int, list[dict[str, Any]]]:
        """Block number → report rows of the blocks that are complete. A line cut off by a crash does not count."""
        journal = self.path / JOURNAL
        if not journal.exists():
            return {}
        finished = {}
        for line in journal.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if block_file(self.path, entry["block"]).exists():
                finished[int(entry["block"])] = entry["linears"]
        return finished

    def record(self, block: int, linears: list[dict[str, Any]]) -> None:
        """Journal a block whose file is in place."""
        line = json.dumps({"block": block, "linears": linears})
        journal = self.path / JOURNAL
        with disk_errors_as_sentences(journal), journal.open("ab") as file:
            file.write(f"\n{line}\n".encode())  # the leading newline closes a line that a crash cut off
            file.flush()
            os.fsync(file.fileno())

    @property
    def work(self) -> Path:
        """Scratch space of the run."""
        return self.path / WORK

    def close(self) -> None:
        """Release the directory; one that this run created and wrote nothing to is removed."""
        if self._lock is None:
            return
        if self._created and not self._foreign_files():
            (self.path / LOCK).unlink()
            self.path.rmdir()
        self._lock.close()
        self._lock = None

    def _manifest(self) -> dict[str, Any]:
        try:
            return read_manifest(self.path)
        except CheckpointError as error:
            raise RunError(str(error)) from None

    def _acquire(self) -> None:
        lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when the process dies, however
        except OSError:
            lock.close()
            raise RunError(
                f"{self.path} is in use by another run; wait for it or choose another output directory"
            ) from None
        self._lock = lock

    def _foreign_files(self) -> list[Path]:
        return [path for path in self.path.iterdir() if path.name not in (LOCK, MANIFEST + ".partial")]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
