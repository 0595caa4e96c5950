"""The blocks and files that a run has finished, with their digests; a resume and all readers rely on it.

    {"block": 3, "digest": "…", "linears": [report rows], "check": "…"}     after the block's file is in place
    {"file": "outside.safetensors", "digest": "…", "check": "…"}            of what lies outside the blocks

Lines are only appended; the last one of a block or file counts. `check` is a digest of the line's other fields: a line
that was truncated or changed counts as not written, and its block is quantized again.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import disk_errors_as_sentences
from fewbit.files import read_bytes

JOURNAL = "journal.jsonl"
_LIMIT = 2**28  # bytes; a hundred blocks with a thousand experts each take half of it
_DIGEST = re.compile(r"[0-9a-f]{64}:[0-9]{1,18}")


@dataclass(frozen=True)
class FinishedBlock:
    """A block whose file is in place."""

    digest: str
    linears: list[dict[str, Any]]
    """Report rows of its quantized linears."""


@dataclass(frozen=True)
class Journal:
    """The journal of the run in `directory`."""

    directory: Path

    def add_block(self, number: int, digest: str, linears: list[dict[str, Any]]) -> None:
        """Note a block whose file is in place."""
        self._add({"block": number, "digest": digest, "linears": linears})

    def add_file(self, name: str, digest: str) -> None:
        """Note a file beside the blocks that is in place."""
        if self.files().get(name) != digest:
            self._add({"file": name, "digest": digest})

    def blocks(self) -> dict[int, FinishedBlock]:
        """By their numbers."""
        return {
            entry["block"]: FinishedBlock(entry["digest"], entry["linears"])
            for entry in self._entries()
            if isinstance(entry.get("block"), int)
            and isinstance(rows := entry.get("linears"), list)
            and all(isinstance(row, dict) for row in rows)
        }

    def files(self) -> dict[str, str]:
        """Digest by name, of the files beside the blocks."""
        return {entry["file"]: entry["digest"] for entry in self._entries() if isinstance(entry.get("file"), str)}

    def _entries(self) -> list[dict[str, Any]]:
        """Lines that are whole, each with a digest."""
        path = self.directory / JOURNAL
        found = []
        for line in read_bytes(path, _LIMIT).split(b"\n") if path.exists() else ():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            whole = isinstance(entry, dict) and entry.pop("check", None) == fields_digest(entry)
            if whole and _DIGEST.fullmatch(str(entry.get("digest"))):
                found.append(entry)
        return found

    def _add(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry | {"check": fields_digest(entry)})
        path = self.directory / JOURNAL
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with disk_errors_as_sentences(path), os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            file.write(f"\n{line}\n".encode())  # the leading newline closes a line that a crash cut off
            file.flush()
            os.fsync(file.fileno())


def fields_digest(fields: dict[str, Any]) -> str:
    """SHA-256 of a table of plain data, independent of the order of its fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
