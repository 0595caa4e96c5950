"""A format is a row: with one more in the table, everything that knows formats knows it."""

import json

import pytest
import torch

import fewbit
from fewbit.checkpoint.configuration import quantization_of, read_config
from fewbit.checkpoint.side_files import copy_side_files
from fewbit.checkpoint.source import SafetensorsSource
from fewbit.config.schemes import SCHEMES
from fewbit.contents import nominal
from fewbit.errors import CheckpointError, ConfigError, VerificationError
from fewbit.formats import EXPORTERS, FORMATS, export, holding, verify
from fewbit.formats.format import ExportFormat, Opened
from fewbit.formats.shards import check_shards, write_shards
from fewbit.formats.table import open_any
from fewbit.formats.verification import Verification, compare

TOY = "toy"


def check(contents):
    if contents.activations or not all(linear.weight.format.is_integer for linear in contents.weights):
        raise ConfigError(f"{TOY}: it holds integers whose inputs stay as they are, and nothing else")


def tensors_of(part):
    return {name: part.read(name, torch.float32) for name in part.info()}


def write(checkpoint, directory):
    write_shards(directory, map(tensors_of, checkpoint.parts), len(checkpoint.parts))
    copy_side_files(checkpoint.directory, directory, {"quantization_config": {"quant_method": TOY}})


def verify_toy(directory, checkpoint):
    check_shards(directory, len(checkpoint.parts))
    found = SafetensorsSource(directory)
    for name in checkpoint.info():
        compare(name, found.read([name])[name], checkpoint.read([name], torch.float32)[name])
    return Verification(directory, TOY, len(checkpoint.contents.weights), 0, "itself")


def open_toy(directory):
    if (quantization_of(read_config(directory), directory) or {}).get("quant_method") != TOY:
        return None
    return Opened(SafetensorsSource(directory))


FORMAT = ExportFormat(
    TOY, open_toy, check, lambda _: ["plain"], lambda _: "pencil", lambda _: ["needs a pencil"], write, verify_toy
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(EXPORTERS, TOY, FORMAT)
    monkeypatch.setattr("fewbit.formats.table.FORMATS", (*FORMATS, FORMAT))


@pytest.fixture(scope="module")
def run(finished_run):
    return fewbit.Run(finished_run("llama", scheme="W8A16", group_size=-1))


def test_it_is_written_noted_verified_and_read(toy, run, tmp_path):
    directory = export(run, TOY, tmp_path / "export")
    assert json.loads((directory / "fewbit-export.json").read_text())["notes"] == ["needs a pencil"]
    (found,) = verify(directory, run)
    assert (found.format, found.quantized) == (TOY, 14)
    ids = torch.arange(1, 33)[None]
    assert fewbit.evaluate(directory, ids) == fewbit.evaluate(run, ids)
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of", "00002-of", 1))
    with pytest.raises(VerificationError, match="does not fit the shards"):
        verify(directory, run)


def test_it_refuses_before_the_work(toy, checkpoint, quick, tmp_path):
    with pytest.raises(ConfigError, match="toy: it holds integers"):
        fewbit.quantize(checkpoint("llama"), output=tmp_path / "run", export=[TOY], **quick | {"scheme": "W4A8"})
    assert not (tmp_path / "run").exists()


def test_schemes_say_that_it_holds_them(toy, cli):
    held = {name for name, config in SCHEMES.items() if FORMAT in holding(nominal(config))}
    assert held == {f"W{bits}A16{form}" for bits in (8, 4, 3, 2) for form in ("", "_ASYM")}
    _, out, _ = cli("schemes")
    for line in out.splitlines()[1:]:
        assert (TOY in line and "plain" in line and "pencil" in line) == (line.split()[0] in held)


def test_without_the_row_nobody_knows_it(run, toy, tmp_path, monkeypatch):
    directory = export(run, TOY, tmp_path / "export")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="quantized with 'toy', which fewbit cannot read"):
        open_any(directory)
    with pytest.raises(CheckpointError, match="unknown format 'toy'"):
        verify(directory, run)
    with pytest.raises(ConfigError, match="unknown export format 'toy'"):
        export(run, TOY, tmp_path / "again")
