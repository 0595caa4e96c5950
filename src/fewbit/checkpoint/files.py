"""Writing files so that a reader, or a run that was killed, never sees half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fewbit.errors import RunError, disk_errors_as_sentences


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write beside `path`; it is flushed to disk and takes its place only if the body succeeds."""
    beside = path.with_name(path.name + ".partial")
    try:
        with disk_errors_as_sentences(path):
            yield beside
            with beside.open("rb+") as written:
                os.fsync(written.fileno())
            beside.replace(path)
            _sync_directory(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors atomically; same tensors and metadata, same bytes."""
    with replacing(path) as beside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata)
        _sort_metadata(beside)


def _sort_metadata(file: Path) -> None:
    """Put the header's metadata in order: safetensors writes them in an order that changes from run to run."""
    with file.open("rb+") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{file}: the header changed its length when its metadata were sorted")
        opened.seek(8)
        opened.write(text)


@contextmanager
def replacing_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill beside `directory`; it takes its place only if the body succeeds. Refuses to overwrite."""
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file, not a directory; choose another place")
    if directory.exists() and any(directory.iterdir()):
        raise RunError(f"{directory} exists and is not empty; choose another directory or remove it")
    beside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with disk_errors_as_sentences(directory):
            beside.mkdir(parents=True)
            yield beside
            if directory.exists():
                directory.rmdir()
            beside.replace(directory)
            _sync_directory(directory.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)  # a rename is durable only once its directory is
    finally:
        os.close(handle)
