"""Whatever lies in place of a user's file: it is read, or a sentence says at once what it is."""

import json
import os
import socket

import pytest

from fewbit.errors import CheckpointError, ConfigError, RunError
from fewbit.files import TEXT_LIMIT, check_name, destination, read_bytes, read_json, read_json_object, read_text


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_text('{"ä": 1}', encoding="utf-8")
    assert read_bytes(tmp_path / "file") == '{"ä": 1}'.encode()
    assert read_text(tmp_path / "file") == '{"ä": 1}'
    assert read_json_object(tmp_path / "file") == {"ä": 1}


def test_a_link_to_a_file_is_read(tmp_path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_json(tmp_path / "link") == 1


def bind_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "is a pipe"),
        (os.mkdir, "is a directory"),
        (bind_socket, "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to("/dev/stdin"), "is|cannot be read"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere"),
        (lambda path: None, "does not exist"),
    ],
)
@pytest.mark.timeout(10)
def test_what_is_no_file_is_named_at_once(make, said, tmp_path):
    make(tmp_path / "file")
    with pytest.raises(ConfigError, match=said) as caught:
        read_text(tmp_path / "file", error=ConfigError)
    assert "file" in str(caught.value)


def test_a_name_that_no_file_can_have_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_text(tmp_path / "a\0b")


def test_a_name_that_safetensors_cannot_open_is_refused_before_anything_lies_there(tmp_path):
    name = tmp_path / os.fsdecode(b"run-\xff") / "run"
    with pytest.raises(RunError, match=r"run-\\udcff/run is no UTF-8"):
        destination(name, "the output")
    with pytest.raises(CheckpointError, match="is no UTF-8"):
        check_name(name)
    assert destination(tmp_path / "läuft", "the output") == tmp_path / "läuft"


@pytest.mark.timeout(10)
def test_a_huge_file_is_refused_and_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(CheckpointError, match="is larger than 32 MiB"):
        read_json(tmp_path / "file")
    assert TEXT_LIMIT == 32 * 2**20


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'{"a": 1}}', b"\0" * 10])
def test_damage_is_a_sentence(text, tmp_path):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"file is damaged") as caught:
        read_json(tmp_path / "file")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [[], None, 1, "text"])
def test_a_table_is_a_table(data, tmp_path):
    (tmp_path / "file").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="should hold a table of fields"):
        read_json_object(tmp_path / "file")
