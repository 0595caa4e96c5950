"""Words for models and tokenizers, right and wrong."""

import json
import os

import pytest
import torch

import fewbit
from fewbit.checkpoint.hub import resolve_directory
from fewbit.checkpoint.tokenizer import load_tokenizer
from fewbit.errors import CheckpointError

QUICK = {"scheme": "W8A16", "group_size": 32, "algorithm": "rtn", "progress": False}


@pytest.mark.parametrize("name", ["no/such/place", "a\0b", "x" * 5000, "../nowhere", "-/-", os.fsdecode(b"\xff\xfe")])
def test_what_is_no_model_is_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve_directory(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 6000


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_text("")


def other(file):
    file.write_text('{"model": {"type": "Unknown"}, "added_tokens": 3}')


def numbers(file):
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), -1)))


def code(file):
    described = json.loads((file.parent / "tokenizer_config.json").read_text())
    described |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(described))
    (file.parent / "own.py").write_text("raise SystemExit('ran')\n")


def pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [cut, empty, other, numbers, code, pipe])
def test_a_tokenizer_that_cannot_be_read_stops_texts_and_not_token_ids(damage, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    damage(llama / "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        load_tokenizer(llama)
    assert "\n" not in str(caught.value)
    ids = torch.arange(24).view(2, 12)
    assert fewbit.evaluate(llama, ids).tokens == 22
    run = fewbit.quantize(llama, output=tmp_path / "run", calibration="none", **QUICK)
    assert fewbit.evaluate(run, ids).tokens == 22


def test_a_tokenizer_may_be_in_any_of_its_files(llama, tmp_path):
    assert load_tokenizer(llama) is not None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    assert load_tokenizer(llama) is None
    assert load_tokenizer(None) is None
