"""Files that texts are stored in: the same texts from every format, and a sentence for what is none."""

import contextlib
import gzip
import json
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.calibration import texts
from fewbit.calibration.texts import read_rows
from fewbit.errors import CalibrationError, FewbitError

ROWS = [
    {"id": 1, "text": 'Grüße aus München, "so" heißt es'},
    {"id": 2, "text": "zwei\nZeilen,\u2028und ein Komma"},
    {"id": 3, "text": ""},
    {"id": 4, "text": "drei"},
]
TEXTS = [row["text"] for row in ROWS]


def as_csv(delimiter=","):
    lines = [f'{row["id"]}{delimiter}"{row["text"].replace(chr(34), chr(34) * 2)}"' for row in ROWS]
    return "\r\n".join([f"id{delimiter}text", *lines]) + "\r\n"


CONTENTS = {
    "lines.jsonl": "\n".join(json.dumps(row) for row in ROWS),
    "lines.ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    "UPPER.JSONL": "\n".join(json.dumps(row) for row in ROWS) + "\n",
    "marked.jsonl": "\ufeff" + "\n".join(json.dumps(row) for row in ROWS),
    "list.json": json.dumps(ROWS, indent=2),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),
    "columns.json": json.dumps({"text": TEXTS, "id": [1, 2, 3, 4]}),
    "strings.json": json.dumps(TEXTS),
    "table.csv": as_csv(),
    "marked.csv": "\ufeff" + as_csv(),
    "table.tsv": as_csv("\t"),
}


def written(directory, name, content):
    file = directory / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_texts(tmp_path, name):
    rows, source = read_rows(written(tmp_path, name, CONTENTS[name]))
    assert [row if isinstance(row, str) else row["text"] for row in rows] == TEXTS
    assert source == name


def test_parquet_gives_them_too(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [[{"role": "user", "content": "a"}], None, [], [{"role": "user", "content": "b"}]]
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": TEXTS, "messages": messages})
    parquet.write_table(table, tmp_path / "t.parquet")
    rows, _ = read_rows(tmp_path / "t.parquet")
    assert [row["text"] for row in rows] == TEXTS
    assert rows[3]["messages"] == [{"role": "user", "content": "b"}]
    assert "id" not in rows[0]  # columns that nobody needs are not read
    parquet.write_table(pyarrow.table({"conversations": ["a"]}), tmp_path / "other.parquet")
    assert read_rows(tmp_path / "other.parquet")[0] == [{"conversations": "a"}]
    with pytest.raises(CalibrationError, match="no Parquet"):
        read_rows(written(tmp_path, "damaged.parquet", (tmp_path / "t.parquet").read_bytes()[:-9]))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match=r"pip install .fewbit\[parquet\]"):
        read_rows(written(tmp_path, "t.parquet", b"PAR1"))


def test_plain_text_is_one_text_without_its_mark(tmp_path):
    text = 'ein "Text"\n\n{"kein": JSON}\n'
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n")):
        assert read_rows(written(tmp_path, "t.md", content))[0] == [text]


def test_a_line_of_a_hundred_megabytes_is_a_line(tmp_path):
    rows, _ = read_rows(written(tmp_path, "long.csv", "text\n" + "x" * 10**7 + "\n"))
    assert len(rows[0]["text"]) == 10**7  # more than the csv module's own limit, which is as it was
    assert read_rows(written(tmp_path, "long.jsonl", json.dumps({"text": "x" * 10**7})))[0][0]["text"]


REFUSED = {
    "t.pdf": (b"%PDF-1.7", "named .pdf, which is no text"),
    "t.gz": (gzip.compress(b"text"), r"named \.gz"),
    "t.safetensors": (b"\0" * 8, r"named \.safetensors"),
    "t.pt": (b"PK\x03\x04", r"named \.pt"),
    "a.txt": (gzip.compress(b"text" * 99), "not UTF-8 text but gzip"),
    "b.txt": ("text".encode("utf-16"), "UTF-16"),
    "c.txt": (b"text\0text", "not UTF-8"),
    "d.txt": (b"%PDF-1.7 \xff", "a PDF"),
    "e.txt": (b'{"text": "a"}\n{"text": "b"}\n', "name it .jsonl"),
    "f.jsonl": (b'{"text": "a"}\n{"text": \n', r"row 2 of .*f\.jsonl"),
    "g.jsonl": (b"[" * 10**6, "nested too deeply"),
    "h.json": (b"[" * 10**6, "nested too deeply"),
    "i.json": (b'{"text": ' + b"9" * 10**5 + b"}", "JSON"),
    "j.jsonl": (b"\n \n\n", "is empty"),
    "k.json": (b" ", "is empty"),
    "l.json": (b"[]", "is empty"),
    "m.csv": (b"text,id\na\n", "row 1 of"),
    "n.csv": (b"text,id\na,b,c\n", "row 1 of"),
    "o.csv": (b'text\n"a', "CSV"),
    "p.csv": (b"text\n", "is empty"),
    "q.jsonl": ('{"text": "ä"}'.encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_by_its_name(tmp_path, name):
    content, words = REFUSED[name]
    with pytest.raises(CalibrationError, match=words) as caught:
        read_rows(written(tmp_path, name, content))
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pipe_without_a_writer_is_refused_at_once(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CalibrationError, match="is a pipe, not a regular file"):
        read_rows(tmp_path / "pipe.txt")
    with pytest.raises(CalibrationError, match="cannot be read: embedded null byte"):
        read_rows("a\0b")


def test_more_than_can_be_read_is_refused_before_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "LARGEST_TEXT", 10)
    with pytest.raises(CalibrationError, match="give the first part"):
        read_rows(written(tmp_path, "t.txt", "x" * 11))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "messages", "a"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet"]),
    st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()),
    st.integers(0, 2**32),
)
def test_whatever_is_in_a_file_it_is_rows_or_a_sentence(tmp_path_factory, suffix, content, seed):
    chooser = random.Random(seed)
    if content and chooser.random() < 0.5:  # damage
        content = bytearray(content)
        content[chooser.randrange(len(content))] = chooser.randrange(256)
    file = written(tmp_path_factory.getbasetemp(), f"fuzz.{suffix}", bytes(content))
    with contextlib.suppress(FewbitError):  # nothing else
        assert read_rows(file)[0]
