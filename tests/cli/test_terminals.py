"""Terminals that know ASCII only, pipes that nobody reads, Ctrl-C, a directory that is gone: never a traceback."""

import io
import os
import shlex
import sys

import pytest

import fewbit
from fewbit.cli import VERBS
from fewbit.engine import block_quantizer
from fewbit.runs.progress import PlainProgress


@pytest.fixture
def arguments(checkpoint, calibration_file, tmp_path):
    model, run = checkpoint("llama"), tmp_path / "a run"
    return ["quantize", model, "--output", run, "--scheme", "W4A16-g32", "--algorithm", "rtn", "--num-samples", "8",
            "--sequence-length", "32", "--calibration", calibration_file]  # fmt: skip


class Terminal(io.TextIOWrapper):
    """Writes bytes of an encoding into memory."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def said(self):
        return self.buffer.getvalue().decode(self.encoding, "replace")


class ClosedPipe(io.TextIOWrapper):
    """What `| head` leaves."""

    def __init__(self):
        reading, writing = os.pipe()
        os.close(reading)
        super().__init__(os.fdopen(writing, "wb"), encoding="utf-8", write_through=True)


def run_command(monkeypatch, arguments, out, err):
    from fewbit.cli import main

    monkeypatch.setattr(sys, "argv", ["fewbit", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding_is_written_to(monkeypatch, arguments, encoding, tmp_path):
    out, err = Terminal(encoding), Terminal(encoding)
    assert run_command(monkeypatch, arguments, out, err) == 0, err.said()
    assert "block 2/2" in err.said()
    assert "total" in out.said()
    assert run_command(monkeypatch, ["schemes"], out, err) == 0
    assert run_command(monkeypatch, ["inspect", arguments[1]], out, err) == 0


def test_names_that_are_no_text_are_printed(monkeypatch, tmp_path):
    err = Terminal("utf-8")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme")
    assert run_command(monkeypatch, ["inspect", name], Terminal("utf-8"), err) == 2
    assert "does not exist" in err.said()


def test_names_that_look_like_markup_are_printed(monkeypatch, arguments, tmp_path):
    model = tmp_path / "[bold]model["
    model.symlink_to(arguments[1])
    out, err = Terminal("utf-8"), Terminal("utf-8")
    assert run_command(monkeypatch, [arguments[0], model, *arguments[2:]], out, err) == 0, err.said()


def test_a_run_goes_on_when_nobody_reads_its_progress(monkeypatch, arguments, tmp_path):
    run_command(monkeypatch, arguments, Terminal("utf-8"), ClosedPipe())
    assert (tmp_path / "a run" / "report.json").exists()
    PlainProgress(None).note("text")


def test_output_that_nobody_reads_is_no_traceback(monkeypatch, arguments, tmp_path):
    run_command(monkeypatch, arguments, ClosedPipe(), Terminal("utf-8"))
    assert (tmp_path / "a run" / "report.json").exists()


def test_ctrl_c_says_what_was_kept_and_the_command_that_goes_on(cli, monkeypatch, arguments, tmp_path):
    quantize_stage, count = block_quantizer.quantize_stage, 0

    def interrupted(*given):
        nonlocal count
        count += 1
        if count == 6:  # in the second block
            raise KeyboardInterrupt
        return quantize_stage(*given)

    monkeypatch.setattr(block_quantizer, "quantize_stage", interrupted)
    code, _, err = cli(*arguments)
    assert code == 130
    assert "1 finished block is kept in" in err
    assert "Traceback" not in err
    words = shlex.split(err.rpartition("go on with: ")[2])
    assert words == ["fewbit", *map(str, arguments), "--resume"]
    assert cli(*words[1:])[0] == 0
    assert not [path for path in (tmp_path / "a run").iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "quantize"])
def test_ctrl_c_in_any_verb_says_how_to_start_again(cli, monkeypatch, verb, tmp_path):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    for name in ("formats.export", "formats.verify", "evaluation.evaluate", "config.recipe.Config.read_yaml",
                 "models.demo.make_demo_model"):  # fmt: skip
        monkeypatch.setattr(f"fewbit.{name}", interrupted)
    monkeypatch.setattr("rich.table.Table.add_column", interrupted)
    options = {"export": ["--format", "compressed-tensors"], "evaluate": ["--text", "x"], "inspect": ["--recipe", "x"]}
    place = [] if verb == "schemes" else [tmp_path / "x"]
    code, _, err = cli(verb.replace("_", "-"), *place, *options.get(verb, []))
    assert code == 130, err
    assert "start again with: fewbit " + verb.replace("_", "-") in err


def test_a_working_directory_that_is_gone_is_a_sentence(cli, monkeypatch):
    def gone():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    code, _, err = cli("schemes")
    assert code == 2
    assert "the working directory does not exist any more" in err


def test_too_little_memory_is_a_sentence(cli, monkeypatch):
    def fail(*given, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …")

    monkeypatch.setattr("fewbit.formats.verify", fail)
    code, _, err = cli("verify", "x")
    assert code == 2
    assert "out of memory" in err


def test_the_version_is_that_of_the_package(cli):
    assert cli("--version")[1].strip() == fewbit.__version__
