"""Reads files of texts: plain text, and rows in JSON lines, JSON, CSV or Parquet.

The suffix decides the format. Files that are not text are refused by their name or first bytes; `rows.py` reads the
fields of a row.
"""

import codecs
import csv
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from fewbit.errors import CalibrationError, first_line
from fewbit.files import open_regular

HUB_PREFIX = "hub:"
HUB_ROWS = 20_000
LARGEST_TEXT = 2**30  # bytes; calibration and evaluation take a few MB of text
LARGEST_JSON = 2**27  # a .json file is parsed as a whole, and its objects take many times its size
FIELDS = ("text", "messages", "input_ids", "attention_mask")
"""Columns that are read where a format can leave the others alone."""

_NO_TEXT = set(
    """7z arrow avi avro bin bmp bz2 ckpt db doc docx dll epub exe feather flac gguf gif gz h5 hdf5 ico jpeg jpg lz4
    mp3 mp4 npy npz odp ods odt ogg onnx orc pdf pickle pkl png ppt pptx pt pth rar safetensors so sqlite tar tgz tiff
    wav webm webp whl xls xlsx xz zip zst""".split()  # noqa: SIM905 (one to a line would be a page)
)
_KINDS = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"%PDF": "a PDF", b"PAR1": "Parquet (name it .parquet)",
    b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"GGUF": "GGUF", b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle", b"\x80\x05": "a pickle", b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture",
    codecs.BOM_UTF16_LE: "UTF-16 (save it as UTF-8)", codecs.BOM_UTF16_BE: "UTF-16 (save it as UTF-8)",
}  # fmt: skip
_csv_limit = threading.Lock()


def read_rows(data: str | Path | None) -> tuple[list[Any], str]:
    """Rows as they are stored, and a name for them: texts (str) or objects with fields.

    From a file, "hub:DATASET[:CONFIG]", or None for the text that ships with fewbit. Raises CalibrationError for what
    cannot be read, is no text, or holds none.
    """
    if data is None:
        packaged = resources.files("fewbit") / "data" / "calibration.txt"
        return [packaged.read_text(encoding="utf-8")], "WikiText-2 excerpt shipped with fewbit"
    if str(data).startswith(HUB_PREFIX):
        return _hub_rows(str(data).removeprefix(HUB_PREFIX)), str(data)
    path = Path(data)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix in _NO_TEXT:
        raise CalibrationError(
            f"text {path} is named .{suffix}, which is no text; give .txt, .jsonl, .json, .csv or .parquet"
        )
    read = _READERS.get(suffix, _plain)
    with open_regular(path, CalibrationError) as opened:
        size, largest = os.fstat(opened).st_size, LARGEST_JSON if read is _json else LARGEST_TEXT
    if size > largest:
        raise CalibrationError(
            f"text {path} has {size >> 20} MiB, and at most {largest >> 20} can be read; "
            "a few MB are enough: give the first part, as .txt or .jsonl"
        )
    try:
        rows = list(read(path))
    except OSError as error:
        raise CalibrationError(f"text {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"text {path} is {_kind(path)}") from None
    if all(row == "" for row in rows):
        raise CalibrationError(f"text {path} is empty")
    return rows, path.name


def _plain(path: Path) -> Iterator[Any]:
    """The whole file as one text."""
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise CalibrationError(f"text {path} is {_kind(path)}")
    if _is_row(text.lstrip().partition("\n")[0]):
        raise CalibrationError(f"text {path} holds JSON rows; name it .jsonl to have their texts read")
    yield text if text.strip() else ""


def _is_row(line: str) -> bool:
    """Whether a line is a JSON object with a field that rows of texts have."""
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        return isinstance(found, dict) and bool({"text", "messages", "conversations", "prompt"} & set(found))
    return False


def _json_lines(path: Path) -> Iterator[Any]:
    """One value per line; "" keeps the place of a blank one, so that rows are numbered as lines."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:  # other line ends may stand inside a string
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else ""
            except (ValueError, RecursionError) as error:
                raise _no_json(f"row {number} of {path}", error) from None
            yield row


def _json(path: Path) -> Iterator[Any]:
    """A list of rows, one row, columns as lists, or (as many name it so) JSON lines."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text if text.strip() else "[]")
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", None) != "Extra data":
            raise _no_json(f"text {path}", error) from None
        yield from _json_lines(path)
        return
    if isinstance(found, dict) and isinstance(columns := found.get("text"), list):
        found = [{"text": text} for text in columns]
    yield from found if isinstance(found, list) else [found]


def _no_json(what: str, error: Exception) -> CalibrationError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
    return CalibrationError(f"{what} is no JSON that can be read: {reason}")


def _csv(path: Path) -> Iterator[Any]:
    """A row per record; the first record names the columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _csv_limit:  # a limit of the whole process, which is far less than a text may have
        before = csv.field_size_limit(LARGEST_TEXT)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise CalibrationError(f"text {path} is no valid CSV: {error}") from None
        finally:
            csv.field_size_limit(before)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise CalibrationError(
                f"row {number} of {path} has another number of fields than the first line names columns; "
                "fields with commas or line ends need quotes"
            )
        yield row


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CalibrationError(f"reading {path} needs pyarrow: pip install 'fewbit[parquet]'") from None
    size = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in FIELDS if name in names] or names
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                size += batch.nbytes
                if size > LARGEST_TEXT:
                    raise CalibrationError(
                        f"text {path} holds more than {LARGEST_TEXT >> 20} MiB; a few MB are enough: give a part of it"
                    )
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:  # ArrowInvalid is a ValueError
        raise CalibrationError(f"text {path} is no Parquet that can be read: {first_line(error)}") from None


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "jsonl": _json_lines, "ndjson": _json_lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet,
}  # fmt: skip


def _kind(path: Path) -> str:
    """What a file is that is no text, as the end of a sentence."""
    with path.open("rb") as file:
        start = file.read(8)
    found = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), None)
    return f"not UTF-8 text but {found}" if found else "not UTF-8 text"


def _hub_rows(name: str) -> list[Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(f"hub:{name} needs the datasets library: pip install 'fewbit[hub]'") from None
    dataset, _, config = name.partition(":")
    try:
        rows = load_dataset(dataset, config or None, split="train", streaming=True, trust_remote_code=False)
        return [row for row, _ in zip(rows, range(HUB_ROWS), strict=False)]
    except Exception as error:  # whatever the hub client raises, the user can only check name and network
        raise CalibrationError(f"dataset {dataset!r} cannot be read from the hub: {first_line(error)}") from None
